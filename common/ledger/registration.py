"""Registers objects in the ledger: one media object and one job each; for a video first a probe, then the chunks that
the probe plans. Registering an object again changes nothing; a newer version of a key replaces the older one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, func, select, text, update
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.database.tables import Camera, Job, Location, MediaObject, Pipeline
from common.domain import JobKind, JobState, MaskwatchError, MediaKind, ObservedAt, Reason
from common.ledger import circuit_breaker
from common.ledger.retention import purged_before
from common.ledger.transitions import ANEW, assignments, move, transition
from common.ledger.withdrawal import PLANNED, withdraw
from common.planning import PlannedObject
from common.storage.store import FILE_BUCKET

#: Most characters of a detail that are kept.
DETAIL_LIMIT = 2000

#: Reasons of objects whose time is unknown: only a fitting time pattern helps.
UNPLACED = (Reason.TIME_PATTERN_MISMATCH, Reason.NONEXISTENT_LOCAL_TIME, Reason.FUTURE_TIME, Reason.NO_TIME)

#: Reasons against which no retry helps.
HOPELESS = (*UNPLACED, Reason.PURGED)

#: Held (shared) by transactions that register objects, and (alone) by those that erase objects or correct their place
#: and time.
_REGISTRATION_LOCK = 0x6D77_6572


@dataclass(slots=True)
class Registered:
    """The outcomes of a batch of planned objects."""

    new: int = 0
    known: int = 0
    superseded: int = 0
    quarantined: int = 0
    #: Known objects that belong to another location or camera; they stay there.
    elsewhere: int = 0
    first_elsewhere: str | None = None
    #: Objects that were erased: they are not registered.
    erased: int = 0


def register(
    session: Session,
    planned: Sequence[PlannedObject],
    *,
    location: Location,
    camera: Camera | None,
    pipeline: Pipeline,
    lane: int,
    backfill_id: int | None = None,
    newest: bool = False,
) -> Registered:
    """Put planned objects of one bucket into the ledger: one media object and one job each (a probe for a video).

    Known objects stay as they are, so registering twice changes nothing. A newer version of a key replaces the older
    one: the older one's jobs are cancelled, their rows deleted, and the hours of the rows marked. Bytes that come back
    after another version are analysed again. An object that an earlier pattern could not place in time is analysed if
    the new pattern can. Erased objects are not registered; objects from purged time are quarantined.

    `newest` says that the objects were read just now, whatever their modification times. Without it, a version that was
    modified before the current one is taken for the result of an older listing, and ignored.

    Raises `MaskwatchError` if the location's zone or the camera's location was corrected since they were planned.
    """
    result = Registered()
    if not planned:
        return result
    bucket = planned[0].info.bucket
    check_places(session, location, camera)
    by_key = {item.info.key: item for item in _not_erased(session, planned)}
    result.erased = len(planned) - len(by_key)
    if not by_key:
        return result
    source_id = circuit_breaker.ensure(session, bucket)
    # The modification time of a local file can be set freely, so it doesn't tell which version is newer.
    newest = newest or bucket == FILE_BUCKET
    rows = {
        "rows": _planned_rows(by_key.values(), purged_before(session)),
        "bucket": bucket,
        "source": source_id,
        "location": location.id,
        "camera": camera.id if camera else None,
        "pipeline": pipeline.id,
        "backfill": backfill_id,
        "lane": int(lane),
    }
    while True:
        try:
            with session.begin_nested():
                inserted = _put(session, bucket, by_key, rows, result, newest=newest)
        except _OvertakenError:
            continue
        break
    result.new += len(inserted)
    result.quarantined = sum(state == JobState.QUARANTINED.value for state in inserted.values())
    known = {key: item for key, item in by_key.items() if key not in inserted}
    if known:
        _register_known(session, known, rows, result)
    result.known = len(by_key) - result.new
    placed = [item for item in known.values() if item.reason not in UNPLACED and item.observed_at]
    _replan(session, bucket, placed, location, camera)
    return result


def _register_known(
    session: Session, known: dict[str, PlannedObject], rows: dict[str, Any], result: Registered
) -> None:
    """Give known objects a job of this pipeline if they have none, and restart jobs that `_take_back` may restart."""
    others = session.execute(sql(_ELSEWHERE), {**rows, "known": known_rows(known)}).scalars().all()
    result.elsewhere = len(others)
    result.first_elsewhere = f"{rows['bucket']}/{others[0]}" if others else None
    made = session.execute(sql(_INSERT_JOBS), rows).scalars().all()
    result.new += len(made) + _take_back(session, known, rows)
    result.quarantined += sum(state == JobState.QUARANTINED.value for state in made)


class _OvertakenError(Exception):
    """Another transaction has registered one of the keys since we locked the current versions."""


def _put(
    session: Session,
    bucket: str,
    by_key: dict[str, PlannedObject],
    rows: dict[str, Any],
    result: Registered,
    *,
    newest: bool,
) -> dict[str, str]:
    """Insert new objects and withdraw those that they replace; returns the state of the first job of each new key.

    Raises `_OvertakenError`: then roll back to the savepoint and call it again. Locking another transaction's rows now,
    after our own inserts, could deadlock, because that transaction may wait for our inserts.
    """
    locked, older = _lock_older(session, bucket, by_key, newest=newest)
    revived = 0
    if older:
        _supersede(session, older)
        # Only for a key whose current version was just replaced can an earlier version come back.
        revived = len({row.media_object_id for row in move(session, _REVIVE, rows)})
    inserted: dict[str, str] = {row.key: row.state for row in session.execute(sql(_INSERT), rows)}
    # Inserted by a concurrent transaction after we took our locks: our insert may have had to wait for it.
    others = {key: item for key, item in by_key.items() if key not in inserted and key not in locked}
    if others and session.scalar(sql(_ANY_KNOWN), {"bucket": bucket, "known": known_rows(others)}):
        raise _OvertakenError
    result.superseded, result.new = len(older), revived
    return inserted


#: The planned objects, as rows; `_planned_rows` makes the parameter. One JSON document, because an array per column
#: takes psycopg longer than all the rest of a registration.
_PLANNED_ROWS = """
    json_to_recordset(CAST(:rows AS json)) AS planned (
        key text, etag text, size_bytes bigint, last_modified timestamptz, storage_class text, kind text,
        observed_at timestamptz, observed_at_source text, observed_at_ambiguous boolean,
        job_kind text, reason text, detail text
    )"""

_JOB_COLUMNS = "(media_object_id, source_id, pipeline_id, backfill_id, lane, kind, state, reason, detail, finished_at)"

_FIRST_JOB_OF_MEDIA = """
    SELECT m.id, :source, :pipeline, CAST(:backfill AS bigint), :lane, planned.job_kind,
           CASE WHEN planned.reason IS NULL THEN 'pending' ELSE 'quarantined' END, planned.reason, planned.detail,
           CASE WHEN planned.reason IS NOT NULL THEN clock_timestamp() END"""

#: Inserts new media objects, each with its first job, or with the reason why it can't be done. One statement, because
#: finding the new rows in a second one takes a fifth of the time. Sorted by key, so that transactions that register the
#: same keys wait for each other in one order.
_INSERT = f"""
WITH planned AS MATERIALIZED (
    SELECT *
    FROM {_PLANNED_ROWS}
), m AS (
    INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, storage_class, kind,
                               location_id, camera_id, observed_at, observed_at_source, observed_at_ambiguous)
    SELECT :bucket, key, etag, etag, size_bytes, last_modified, storage_class, kind,
           :location, CAST(:camera AS integer), observed_at, observed_at_source, coalesce(observed_at_ambiguous, false)
    FROM planned
    ORDER BY key COLLATE "C"
    ON CONFLICT DO NOTHING
    RETURNING id, key
), made AS (
    INSERT INTO jobs {_JOB_COLUMNS}
    {_FIRST_JOB_OF_MEDIA}
    FROM m
    JOIN planned USING (key)
    ORDER BY m.key COLLATE "C"
    RETURNING media_object_id, state
)
SELECT m.key, made.state
FROM m
JOIN made ON made.media_object_id = m.id
"""

#: Inserts the first job of known objects, for a pipeline that has none for them.
_INSERT_JOBS = f"""
INSERT INTO jobs {_JOB_COLUMNS}
{_FIRST_JOB_OF_MEDIA}
FROM {_PLANNED_ROWS}
CROSS JOIN LATERAL (
    SELECT id
    FROM media_objects
    WHERE bucket = :bucket AND key = planned.key AND revision = planned.etag AND superseded_at IS NULL
    LIMIT 1
) AS m
ORDER BY planned.key COLLATE "C"
ON CONFLICT DO NOTHING
RETURNING state
"""

#: Keys, the ETags that they are planned with, and the current media object of each; `known_rows` makes the parameter.
#: LIMIT makes Postgres look up each object by itself: a join reads the whole bucket until Postgres has statistics.
KNOWN = """
    json_each_text(CAST(:known AS json)) AS known (key, etag)
    CROSS JOIN LATERAL (
        SELECT *
        FROM media_objects
        WHERE bucket = :bucket AND key = known.key AND superseded_at IS NULL
        LIMIT 1
    ) AS m"""

_ANY_KNOWN = f"SELECT EXISTS (SELECT FROM {KNOWN})"

_ELSEWHERE = f"""
SELECT m.key
FROM {KNOWN}
WHERE m.revision = known.etag
  AND (m.location_id, m.camera_id) IS DISTINCT FROM (:location, CAST(:camera AS integer))
