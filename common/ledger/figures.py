"""Figures about the ledger: counts, progress, waiting jobs. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.database.tables import DirtyMark, Job, Location
from common.domain import ACTIVE_STATES, JobState, Lane, MaskwatchError
from common.ledger.dispatch import FEEDS
from common.ledger.registration import KNOWN, known_rows
from common.ledger.withdrawal import PLANNED
from common.planning import PlannedObject
from common.storage.store import FILE_BUCKET

_ACTIVE = ", ".join(f"'{state}'" for state in ACTIVE_STATES)


def counts_by_state(session: Session, backfill_id: int | None = None) -> dict[JobState, int]:
    """How many jobs are in each state; of one backfill or of all."""
    query = select(Job.state, func.count()).group_by(Job.state)
    if backfill_id is not None:
        query = query.where(Job.backfill_id == backfill_id)
    found = {state: count for state, count in session.execute(query).tuples()}  # noqa: C416 - keeps the types
    return {state: found.get(state, 0) for state in JobState}


_KNOWN_KEYS = f"""
SELECT m.key
FROM {KNOWN}
WHERE m.revision = known.etag
  AND EXISTS (
      SELECT
      FROM jobs
      WHERE media_object_id = m.id AND pipeline_id = :pipeline
        AND NOT (state = 'quarantined' AND reason = 'archived')
        AND reason IS DISTINCT FROM 'cancelled_with_backfill'
  )
"""


def known_keys(session: Session, planned: Sequence[PlannedObject], pipeline_id: int | None) -> set[str]:
    """The keys of those planned objects of one bucket that have a job of this pipeline for their present ETag, and that
    a backfill would leave as they are."""
    if not planned or pipeline_id is None:
        return set()
    of_bucket = {
        "bucket": planned[0].info.bucket,
        "known": known_rows({item.info.key: item for item in planned}),
        "pipeline": pipeline_id,
    }
    return set(session.execute(sql(_KNOWN_KEYS), of_bucket).scalars())


_SAME_BYTES = """
SELECT count(*) - count(DISTINCT (m.etag, m.size_bytes))
FROM jobs
JOIN media_objects m ON m.id = jobs.media_object_id
WHERE jobs.backfill_id = :id AND jobs.kind <> 'chunk' AND m.bucket <> :files
"""


def same_bytes(session: Session, backfill_id: int) -> int:
    """How many of a backfill's objects in buckets are copies of another one, by ETag and size. (Copies uploaded in
    parts of another size have other ETags, and are not found.)"""
    return int(session.scalar(sql(_SAME_BYTES), {"id": backfill_id, "files": FILE_BUCKET}) or 0)


def any_active(session: Session, location: str | None = None, *, backfill_id: int | None = None) -> bool:
    """Whether any job is active; of a backfill, of a location, or of all. Fast, however large the ledger is."""
    # State by state, because each has its partial index; in one statement, because jobs move between states.
    where, parameters = _of(location, backfill_id)
    query = " OR ".join(f"EXISTS (SELECT FROM jobs WHERE state = '{state}'{where})" for state in ACTIVE_STATES)
    return bool(session.scalar(text(f"SELECT {query}"), parameters))


def _of(location: str | None, backfill_id: int | None) -> tuple[str, dict[str, Any]]:
    """A condition for the jobs of a backfill or of a location, or no condition; and its parameters."""
    if backfill_id is not None:
        return " AND backfill_id = :backfill", {"backfill": backfill_id}
    if location is not None:
        return _OF_LOCATION, {"location": location}
    return "", {}


_OF_LOCATION = """
 AND media_object_id IN (
    SELECT m.id
    FROM media_objects m
    JOIN locations l ON l.id = m.location_id
    WHERE l.name = :location
)"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work on some footage is."""

    objects: int
    #: Objects all of whose jobs have ended, with success or without.
    objects_ended: int
    jobs_active: int
    jobs_ended: int
    #: Length of the videos that were probed.
    footage_seconds: float
    footage_ended_seconds: float


