"""Withdraws jobs whose object is replaced or moved: they are cancelled, their rows are deleted, and the hours of the
rows are marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.domain import AttemptOutcome, JobState, Reason
from common.ledger.retention import PURGED_BEFORE_SQL
from common.ledger.transitions import SAID, Attempt, move, transition

#: Whether an operator has cancelled a job. A job cancelled by its id stays cancelled until an operator retries it; one
#: cancelled with its backfill, until another backfill finds its object.
WISHED = "jobs.reason IN ('cancelled_by_operator', 'cancelled_with_backfill')"

#: Whether a chunk belongs to the current plan of its video. Chunks of a withdrawn plan don't. A chunk that an operator
#: has cancelled does: no other chunk may analyse its part.
PLANNED = f"(jobs.state NOT IN ('cancelled', 'source_changed') OR {WISHED})"

#: A query for the jobs of some media objects.
OF_MEDIA = """
SELECT id
FROM jobs
WHERE media_object_id = ANY(:ids)
"""


def _withdrawal(cancelled: str) -> str:
    return f"""
    FROM jobs
    WHERE jobs.media_object_id = ANY(:ids)
      AND (jobs.state <> 'cancelled' OR ({cancelled}))
    """


#: A job that ended as `source_changed` stays so: this state tells how the newer version was found.
_OLD = [state for state in JobState if state is not JobState.SOURCE_CHANGED]
_TOLD = Attempt(AttemptOutcome.CANCELLED, ":reason", ":detail")
_WITHDRAW = transition(_OLD, JobState.CANCELLED, _withdrawal(WISHED), sets=SAID, attempt=_TOLD)
_WITHDRAW_ALL_BUT_CANCELLED = transition(
    _OLD, JobState.CANCELLED, _withdrawal(f"{WISHED} AND jobs.kind = 'chunk'"), sets=SAID, attempt=_TOLD
)


def withdraw(session: Session, media_ids: Sequence[int], detail: str, *, respect_cancelled: bool = False) -> None:
    """Any state but source_changed → cancelled, for all jobs of these media objects; their rows are deleted, and the
    hours of the rows are marked.

    Jobs that an operator had cancelled are withdrawn, too, so that they start again if these bytes come back. With
    `respect_cancelled`, for an object that stays, they stay cancelled by the operator, except chunks: their plan ends.
    """
    parameters = {"ids": list(media_ids), "reason": Reason.SUPERSEDED.value, "detail": detail}
    move(session, _WITHDRAW_ALL_BUT_CANCELLED if respect_cancelled else _WITHDRAW, parameters)
    # Purged hours keep their counts, because their summaries stay, too.
    delete_rows(session, OF_MEDIA, {"ids": list(media_ids)}, keep_purged=True)


def delete_rows(session: Session, job_ids: str, parameters: dict[str, Any], *, keep_purged: bool) -> None:
    """Delete the rows that these jobs wrote, and mark the hours of the rows. `job_ids`: a query for the jobs' ids, a
    constant of this package. `keep_purged`: the frame counts of purged hours stay."""
    counted = f"AND hour >= {PURGED_BEFORE_SQL}" if keep_purged else ""
    session.execute(sql(_DELETE_COUNTS.format(job_ids=job_ids, counted=counted)), parameters)
    session.execute(text(f"DELETE FROM faces WHERE job_id IN ({job_ids})"), parameters)


_DELETE_COUNTS = """
WITH gone AS (
    DELETE FROM frame_counts
    WHERE job_id IN ({job_ids}) {counted}
    RETURNING location_id, pipeline_id, hour
)
INSERT INTO dirty_marks (location_id, pipeline_id, hour)
SELECT DISTINCT location_id, pipeline_id, hour
FROM gone
"""