ORDER BY m.id
"""


def known_rows(items: Mapping[str, PlannedObject]) -> str:
    """The parameter of `KNOWN`."""
    return json.dumps({key: item.info.etag for key, item in items.items()})


def _planned_rows(items: Iterable[PlannedObject], purged: datetime | None) -> str:
    """The parameter of `_PLANNED_ROWS`. What is missing in a row is NULL."""
    return json.dumps([_planned_row(item, purged) for item in items])


def _planned_row(item: PlannedObject, purged: datetime | None) -> dict[str, Any]:
    info, seen = item.info, item.observed_at
    row: dict[str, Any] = {
        "key": info.key,
        "etag": info.etag,
        "size_bytes": info.size_bytes,
        "last_modified": info.last_modified.isoformat(),
        "kind": item.kind.value,
        "job_kind": _FIRST_JOB[item.kind].value,
    }
    if info.storage_class is not None:
        row["storage_class"] = info.storage_class
    if seen is not None:
        row["observed_at"] = seen.instant.isoformat()
        row["observed_at_source"] = seen.source.value
        row["observed_at_ambiguous"] = seen.ambiguous
    reason, detail = _refused(item, purged)
    if reason is not None:
        row |= {"reason": reason.value, "detail": storable(detail)}
    return row


_FIRST_JOB = {MediaKind.IMAGE: JobKind.IMAGE, MediaKind.VIDEO: JobKind.PROBE}


def _refused(item: PlannedObject, purged: datetime | None) -> tuple[Reason | None, str | None]:
    """The reason and detail why an object can't be analysed; None and None if it can."""
    seen = item.observed_at
    if item.reason not in UNPLACED and purged is not None and seen is not None and seen.instant < purged:
        return Reason.PURGED, f"{item.info.uri}: {purged_detail(seen.instant, purged)}"
    return item.reason, item.detail


