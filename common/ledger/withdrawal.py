"""Jobs whose object is replaced, moved or taken away: they are cancelled, what they wrote is deleted, and the hours it
counted in are marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.domain import AttemptOutcome, JobState, Reason
from common.ledger.retention import PURGED_BEFORE_SQL
from common.ledger.transitions import SAID, Attempt, move, transition

#: Of cancelled jobs: by an operator. One by one, a job stays cancelled until an operator takes it back; with its
#: backfill, until another one comes upon its object.
WISHED = "jobs.reason IN ('cancelled_by_operator', 'cancelled_with_backfill')"

#: Whether a chunk belongs to the plan of its video as it stands: those of a withdrawn version's plan don't. One that an
#: operator has cancelled does: its neighbours must not do its part.
PLANNED = f"(jobs.state NOT IN ('cancelled', 'source_changed') OR {WISHED})"

#: Those of some media objects.
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


#: A job that ended as `source_changed` keeps saying so: it is how the newer version was found.
_OLD = [state for state in JobState if state is not JobState.SOURCE_CHANGED]
_TOLD = Attempt(AttemptOutcome.CANCELLED, ":reason", ":detail")
_WITHDRAW = transition(_OLD, JobState.CANCELLED, _withdrawal(WISHED), sets=SAID, attempt=_TOLD)
_WITHDRAW_ALL_BUT_CANCELLED = transition(
    _OLD, JobState.CANCELLED, _withdrawal(f"{WISHED} AND jobs.kind = 'chunk'"), sets=SAID, attempt=_TOLD
)


def withdraw(session: Session, media_ids: Sequence[int], detail: str, *, respect_cancelled: bool = False) -> None:
    """Any state but source_changed → cancelled, for all jobs of these media objects; what they wrote is deleted, and
    the hours it counted in are marked.

    What an operator had cancelled is withdrawn, too, to be planned from the start should these bytes come back. Where
    the object stays, `respect_cancelled` leaves it cancelled by the operator, all but chunks: they are of a plan that
    ends.
    """
    parameters = {"ids": list(media_ids), "reason": Reason.SUPERSEDED.value, "detail": detail}
    move(session, _WITHDRAW_ALL_BUT_CANCELLED if respect_cancelled else _WITHDRAW, parameters)
    # Purged hours keep what was counted in them, as their summaries stay.
    delete_rows(session, OF_MEDIA, {"ids": list(media_ids)}, keep_purged=True)


def delete_rows(session: Session, job_ids: str, parameters: dict[str, Any], *, keep_purged: bool) -> None:
    """Delete what these jobs wrote, and mark the hours it counted in. `job_ids`: a query for their ids, a constant of
    this package. `keep_purged`: the frame counts of purged hours stay."""
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
