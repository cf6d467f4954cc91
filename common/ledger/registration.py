"""What is found in a bucket goes into the ledger: one media object and one job each; of a video its probe, then the
chunks that the probe plans. Once, whoever registers it how often; and a newer version takes the place of the older."""

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

#: How much of an error's text is kept.
DETAIL_LIMIT = 2000

#: Reasons of objects whose time is unknown: only a pattern that fits can help them.
UNPLACED = (Reason.TIME_PATTERN_MISMATCH, Reason.NONEXISTENT_LOCAL_TIME, Reason.FUTURE_TIME)

#: Reasons that no retry helps against.
HOPELESS = (*UNPLACED, Reason.PURGED)

#: Held by transactions that register objects (shared), and that erase some or correct where and when they are counted.
_REGISTRATION_LOCK = 0x6D77_6572


@dataclass(slots=True)
class Registered:
    """What became of a batch of planned objects."""

    new: int = 0
    known: int = 0
    superseded: int = 0
    quarantined: int = 0
    #: Known objects that belong to another location or camera; they stay there.
    elsewhere: int = 0
    first_elsewhere: str | None = None
    #: Objects that somebody has erased: they stay out.
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
    """Put planned objects of one bucket into the ledger: one media object and one job each, of a video its probe.

    Whatever is known already stays as it is, so registering twice changes nothing. A newer version of a key
    takes the place of the older one: its jobs are cancelled, its rows deleted, its hours marked. Bytes that
    come back after another version are analysed again. An object that an earlier pattern could not place in
    time gets its second chance when the new one can. What was erased stays out; what was seen in purged time is
    quarantined.

    `newest` says that the objects were just looked at, whatever their times say; without it a version that was
    modified before the current one is taken for a listing that another producer has overtaken.

    Raises `MaskwatchError` if the location's zone, or the camera's place, is no longer what they were planned with.
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
    # The time of a local file is whatever its writer set, so it tells nothing of the order.
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
    """What is known gets a job of this pipeline if it has none, and its turn if it was taken back."""
    others = session.execute(sql(_ELSEWHERE), {**rows, "known": known_rows(known)}).scalars().all()
    result.elsewhere = len(others)
    result.first_elsewhere = f"{rows['bucket']}/{others[0]}" if others else None
    made = session.execute(sql(_INSERT_JOBS), rows).scalars().all()
    result.new += len(made) + _take_back(session, known, rows)
    result.quarantined += sum(state == JobState.QUARANTINED.value for state in made)


class _OvertakenError(Exception):
    """Another transaction has registered a key since we locked the versions that were there."""


def _put(
    session: Session,
    bucket: str,
    by_key: dict[str, PlannedObject],
    rows: dict[str, Any],
    result: Registered,
    *,
    newest: bool,
) -> dict[str, str]:
    """Put in what is new, in place of what it replaces; returns the state of the first job of each key that is new.

    Raises `_OvertakenError`, to be begun anew from a savepoint: to lock another transaction's rows now, behind our own
    inserts that it may wait for, would close a circle.
    """
    locked, older = _lock_older(session, bucket, by_key, newest=newest)
    revived = 0
    if older:
        _supersede(session, older)
        # Only a key that has just lost its current version can get an earlier one back.
        revived = len({row.media_object_id for row in move(session, _REVIVE, rows)})
    inserted: dict[str, str] = {row.key: row.state for row in session.execute(sql(_INSERT), rows)}
    # Inserted by a concurrent transaction after we took our locks: our insert may have had to wait for it.
    others = {key: item for key, item in by_key.items() if key not in inserted and key not in locked}
    if others and session.scalar(sql(_ANY_KNOWN), {"bucket": bucket, "known": known_rows(others)}):
        raise _OvertakenError
    result.superseded, result.new = len(older), revived
    return inserted


#: What is planned, as rows; `_planned_rows` fills it. In one document, because an array per column takes psycopg longer
#: than all the rest of a registration.
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

#: What is new, with the first job of each: what it is, and why it can't be done, if so. In one statement, because to
#: find the rows of the one in the next takes a fifth of the time. Whoever registers the same keys waits in one order.
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

#: The first job of what is known, for a pipeline that has not been given it.
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

#: Keys, the ETags that they are planned with, and the current media object of each; `known_rows` fills it. Object by
#: object (LIMIT makes it so): a join reads all of the bucket, as long as Postgres has not noticed how much lies in it.
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
    """Why an object can't be analysed, if so."""
    seen = item.observed_at
    if item.reason not in UNPLACED and purged is not None and seen is not None and seen.instant < purged:
        return Reason.PURGED, f"{item.info.uri}: {purged_detail(seen.instant, purged)}"
    return item.reason, item.detail