def purged_detail(seen_at: datetime, purged: datetime) -> str:
    """The detail of a job that is refused because its footage is from purged time."""
    return f"seen at {seen_at:%Y-%m-%d %H:%M:%S} UTC, and everything before {purged:%Y-%m-%d} was purged"


def storable(detail: str | None) -> str | None:
    """Postgres text can't hold NUL; longer details are cut at `DETAIL_LIMIT`."""
    return None if detail is None else detail.replace("\0", "\\0")[:DETAIL_LIMIT]


def _not_erased(session: Session, planned: Sequence[PlannedObject]) -> list[PlannedObject]:
    """The planned objects without those that were erased."""
    if not session.scalar(text("SELECT EXISTS (SELECT FROM erased_objects)")):
        return list(planned)
    by_hash = {uri_hash(item.info.uri): item for item in planned}
    erased = session.execute(
        text("SELECT uri_sha256 FROM erased_objects WHERE uri_sha256 = ANY(:hashes)"), {"hashes": list(by_hash)}
    ).scalars()
    gone = set(map(bytes, erased))
    return [item for digest, item in by_hash.items() if digest not in gone]


def uri_hash(uri: str) -> bytes:
    """The hash that is kept of an erased object's URI, so that the object is not registered again."""
    return hashlib.sha256(uri.encode()).digest()


def keep_from_erasing(session: Session) -> None:
    """Call it in a transaction that registers media objects, before it locks any. An erasure or a correction then waits
    for this transaction, or this transaction waits for it and then sees its result."""
    session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _REGISTRATION_LOCK})