#: The last chunk of a video is planned as long as the others, so its range is cut at the video's end here.
_PROGRESS = f"""
SELECT count(*), count(*) FILTER (WHERE NOT is_active), coalesce(sum(active), 0), coalesce(sum(ended), 0),
       coalesce(sum(footage), 0) / 1000, coalesce(sum(footage_ended), 0) / 1000
FROM (
    SELECT bool_or(a) AS is_active, count(*) FILTER (WHERE a) AS active, count(*) FILTER (WHERE NOT a) AS ended,
           sum(ms) AS footage, sum(ms) FILTER (WHERE NOT a) AS footage_ended
    FROM jobs
    JOIN media_objects m ON m.id = media_object_id
    CROSS JOIN LATERAL (
        SELECT state IN ({_ACTIVE}) AS a,
               CASE WHEN jobs.kind = 'chunk' AND {PLANNED}
                    THEN greatest(0, least(range_end_ms, 1000 * m.duration_seconds) - range_start_ms)
                    ELSE 0
               END AS ms
    ) AS each
    WHERE true{{where}}
    GROUP BY media_object_id
) AS objects
"""


def progress(session: Session, location: str | None = None, *, backfill_id: int | None = None) -> Progress:
    """How far the work is; on a backfill, on a location, or on all footage. Reads all of its jobs."""
    where, parameters = _of(location, backfill_id)
    row = session.execute(sql(_PROGRESS.format(where=where)), parameters).one()
    return Progress(*map(int, row[:4]), *map(float, row[4:]))


def unsummarized(session: Session, location: str | None = None) -> int:
    """How many dirty marks wait for the aggregator; of a location or of all."""
    query = select(func.count()).select_from(DirtyMark)
    if location is not None:
        query = query.join(Location, Location.id == DirtyMark.location_id).where(Location.name == location)
    return session.scalar(query) or 0


_LAG = """
SELECT extract(epoch FROM clock_timestamp() - created_at)
FROM dirty_marks
ORDER BY id
LIMIT 1
"""


def summary_lag(session: Session) -> float:
    """Age of the oldest dirty mark that waits for the aggregator, in seconds; 0 if none waits."""
    return float(session.scalar(sql(_LAG)) or 0.0)


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many jobs of one state and lane there are; pending ones by feed."""

    state: JobState
    lane: Lane
    #: Whether they are pending but not sent, because their source or backfill is paused.
    held: bool
    #: How many, at most the `limit` of `waiting`.
    jobs: int
    #: Age of the oldest pending job in seconds; 0 for other states.
    oldest_seconds: float


def waiting(session: Session, *, limit: int) -> list[Waiting]:
    """How many jobs wait, for metrics. Counts with the partial indexes, at most `limit` of each kind, so that it is
    fast however large the ledger is."""
    rows = session.execute(sql(_WAITING), {"limit": limit})
    return [Waiting(JobState(row.state), Lane(row.lane), row.held, row.jobs, float(row.oldest or 0.0)) for row in rows]


#: The pending jobs of a feed, found by the index that dispatch uses.
_OF_FEED = """
            FROM jobs
            WHERE source_id = known.source_id AND coalesce(backfill_id, 0) = known.backfill_id
              AND lane = known.lane AND state = 'pending' AND NOT alone"""

#: State by state: each has its index.
_OF_STATES = "".join(
    f"""
UNION ALL
SELECT '{state}', lane, false, count(*), NULL
FROM (SELECT lane FROM jobs WHERE state = '{state}' LIMIT :limit) AS part
GROUP BY lane"""
    for state in (JobState.QUEUED, JobState.RUNNING, JobState.RETRY_WAIT, JobState.QUARANTINED)
)

_WAITING = f"""{FEEDS.format(half="NOT alone")}, known AS (
    SELECT feeds.*, sources.paused_at IS NOT NULL OR backfills.paused_at IS NOT NULL AS held
    FROM feeds
    JOIN sources ON sources.id = source_id
    LEFT JOIN backfills ON backfills.id = backfill_id
)
SELECT 'pending' AS state, known.lane, held, counted.jobs,
       extract(epoch FROM clock_timestamp() - first.created_at) AS oldest
FROM known
CROSS JOIN LATERAL (
            SELECT created_at {_OF_FEED}
            ORDER BY id
            LIMIT 1
) AS first
CROSS JOIN LATERAL (
    SELECT count(*) AS jobs
    FROM (
            SELECT {_OF_FEED}
            LIMIT :limit
    ) AS part
) AS counted
UNION ALL
SELECT 'pending', lane, false, count(*), extract(epoch FROM clock_timestamp() - min(created_at))
FROM (SELECT lane, created_at FROM jobs WHERE state = 'pending' AND alone LIMIT :limit) AS part
GROUP BY lane{_OF_STATES}
"""


def get_job(session: Session, job_id: int) -> Job:
    """Raises `MaskwatchError` if there is no job of that number."""
    job = session.get(Job, job_id)
    if job is None:
        raise MaskwatchError(f"there is no job {job_id}; list them: maskwatch jobs list")
    return job
