"""What an operator does to jobs: retry, cancel, rerun, restore from an archive, erase. Recorded with the operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.database.tables import MediaObject
from common.domain import ACTIVE_STATES, AttemptOutcome, JobState, Reason
from common.ledger import audit
from common.ledger.attempts import AFTER_A_CHECK
from common.ledger.registration import HOPELESS, keep_from_registering, uri_hash
from common.ledger.retention import PURGED_BEFORE_SQL
from common.ledger.transitions import ANEW, SAID, Attempt, Transition, move, transition
from common.ledger.withdrawal import OF_MEDIA, WISHED, delete_rows

_RETRY_ALL = transition(
    (JobState.QUARANTINED,),
    JobState.PENDING,
    """
    FROM jobs
    WHERE jobs.reason <> ALL(:hopeless)
    """,
    sets=ANEW,
)

_RETRY_THESE = transition(
    (JobState.QUARANTINED, JobState.CANCELLED),
    JobState.PENDING,
    f"""
    FROM jobs
    WHERE jobs.id = ANY(:ids)
      AND ((jobs.state = 'quarantined' AND jobs.reason <> ALL(:hopeless)) OR (jobs.state = 'cancelled' AND {WISHED}))
    """,
    sets=ANEW,
)


def retry(session: Session, job_ids: Sequence[int] | None = None, *, by: str) -> list[int]:
    """quarantined → pending, counters reset, for these jobs or for all; returns the ids that moved. If jobs are named,
    those that an operator has cancelled are retried, too.

    Not retried: jobs whose object no pattern could place in time (they would count under their upload time), and jobs
    of footage from purged time. `by` is recorded.
    """
    hopeless = list(HOPELESS)
    if job_ids is None:
        rows = move(session, _RETRY_ALL, {"hopeless": hopeless})
    else:
        rows = move(session, _RETRY_THESE, {"hopeless": hopeless, "ids": list(job_ids)})
    return _recorded(session, "retry", by, rows)


def _cancelling(which: str) -> Transition:
    """The statement that cancels a batch. Jobs are chosen without an order: sorting all remaining jobs for each batch
    would make the total time grow with the square of their number."""
    active = ", ".join(f"'{state}'" for state in ACTIVE_STATES)
    return transition(
        ACTIVE_STATES,
        JobState.CANCELLED,
        """
        FROM jobs
        WHERE jobs.id = ANY (ARRAY(SELECT id FROM chosen))
        """,
        sets=SAID,
        attempt=Attempt(AttemptOutcome.CANCELLED, ":reason", ":detail"),
        before=f"""
