"""Corrects the place and time at which an object is counted: the rows of its jobs move with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.database.tables import Location
from common.domain import AttemptOutcome, JobState, ObservedAt, Reason
from common.ledger.operators import THESE_JOBS
from common.ledger.registration import UNPLACED, storable
from common.ledger.retention import PURGED_BEFORE_SQL
from common.ledger.transitions import ANEW, Attempt, move, transition
from common.ledger.withdrawal import delete_rows, withdraw


@dataclass(frozen=True, slots=True)
class Placement:
    """The time at which an object counts from now on, or the reason why there is none."""

    media_object_id: int
    #: None while the time is not known.
    seen: ObservedAt | None
    #: How far its rows move in time.
    shift: timedelta
    #: Why the object can't be counted.
    reason: Reason | None = None
    detail: str | None = None


#: The placements, as rows.
_PLACEMENTS = """
    json_to_recordset(CAST(:rows AS json)) AS placed (
        id bigint, at timestamptz, source text, ambiguous boolean, shift bigint, reason text, detail text
    )"""

_OF_MEDIA = f"""
SELECT jobs.id
FROM {_PLACEMENTS}
JOIN jobs ON jobs.media_object_id = placed.id
"""

_MARK = f"""
INSERT INTO dirty_marks (location_id, pipeline_id, hour)
SELECT DISTINCT location_id, pipeline_id, hour
FROM frame_counts
WHERE job_id IN ({_OF_MEDIA}) AND hour >= {PURGED_BEFORE_SQL}
"""

#: Changes the token, so that a worker that runs one of these jobs is refused.
_STOP = transition(
    (JobState.QUEUED, JobState.RUNNING),
    JobState.PENDING,
    f"""
    FROM jobs
    WHERE jobs.id IN ({_OF_MEDIA})
    """,
    sets={"attempt": "jobs.attempt - (held.state = 'running')::int"},
    attempt=Attempt(AttemptOutcome.RELEASED, detail=":detail"),
)

#: Jobs that were withdrawn because the time of their object is not known any more.
_LOSE_PLACE = transition(
    (JobState.CANCELLED,),
    JobState.QUARANTINED,
    f"""
    FROM {_PLACEMENTS}
    JOIN jobs ON jobs.media_object_id = placed.id
    WHERE placed.reason IS NOT NULL AND jobs.reason = 'superseded' AND jobs.kind <> 'chunk'
    """,
    keep=("placed.reason AS new_reason", "placed.detail AS new_detail"),
    sets={"reason": "held.new_reason", "detail": "held.new_detail"},
)

_MOVE_COUNTS = f"""
UPDATE frame_counts
SET location_id = :location,
    hour = CASE jobs.kind
               WHEN 'image' THEN date_trunc('hour', placed.at, :zone)
               ELSE hour + shift * interval '1 microsecond'
           END
FROM {_PLACEMENTS}
JOIN jobs ON jobs.media_object_id = placed.id
WHERE job_id = jobs.id AND hour >= {PURGED_BEFORE_SQL}
"""

_MOVE_FACES = f"""
UPDATE faces
SET location_id = :location,
    observed_at = observed_at + shift * interval '1 microsecond'
FROM {_PLACEMENTS}
JOIN jobs ON jobs.media_object_id = placed.id
WHERE job_id = jobs.id AND (shift <> 0 OR location_id <> :location) AND observed_at >= {PURGED_BEFORE_SQL}
"""

_MOVE_OBJECTS = f"""
UPDATE media_objects m
SET location_id = :location,
    observed_at = placed.at,
    observed_at_source = placed.source,
    observed_at_ambiguous = coalesce(placed.ambiguous, false)