def keep_from_registering(session: Session) -> None:
    """Keep all other transactions from registering objects until this one ends. Call it after locking cameras and
    backfills, and before locking media objects."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _REGISTRATION_LOCK})


def check_places(session: Session, location: Location, camera: Camera | None) -> None:
    """Raise `MaskwatchError` if the location's zone or the camera's location was corrected since these were read. Until
    this transaction ends, nobody can correct them."""
    keep_from_erasing(session)
    zone = session.scalar(select(Location.time_zone).where(Location.id == location.id))
    place = location.id
    if camera is not None:
        place = session.scalar(select(Camera.location_id).where(Camera.id == camera.id)) or 0
    if (zone, place) != (location.time_zone, location.id):
        raise MaskwatchError(
            f"{location.name!r} or its camera was corrected during this listing; check maskwatch locations list and "
            "maskwatch cameras list, then give the command again with the corrected options"
        )


def _lock_older(
    session: Session, bucket: str, by_key: dict[str, PlannedObject], *, newest: bool
) -> tuple[set[str], list[int]]:
    """Lock the current versions of these keys; returns which keys have a current version, and the ids of those that
    planned versions replace.

    A version that is listed with a later time was uploaded again: older versions must not replace it.
    """
    current = session.execute(sql(_LOCK_CURRENT), {"bucket": bucket, "known": known_rows(by_key)}).all()
    again = {
        media_id: by_key[key].info.last_modified
        for media_id, key, revision, modified in current
        if revision == by_key[key].info.etag and modified < by_key[key].info.last_modified
    }
    if again:
        session.execute(sql(_SEEN_AGAIN), {"ids": list(again), "times": list(again.values())})
    older = [
        media_id
        for media_id, key, revision, modified in current
        if revision != by_key[key].info.etag and (newest or modified <= by_key[key].info.last_modified)
    ]
    return {key for _, key, _, _ in current}, older


_LOCK_CURRENT = f"""
WITH found AS MATERIALIZED (
    SELECT m.id
    FROM {KNOWN}
)
SELECT id, key, revision, last_modified
FROM media_objects
WHERE id IN (SELECT id FROM found) AND superseded_at IS NULL
ORDER BY id
FOR UPDATE
"""

_SEEN_AGAIN = """
UPDATE media_objects
SET last_modified = seen.modified
FROM unnest(CAST(:ids AS bigint[]), CAST(:times AS timestamptz[])) AS seen (id, modified)
WHERE media_objects.id = seen.id
"""


def _supersede(session: Session, media_ids: Sequence[int]) -> None:
    session.execute(
        update(MediaObject).where(MediaObject.id.in_(media_ids)).values(superseded_at=func.clock_timestamp())
    )
    withdraw(session, media_ids, "a newer version of the key was registered")


#: For bytes that were replaced and are back: their media object is current again, and its jobs start again. Only for
#: keys without a current version, which `_supersede` has just replaced. The probe plans the chunks again, perhaps with
#: another length or start of the recording.
_REVIVE = transition(
    (JobState.CANCELLED, JobState.SOURCE_CHANGED),
    JobState.PENDING,
    """
    FROM jobs
    JOIN back ON back.id = jobs.media_object_id
    WHERE jobs.kind <> 'chunk'
    """,
    sets=ANEW,
    before=f"""