chosen AS (
    SELECT id
    FROM jobs
    WHERE {which} AND state IN ({active})
    LIMIT :limit
)""",
    )


_CANCEL = _cancelling("id = ANY(:ids)")
_CANCEL_BACKFILL = _cancelling("backfill_id = :id")


def cancel(session: Session, job_ids: Sequence[int], *, by: str) -> list[int]:
    """active → cancelled for these jobs; returns the ids that moved. `by` is recorded.

    A worker that runs one of them goes on until it renews its lease or commits, and is then refused.
    """
    chosen = {"ids": list(job_ids), "limit": None, "reason": Reason.CANCELLED_BY_OPERATOR.value, "detail": f"by {by}"}
    return _recorded(session, "cancel", by, move(session, _CANCEL, chosen))


def cancel_backfill(session: Session, backfill_id: int, *, by: str, limit: int) -> list[int]:
    """active → cancelled for at most `limit` jobs of a backfill; returns the ids that moved. `by` is recorded."""
    chosen = {"id": backfill_id, "limit": limit, "reason": Reason.CANCELLED_WITH_BACKFILL.value, "detail": f"by {by}"}
    return _recorded(session, "cancel", by, move(session, _CANCEL_BACKFILL, chosen))


_LOCK_MEDIA = """
SELECT
FROM media_objects
WHERE id IN (SELECT media_object_id FROM jobs WHERE id = ANY(:ids))
ORDER BY id
FOR UPDATE
"""

_RERUN = transition(
    (JobState.SUCCEEDED,),
    JobState.PENDING,
    f"""
    FROM jobs
    WHERE jobs.id = ANY(:ids) AND jobs.kind <> 'probe'
      AND NOT EXISTS (SELECT FROM frame_counts c WHERE c.job_id = jobs.id AND c.hour < {PURGED_BEFORE_SQL})
    """,
    sets=ANEW,
)

#: A query for the job ids in the parameter `ids`.
THESE_JOBS = "SELECT unnest(CAST(:ids AS bigint[]))"


def rerun(session: Session, job_ids: Sequence[int], *, by: str) -> list[int]:
    """succeeded → pending for these images and chunks; their rows are deleted, and the hours of the rows marked, in the
    same transaction. Returns the ids that moved. `by` is recorded.

    Not probes (a video keeps its plan), and not jobs that count in purged hours (their rows could not be stored again).
    """
    session.execute(sql(_LOCK_MEDIA), {"ids": list(job_ids)})
    moved = _recorded(session, "rerun", by, move(session, _RERUN, {"ids": list(job_ids)}))
    delete_rows(session, THESE_JOBS, {"ids": moved}, keep_purged=False)
    return moved


def _recorded(session: Session, action: str, by: str, rows: Iterable[Any]) -> list[int]:
    moved = sorted(row.id for row in rows)
    if moved:
        audit.record(session, action, by, job_ids=moved)
    return moved


_RESTORE_REQUESTED = """
WITH asked AS (
    SELECT id
    FROM media_objects
    WHERE bucket = :bucket AND key = ANY(:keys) AND superseded_at IS NULL
    ORDER BY id
    FOR UPDATE
)
UPDATE media_objects m
SET restore_requested_at = clock_timestamp()
FROM asked
WHERE m.id = asked.id
"""

_AWAIT_RESTORE = transition(
    (JobState.QUARANTINED,),
    JobState.RETRY_WAIT,
    """
    FROM jobs
    JOIN media_objects m ON m.id = jobs.media_object_id
    WHERE m.bucket = :bucket AND m.key = ANY(:keys) AND m.superseded_at IS NULL AND jobs.reason = 'archived'
    """,
    sets={"next_run_at": AFTER_A_CHECK},
)


def restore_requested(session: Session, bucket: str, keys: Sequence[str], *, check_seconds: float) -> int:
    """quarantined → retry_wait for archived objects that S3 was asked to restore; returns how many jobs moved."""
    asked = {"bucket": bucket, "keys": list(keys)}
    session.execute(sql(_RESTORE_REQUESTED), asked)
    return len(move(session, _AWAIT_RESTORE, {**asked, "check": check_seconds}))


_FORGET_CURSORS = """
UPDATE backfill_parts p
SET begins_after = CASE WHEN begins_after = :key THEN '' ELSE begins_after END,
    ends_with = nullif(ends_with, :key),
    cursor = nullif(cursor, :key)
FROM backfills b
JOIN sources s ON s.id = b.source_id
WHERE b.id = p.backfill_id AND s.bucket = :bucket AND :key IN (begins_after, ends_with, cursor)
"""


def erase(session: Session, bucket: str, key: str, *, by: str) -> int:
    """Remove an object with everything that came from it, in all its versions: faces, counts, jobs and their attempts.
    It is never registered again. Marks the hours that it counted in. Returns how many versions there were.

    A hash of its URI remains, and its share in the sums of purged hours, which can't be computed again.
    """
    keep_from_registering(session)
    media_ids = session.scalars(
        select(MediaObject.id)
        .where(MediaObject.bucket == bucket, MediaObject.key == key)
        .order_by(MediaObject.id)
        .with_for_update()
    ).all()
    parameters = {"ids": list(media_ids)}
    # A worker that is about to commit one of these jobs waits for this lock, finds the job gone, and is refused.
    session.execute(sql(f"{OF_MEDIA} ORDER BY id FOR UPDATE"), parameters)
    delete_rows(session, OF_MEDIA, parameters, keep_purged=False)
    session.execute(text("DELETE FROM jobs WHERE media_object_id = ANY(:ids)"), parameters)
    session.execute(text("DELETE FROM media_objects WHERE id = ANY(:ids)"), parameters)
    session.execute(sql(_FORGET_CURSORS), {"key": key, "bucket": bucket})
    session.execute(
        text("INSERT INTO erased_objects (uri_sha256, action_id) VALUES (:hash, :action) ON CONFLICT DO NOTHING"),
        {"hash": uri_hash(f"{bucket}/{key}"), "action": audit.record(session, "erase", by)},
    )
    return len(media_ids)