FROM {_PLACEMENTS}
WHERE m.id = placed.id
"""


def correct(session: Session, placements: Sequence[Placement], location: Location, *, detail: str) -> list[int]:
    """Count these media objects at another location or time; returns the ids of the jobs that start again.

    The rows of their jobs move with them, and the hours before and after are marked. Chunks that would be split between
    hours, or would reach into purged time, start again. Rows in purged hours stay. A worker that runs one of the jobs
    is refused. Call it in the transaction that changes the location or the camera, after `lock_footage`.
    """
    rows = {
        "rows": json.dumps([_placement_row(item) for item in placements]),
        "location": location.id,
        "zone": location.time_zone,
        "unplaced": list(UNPLACED),
    }
    session.execute(sql(_MARK), rows)
    move(session, _STOP, {"rows": rows["rows"], "detail": detail})
    lost = [item.media_object_id for item in placements if item.reason is not None]
    if lost:
        withdraw(session, lost, detail, respect_cancelled=True)
        move(session, _LOSE_PLACE, {"rows": rows["rows"]})
    again = sorted(row.id for row in move(session, _COUNT_AGAIN, rows))
    delete_rows(session, THESE_JOBS, {"ids": again}, keep_purged=True)
    for statement in (_MOVE_COUNTS, _MOVE_FACES, _MOVE_OBJECTS, _MARK):
        session.execute(sql(statement), rows)
    return again


def lock_footage(session: Session, *, location_id: int | None = None, camera_id: int | None = None) -> None:
    """Lock all media objects and jobs of a location or a camera, in the order that all transactions use: until this
    transaction ends, no other one ends, plans or replaces any of them. Call it after `keep_from_registering`."""
    chosen, parameters = (
        ("location_id = :id", {"id": location_id}) if camera_id is None else ("camera_id = :id", {"id": camera_id})
    )
    for query in (
        f"SELECT id FROM media_objects WHERE {chosen} ORDER BY id FOR UPDATE",
        f"SELECT id FROM jobs WHERE media_object_id IN (SELECT id FROM media_objects WHERE {chosen})"
        " ORDER BY id FOR UPDATE",
    ):
        session.execute(text(f"SELECT count(*) FROM ({query}) AS locked"), parameters)


def _placement_row(item: Placement) -> dict[str, Any]:
    row: dict[str, Any] = {"id": item.media_object_id, "shift": item.shift // timedelta(microseconds=1)}
    if item.seen is not None:
        row |= {"at": item.seen.instant.isoformat(), "source": item.seen.source.value, "ambiguous": item.seen.ambiguous}
    if item.reason is not None:
        row |= {"reason": item.reason.value, "detail": storable(item.detail)}
    return row


#: Whether an hour of a chunk's counts would be split between hours, or would move into purged time.
_TORN = f"""EXISTS (
          SELECT
          FROM frame_counts c
          WHERE c.job_id = jobs.id AND c.hour >= {PURGED_BEFORE_SQL}
            AND (date_trunc('hour', c.hour + moved_by, :zone) <> c.hour + moved_by
                 OR c.hour + moved_by < {PURGED_BEFORE_SQL})
      )"""

#: Jobs whose object could not be placed in time and now can, and chunks whose counts can't move. A job that was
#: quarantined for the key's time starts again only if the new time is the key's.
_COUNT_AGAIN = transition(
    (JobState.QUARANTINED, JobState.SUCCEEDED),
    JobState.PENDING,
    f"""
    FROM {_PLACEMENTS}
    CROSS JOIN LATERAL (SELECT shift * interval '1 microsecond' AS moved_by) AS step
    JOIN jobs ON jobs.media_object_id = placed.id
    WHERE placed.reason IS NULL AND placed.at IS NOT NULL
      AND ((jobs.state = 'quarantined'
            AND ((jobs.reason = ANY(:unplaced) AND placed.source = 'key_pattern')
                 OR (jobs.reason = 'purged' AND placed.shift <> 0)))
           OR (jobs.state = 'succeeded' AND jobs.kind = 'chunk'
               AND ((jobs.reason = 'purged' AND placed.shift <> 0) OR {_TORN})))
    """,
    sets=ANEW,
)