gone AS MATERIALIZED (
    SELECT old.id, planned.last_modified
    FROM {_PLANNED_ROWS}
    CROSS JOIN LATERAL (
        SELECT id
        FROM media_objects
        WHERE bucket = :bucket AND key = planned.key AND revision = planned.etag AND superseded_at IS NOT NULL
          AND NOT EXISTS (
              SELECT
              FROM media_objects c
              WHERE c.bucket = :bucket AND c.key = planned.key AND c.superseded_at IS NULL
          )
        LIMIT 1
    ) AS old
), back AS (
    UPDATE media_objects m
    SET superseded_at = NULL, last_modified = gone.last_modified
    FROM gone
    WHERE m.id = gone.id AND m.superseded_at IS NOT NULL
    RETURNING m.id
)""",
    returning=("id", "media_object_id"),
    select="SELECT media_object_id FROM moved",
)


def _replan(
    session: Session, bucket: str, placed: Sequence[PlannedObject], location: Location, camera: Camera | None
) -> None:
    """Set the time of objects that no pattern could place in time before, and start their jobs.

    Only for objects of this location and camera: another location's zone would give another time. Jobs of other
    pipelines, which have analysed such an object without a pattern, have another time, and start again.
    """
    if not placed:
        return
    stuck = session.execute(
        select(MediaObject.id, MediaObject.key)
        .where(
            MediaObject.bucket == bucket,
            MediaObject.key.in_([item.info.key for item in placed]),
            MediaObject.superseded_at.is_(None),
            MediaObject.location_id == location.id,
            MediaObject.camera_id.is_not_distinct_from(camera.id if camera else None),
            select(Job.id)
            .where(Job.media_object_id == MediaObject.id, Job.state == JobState.QUARANTINED, Job.reason.in_(UNPLACED))
            .exists(),
        )
        .order_by(MediaObject.id)
        .with_for_update()
    ).all()
    if not stuck:
        return
    by_key = {item.info.key: item for item in placed}
    for media_id, key in stuck:
        seen = by_key[key].observed_at
        assert seen is not None
        set_observed_at(session, media_id, seen)
    media_ids = [media_id for media_id, _ in stuck]
    withdraw(session, media_ids, "the time in its key is known now", respect_cancelled=True)
    move(session, _PLACED_AT_LAST, {"ids": media_ids})


_PLACED_AT_LAST = transition(
    (JobState.CANCELLED,),
    JobState.PENDING,
    """
    FROM jobs
    WHERE jobs.media_object_id = ANY(:ids) AND jobs.reason = 'superseded' AND jobs.kind <> 'chunk'
    """,
    sets=ANEW,
)


def _take_back(session: Session, known: dict[str, PlannedObject], rows: dict[str, Any]) -> int:
    """→ pending for known objects that were in an archive and can be read now, and for those that were cancelled with
    their backfill; returns how many objects."""
    parameters = {
        **{name: rows[name] for name in ("bucket", "pipeline", "backfill")},
        "known": known_rows(known),
        # Usually empty.
        "archived": [key for key, item in known.items() if item.info.archived],
    }
    return len({row.media_object_id for row in move(session, _TAKE_BACK, parameters)})


_TAKE_BACK = transition(
    (JobState.CANCELLED, JobState.QUARANTINED, JobState.RETRY_WAIT),
    JobState.PENDING,
    """
    FROM jobs
    JOIN found ON found.id = jobs.media_object_id
    WHERE ((jobs.state = 'cancelled' AND jobs.reason = 'cancelled_with_backfill' AND jobs.pipeline_id = :pipeline)
           OR (jobs.state IN ('quarantined', 'retry_wait') AND jobs.reason = 'archived'
               AND found.key <> ALL(:archived)))
    """,
    sets={**ANEW, "backfill_id": "coalesce(:backfill, jobs.backfill_id)"},
    before=f"""
found AS MATERIALIZED (
    SELECT m.id, m.key
    FROM {KNOWN}
)""",
    returning=("id", "media_object_id"),
    select="SELECT media_object_id FROM moved",
)


def set_observed_at(session: Session, media_id: int, seen: ObservedAt) -> None:
    """Store when the camera saw an object: the instant, its source, and whether the local time occurred twice."""
    session.execute(
        update(MediaObject)
        .where(MediaObject.id == media_id)
        .values(observed_at=seen.instant, observed_at_source=seen.source, observed_at_ambiguous=seen.ambiguous)
    )


_PLANNED_ANEW = assignments(
    (JobState.CANCELLED, JobState.SOURCE_CHANGED),
    JobState.PENDING,
    {**ANEW, "backfill_id": "excluded.backfill_id", "lane": "excluded.lane"},
)

#: Inserts the chunks of a video, unless it has a plan. Chunks of a withdrawn plan are planned again.
_INSERT_CHUNKS = f"""
INSERT INTO jobs (media_object_id, source_id, pipeline_id, backfill_id, kind, lane, range_start_ms, range_end_ms)
SELECT :media, :source, :pipeline, :backfill, 'chunk', :lane, start_ms, end_ms
FROM unnest(CAST(:starts AS bigint[]), CAST(:ends AS bigint[])) AS planned (start_ms, end_ms)
WHERE NOT EXISTS (
    SELECT
    FROM jobs
    WHERE media_object_id = :media AND pipeline_id = :pipeline AND kind = 'chunk' AND {PLANNED}
)
ORDER BY start_ms
ON CONFLICT (media_object_id, pipeline_id, kind, range_start_ms, range_end_ms)
DO UPDATE SET {_PLANNED_ANEW}
WHERE jobs.state IN ('cancelled', 'source_changed')
"""


def insert_chunks(session: Session, ranges_ms: Sequence[tuple[int, int]], **of: int | None) -> int:
    """Plan the chunks of a video for one pipeline; returns how many are new. `ranges_ms`: half-open ranges of the
    file's own time. `of`: media, source, pipeline, backfill, lane."""
    starts, ends = [start for start, _ in ranges_ms], [end for _, end in ranges_ms]
    result = session.execute(sql(_INSERT_CHUNKS), {**of, "starts": starts, "ends": ends})
    assert isinstance(result, CursorResult)
    return result.rowcount