def purged_detail(seen_at: datetime, purged: datetime) -> str:
    """Why footage of purged time is refused."""
    return f"seen at {seen_at:%Y-%m-%d %H:%M:%S} UTC, and everything before {purged:%Y-%m-%d} was purged"


def storable(detail: str | None) -> str | None:
    """Postgres text can't hold NUL; longer details are cut at `DETAIL_LIMIT`."""
    return None if detail is None else detail.replace("\0", "\\0")[:DETAIL_LIMIT]


def _not_erased(session: Session, planned: Sequence[PlannedObject]) -> list[PlannedObject]:
    """Those that nobody has erased."""
    if not session.scalar(text("SELECT EXISTS (SELECT FROM erased_objects)")):
        return list(planned)
    by_hash = {uri_hash(item.info.uri): item for item in planned}
    erased = session.execute(
        text("SELECT uri_sha256 FROM erased_objects WHERE uri_sha256 = ANY(:hashes)"), {"hashes": list(by_hash)}
    ).scalars()
    gone = set(map(bytes, erased))
    return [item for digest, item in by_hash.items() if digest not in gone]


def uri_hash(uri: str) -> bytes:
    """What is kept of an erased object, so that it stays out."""
    return hashlib.sha256(uri.encode()).digest()


def keep_from_erasing(session: Session) -> None:
    """Of a transaction that registers media objects, before it locks any: an erasure or a correction waits for it, or
    it waits for them and then sees what they did."""
    session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _REGISTRATION_LOCK})


def keep_from_registering(session: Session) -> None:
    """Nobody registers anything until this transaction ends. Before media objects are locked, behind cameras and
    backfills."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _REGISTRATION_LOCK})


def check_places(session: Session, location: Location, camera: Camera | None) -> None:
    """Raise `MaskwatchError` if the location's zone or the camera's place was corrected since these were read; nobody
    corrects them until this transaction ends."""
    keep_from_erasing(session)
    zone = session.scalar(select(Location.time_zone).where(Location.id == location.id))
    place = location.id
    if camera is not None:
        place = session.scalar(select(Camera.location_id).where(Camera.id == camera.id)) or 0
    if (zone, place) != (location.time_zone, location.id):
        raise MaskwatchError(
            f"{location.name!r} or its camera was corrected while this was listed, and what is registered with it: see "
            "maskwatch locations list and maskwatch cameras list, and give the command again with what is right"
        )


def _lock_older(
    session: Session, bucket: str, by_key: dict[str, PlannedObject], *, newest: bool
) -> tuple[set[str], list[int]]:
    """Lock the current versions of these keys; returns which keys have one, and those that the planned ones are to
    replace.

    A version that is seen again with a later time was put again: what is older than that must not replace it.
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


#: Bytes that were replaced and are back: their media object is current again, its jobs start over. Only a key without a
#: current version is concerned, which is one that `_supersede` has just dealt with. Chunks are planned anew by the
#: probe, perhaps with another length or start of the recording.
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
    select="SELECT media_object_id FROM moved",
)


def _replan(
    session: Session, bucket: str, placed: Sequence[PlannedObject], location: Location, camera: Camera | None
) -> None:
    """Give objects that no pattern could place in time, and now one can, their time and their turn.

    Only those of this location and camera: another's zone would read the key as another time. What another pipeline
    has made of such an object without a pattern, or is about to, stands at another time, and starts over.
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
    """→ pending for known objects that lay in an archive and can be read now, and for those that were cancelled with
    their backfill; returns how many objects that were."""
    parameters = {
        **{name: rows[name] for name in ("bucket", "pipeline", "backfill")},
        "known": known_rows(known),
        # Mostly none.
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
    select="SELECT media_object_id FROM moved",
)


def set_observed_at(session: Session, media_id: int, seen: ObservedAt) -> None:
    """When the camera saw an object: an instant, where it comes from, and whether it was one of two."""
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

#: The chunks of a video, unless it has a plan. Chunks of a plan that was withdrawn are planned again.
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
    """Plan the chunks of a video for one pipeline, half-open ranges of the file's own time; returns how many are new.
    `of`: media, source, pipeline, backfill, lane."""
    starts, ends = [start for start, _ in ranges_ms], [end for _, end in ranges_ms]
    result = session.execute(sql(_INSERT_CHUNKS), {**of, "starts": starts, "ends": ends})
    assert isinstance(result, CursorResult)
    return result.rowcount
