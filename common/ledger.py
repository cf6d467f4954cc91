"""The ledger: the state machine of jobs and all its SQL. Nothing else writes to `jobs`.

    pending         to be sent. From: registration, a due retry, a lost lease or message, an operator's retry or rerun
    queued          a message with this job's id and token is on its way to a worker
    running         a worker holds the lease and the token
    retry_wait      a transient error, or only a newer version can do it; pending again at `next_run_at`
    succeeded       final: its faces, frame counts and dirty marks were written in the same transaction. Only an
                    operator's rerun, which removes them again, and a newer version of the key lead out of it
    quarantined     needs a person; `reason` and `detail` say why
    source_changed  the object was replaced after planning; the new version has a job of its own
    cancelled       an operator's wish (and back by his retry, or of a whole backfill by another one), or a newer
                    version of the key took its place

Every transition changes `token`. Every write of a worker names id and token and requires the state
`running`: a worker that was paused past its lease, or whose job was cancelled, gets `StaleJobError` and its
transaction rolls back. That is the fence. Leases are judged by the database's clock alone.

A source that refuses everything pauses itself (`common/sources.py`): its pending jobs are passed over, and those it
refused wait for their turn instead of filling the quarantine.

Every function receives a session and leaves the commit to its caller. Media objects are locked before their jobs,
jobs before their sources, and rows of one table in the order of their ids; what is registered goes in, in the order
of its keys, behind all of these. So no two of these transactions deadlock.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, func, select, text, update
from sqlalchemy.orm import Session

from common import audit, sources
from common.database import sql
from common.domain import (
    ACTIVE_STATES,
    REFUSALS,
    AttemptOutcome,
    JobKind,
    JobState,
    Lane,
    MaskwatchError,
    MediaKind,
    ObservedAt,
    ObservedAtSource,
    PausePolicy,
    PipelineSpec,
    Reason,
    VideoInfo,
)
from common.planning import PlannedObject
from common.retention import PURGED_BEFORE_SQL, purged_before
from common.storage import FILE_BUCKET
from common.tables import Camera, DirtyMark, Job, Location, MediaObject, Pipeline

#: How much of an error's text is kept.
DETAIL_LIMIT = 2000


#: Reasons of objects whose time is unknown: only a pattern that fits can help them.
UNPLACED = (Reason.TIME_PATTERN_MISMATCH, Reason.NONEXISTENT_LOCAL_TIME, Reason.FUTURE_TIME)

#: Reasons that no retry helps against.
HOPELESS = (*UNPLACED, Reason.PURGED)

#: Of cancelled jobs: by whom. One by one, a job stays cancelled until he takes it back; with its backfill, until
#: another one comes upon its object.
_WISHED = "reason IN ('cancelled_by_operator', 'cancelled_with_backfill')"

#: Whether a chunk belongs to the plan of its video as it stands: those of a withdrawn version's plan don't. One that an
#: operator has cancelled does: its neighbours must not do its part.
_PLANNED = f"({{jobs}}.state NOT IN ('cancelled', 'source_changed') OR {{jobs}}.{_WISHED})"

_ACTIVE = ", ".join(f"'{state.value}'" for state in ACTIVE_STATES)

#: Held by transactions that register objects (shared), and that erase some or correct where and when they are counted.
_REGISTRATION_LOCK = 0x6D77_6572


class StaleJobError(Exception):
    """The job is no longer this worker's: its token or state has changed. Nothing may be written."""


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job and the token its holder believes in: all that a message carries."""

    id: int
    token: uuid.UUID


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker holds, with what it needs to know to do it."""

    ref: JobRef
    kind: JobKind
    attempt: int
    media_object_id: int
    source_id: int
    bucket: str
    key: str
    etag: str
    size_bytes: int
    last_modified: datetime
    #: Of an image or a probe, the time in the key if it has one; of a chunk, the start of the recording.
    observed_at: ObservedAt | None
    location_id: int
    time_zone: str
    camera_id: int | None
    pipeline_id: int
    backfill_id: int | None
    lane: Lane
    #: The pipeline's, as it is stored; `spec` reads it.
    stored_spec: dict[str, Any]
    #: Half-open range of a chunk, in ms of the file's own time; 0 and 0 for others.
    range_start_ms: int = 0
    range_end_ms: int = 0
    #: The last chunk of its video: it goes on to the end of the file.
    last: bool = False
    #: Of a chunk's video, by its header.
    duration_seconds: float | None = None
    #: From its being sent to its being claimed.
    queued_seconds: float = 0.0

    @property
    def spec(self) -> PipelineSpec:
        """Raises `UnknownSpecError` where a newer version has made the pipeline: the job is to be given back."""
        return PipelineSpec.from_dict(self.stored_spec)

    @property
    def uri(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def key_time(self) -> ObservedAt | None:
        """The time in the key, if it has one: what a newer version of the object is planned with, too."""
        seen = self.observed_at
        return seen if seen is not None and seen.source is ObservedAtSource.KEY_PATTERN else None


# --- registration -----------------------------------------------------------------------------------------


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
    lane: Lane,
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
    source_id = sources.ensure(session, bucket)
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
        "lane": lane.value,
    }
    while True:
        try:
            with session.begin_nested():
                inserted = _put(session, bucket, by_key, rows, result, newest=newest)
        except _OvertakenError:
            continue
        break
    known = {key: item for key, item in by_key.items() if key not in inserted}
    result.new += len(inserted)
    result.quarantined = sum(state == JobState.QUARANTINED.value for state in inserted.values())
    if known:
        elsewhere = session.execute(
            text(
                f"SELECT m.key FROM {_KNOWN} WHERE m.revision = known.etag AND (m.location_id, m.camera_id)"
                " IS DISTINCT FROM (:location, CAST(:camera AS integer)) ORDER BY m.id"
            ),
            {**rows, "known": _known(known)},
        ).scalars()
        others = elsewhere.all()
        result.elsewhere = len(others)
        result.first_elsewhere = f"{bucket}/{others[0]}" if others else None
        made = session.execute(text(_INSERT_JOBS), rows).scalars().all()
        result.new += len(made) + _take_back(session, bucket, known, pipeline, backfill_id)
        result.quarantined += sum(state == JobState.QUARANTINED.value for state in made)
    result.known = len(by_key) - result.new
    placed = [item for item in known.values() if item.reason not in UNPLACED and item.observed_at]
    _replan(session, bucket, placed, location, camera)
    return result


class _OvertakenError(Exception):
    """Another has registered a key since we locked the versions that were there."""


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

    Raises `_OvertakenError`, to be begun anew from a savepoint: to lock another's rows now, behind our own inserts that
    he may wait for, would close a circle.
    """
    locked, older = _lock_older(session, bucket, by_key, newest=newest)
    revived = 0
    if older:
        _supersede(session, older)
        # Only a key that has just lost its current version can get an earlier one back.
        revived = _revive(session, rows)
    inserted: dict[str, str] = {row.key: row.state for row in session.execute(text(_INSERT), rows)}
    # There, not by us, and not there before: the insert may have had to wait for him.
    others = {key: item for key, item in by_key.items() if key not in inserted and key not in locked}
    if others and session.scalar(
        text(f"SELECT EXISTS (SELECT FROM {_KNOWN})"), {"bucket": bucket, "known": _known(others)}
    ):
        raise _OvertakenError
    result.superseded, result.new = len(older), revived
    return inserted


#: What is planned, as rows; `_planned_rows` fills it. In one document, because an array per column takes psycopg longer
#: than all the rest of a registration.
_PLANNED_ROWS = (
    "json_to_recordset(CAST(:rows AS json)) AS planned (key text, etag text, size_bytes bigint,"
    " last_modified timestamptz, storage_class text, kind text, observed_at timestamptz, observed_at_source text,"
    " observed_at_ambiguous boolean, job_kind text, reason text, detail text)"
)

_JOB_COLUMNS = "(media_object_id, source_id, pipeline_id, backfill_id, lane, kind, state, reason, detail, finished_at)"

_FIRST_JOB_OF_MEDIA = (
    "m.id, :source, :pipeline, CAST(:backfill AS bigint), :lane, planned.job_kind,"
    " CASE WHEN planned.reason IS NULL THEN 'pending' ELSE 'quarantined' END, planned.reason, planned.detail,"
    " CASE WHEN planned.reason IS NOT NULL THEN clock_timestamp() END"
)

#: What is new, with the first job of each: what it is, and why it can't be done, if so. In one statement, because to
#: find the rows of the one in the next takes a fifth of the time.
_INSERT = (
    f"WITH planned AS MATERIALIZED (SELECT * FROM {_PLANNED_ROWS}), m AS ("
    "INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, storage_class, kind,"
    " location_id, camera_id, observed_at, observed_at_source, observed_at_ambiguous)"
    " SELECT :bucket, key, etag, etag, size_bytes, last_modified, storage_class, kind, :location,"
    " CAST(:camera AS integer), observed_at, observed_at_source, coalesce(observed_at_ambiguous, false)"
    # Two who register the same keys wait for each other in one order.
    ' FROM planned ORDER BY key COLLATE "C" ON CONFLICT DO NOTHING RETURNING id, key'
    f"), made AS (INSERT INTO jobs {_JOB_COLUMNS} SELECT {_FIRST_JOB_OF_MEDIA} FROM m JOIN planned USING (key)"
    ' ORDER BY m.key COLLATE "C" RETURNING media_object_id, state'
    ") SELECT m.key, made.state FROM m JOIN made ON made.media_object_id = m.id"
)

#: The first job of what is known, for a pipeline that has not been given it.
_INSERT_JOBS = (
    f"INSERT INTO jobs {_JOB_COLUMNS} SELECT {_FIRST_JOB_OF_MEDIA} FROM {_PLANNED_ROWS} CROSS JOIN LATERAL ("
    " SELECT id FROM media_objects WHERE bucket = :bucket AND key = planned.key AND revision = planned.etag"
    " AND superseded_at IS NULL LIMIT 1) AS m"
    ' ORDER BY planned.key COLLATE "C" ON CONFLICT DO NOTHING RETURNING state'
)

#: Keys, the ETags that they are planned with, and the current media object of each. Object by object (LIMIT makes it
#: so): a join reads all of the bucket, as long as Postgres has not noticed how much lies in it.
_KNOWN = (
    "json_each_text(CAST(:known AS json)) AS known (key, etag) CROSS JOIN LATERAL (SELECT * FROM media_objects"
    " WHERE bucket = :bucket AND key = known.key AND superseded_at IS NULL LIMIT 1) AS m"
)


def _known(items: Mapping[str, PlannedObject]) -> str:
    """The parameter of `_KNOWN`."""
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
        row |= {"reason": reason.value, "detail": _storable(detail)}
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


def _not_erased(session: Session, planned: Sequence[PlannedObject]) -> list[PlannedObject]:
    """Those that nobody has erased."""
    if not session.scalar(text("SELECT EXISTS (SELECT FROM erased_objects)")):
        return list(planned)
    by_hash = {_uri_hash(item.info.uri): item for item in planned}
    erased = session.execute(
        text("SELECT uri_sha256 FROM erased_objects WHERE uri_sha256 = ANY(:hashes)"), {"hashes": list(by_hash)}
    ).scalars()
    gone = set(map(bytes, erased))
    return [item for uri_hash, item in by_hash.items() if uri_hash not in gone]


def _keep_from_erasing(session: Session) -> None:
    """Before media objects are locked by who registers some: an erasure or a correction waits for us, or we for it and
    then see what it did."""
    session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _REGISTRATION_LOCK})


def keep_from_registering(session: Session) -> None:
    """Nobody registers anything until this transaction ends. Before media objects are locked, behind cameras and
    backfills."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _REGISTRATION_LOCK})


def check_places(session: Session, location: Location, camera: Camera | None) -> None:
    """Raise `MaskwatchError` if the location's zone or the camera's place was corrected since these were read; nobody
    corrects them until this transaction ends."""
    _keep_from_erasing(session)
    zone = session.scalar(select(Location.time_zone).where(Location.id == location.id))
    place = location.id
    if camera is not None:
        place = session.scalar(select(Camera.location_id).where(Camera.id == camera.id)) or 0
    if (zone, place) != (location.time_zone, location.id):
        raise MaskwatchError(
            f"{location.name!r} or its camera was corrected while this was listed, and what is registered with it: see "
            "maskwatch locations list and maskwatch cameras list, and give the command again with what is right"
        )


def _uri_hash(uri: str) -> bytes:
    return hashlib.sha256(uri.encode()).digest()


def _lock_older(
    session: Session, bucket: str, by_key: dict[str, PlannedObject], *, newest: bool
) -> tuple[set[str], list[int]]:
    """Lock the current versions of these keys; returns which keys have one, and those that the planned ones are to
    replace.

    A version that is seen again with a later time was put again: what is older than that must not replace it.
    """
    current = session.execute(
        text(
            f"WITH found AS MATERIALIZED (SELECT m.id FROM {_KNOWN})"
            " SELECT id, key, revision, last_modified FROM media_objects WHERE id IN (SELECT id FROM found)"
            " AND superseded_at IS NULL ORDER BY id FOR UPDATE"
        ),
        {"bucket": bucket, "known": _known(by_key)},
    ).all()
    again = {
        media_id: by_key[key].info.last_modified
        for media_id, key, revision, modified in current
        if revision == by_key[key].info.etag and modified < by_key[key].info.last_modified
    }
    if again:
        session.execute(
            text(
                "UPDATE media_objects SET last_modified = seen.modified"
                " FROM unnest(CAST(:ids AS bigint[]), CAST(:times AS timestamptz[])) AS seen (id, modified)"
                " WHERE media_objects.id = seen.id"
            ),
            {"ids": list(again), "times": list(again.values())},
        )
    older = [
        media_id
        for media_id, key, revision, modified in current
        if revision != by_key[key].info.etag and (newest or modified <= by_key[key].info.last_modified)
    ]
    return {key for _, key, _, _ in current}, older


def _supersede(session: Session, media_ids: Sequence[int]) -> None:
    session.execute(
        update(MediaObject).where(MediaObject.id.in_(media_ids)).values(superseded_at=func.clock_timestamp())
    )
    _withdraw(session, media_ids, "a newer version of the key was registered")


def _revive(session: Session, rows: dict[str, Any]) -> int:
    """Bytes that were replaced and are back: their media object is current again, its jobs start over.

    Only a key without a current version is concerned, which is one that `_supersede` has just dealt with.
    """
    found = session.execute(
        text(
            f"WITH gone AS MATERIALIZED (SELECT old.id, planned.last_modified FROM {_PLANNED_ROWS} CROSS JOIN LATERAL ("
            " SELECT id FROM media_objects WHERE bucket = :bucket AND key = planned.key AND revision = planned.etag"
            " AND superseded_at IS NOT NULL AND NOT EXISTS (SELECT FROM media_objects c WHERE c.bucket = :bucket"
            " AND c.key = planned.key AND c.superseded_at IS NULL) LIMIT 1) AS old"
            "), back AS (UPDATE media_objects m SET superseded_at = NULL, last_modified = gone.last_modified FROM gone"
            " WHERE m.id = gone.id AND m.superseded_at IS NOT NULL RETURNING m.id"
            "), again AS (SELECT j.id FROM jobs j JOIN back ON back.id = j.media_object_id"
            # Chunks are planned anew by the probe, perhaps with another length or start of the recording.
            " WHERE j.state IN ('cancelled', 'source_changed') AND j.kind <> 'chunk' ORDER BY j.id FOR UPDATE OF j"
            f") UPDATE jobs SET {_ANEW} FROM again WHERE jobs.id = again.id RETURNING jobs.media_object_id"
        ),
        rows,
    )
    return len(set(found.scalars()))


def _withdraw(session: Session, media_ids: Sequence[int], detail: str, *, respect_cancelled: bool = False) -> None:
    """Cancel all jobs of these media objects, delete what they wrote, and mark the hours it counted in.

    What an operator had cancelled is withdrawn, too, to be planned from the start should these bytes come back. Where
    the object stays, `respect_cancelled` leaves it cancelled by him, all but chunks: they are of a plan that ends.

    A job that ended as `source_changed` keeps saying so: it is how the newer version was found.
    """
    parameters = {"ids": list(media_ids), "reason": Reason.SUPERSEDED.value, "detail": detail}
    only_chunks = "AND kind = 'chunk'" if respect_cancelled else ""
    session.execute(
        text(
            "WITH stopped AS ("
            " SELECT id, state, attempt, worker, started_at FROM jobs WHERE media_object_id = ANY(:ids)"
            f" AND state <> 'source_changed' AND (state <> 'cancelled' OR {_WISHED}"
            f" {only_chunks}) ORDER BY id FOR UPDATE"
            "), told AS (INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)"
            " SELECT id, attempt, 'cancelled', worker, started_at, :reason, :detail FROM stopped"
            " WHERE state = 'running'"
            ") UPDATE jobs SET state = 'cancelled', token = gen_random_uuid(), lease_until = NULL,"
            " finished_at = clock_timestamp(), reason = :reason, detail = :detail"
            " FROM stopped WHERE jobs.id = stopped.id"
        ),
        parameters,
    )
    of_media = "SELECT id FROM jobs WHERE media_object_id = ANY(:ids)"
    # Purged hours keep what was counted in them, as their summaries stay.
    _delete_rows(session, of_media, f"AND hour >= {PURGED_BEFORE_SQL}", parameters)


def _delete_rows(session: Session, job_ids: str, counts: str, parameters: dict[str, Any]) -> None:
    """Delete what these jobs wrote, and mark the hours it counted in. `counts` limits which frame counts go."""
    session.execute(
        text(
            f"WITH gone AS (DELETE FROM frame_counts WHERE job_id IN ({job_ids}) {counts}"
            " RETURNING location_id, pipeline_id, hour)"
            " INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT DISTINCT location_id, pipeline_id, hour"
            " FROM gone"
        ),
        parameters,
    )
    session.execute(text(f"DELETE FROM faces WHERE job_id IN ({job_ids})"), parameters)


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
        _set_observed_at(session, media_id, seen)
    media_ids = [media_id for media_id, _ in stuck]
    _withdraw(session, media_ids, "the time in its key is known now", respect_cancelled=True)
    session.execute(
        text(
            "WITH again AS (SELECT id FROM jobs WHERE media_object_id = ANY(:ids) AND state = 'cancelled'"
            " AND reason = 'superseded' AND kind <> 'chunk' ORDER BY id FOR UPDATE)"
            f" UPDATE jobs SET {_ANEW} FROM again WHERE jobs.id = again.id"
        ),
        {"ids": media_ids},
    )


def _take_back(
    session: Session, bucket: str, known: dict[str, PlannedObject], pipeline: Pipeline, backfill_id: int | None
) -> int:
    """→ pending for known objects that lay in an archive and can be read now, and for those that were cancelled with
    their backfill; returns how many objects that were."""
    if not known:
        return 0
    rows = session.execute(
        text(
            f"WITH found AS MATERIALIZED (SELECT m.id, m.key FROM {_KNOWN}), back AS ("
            "SELECT jobs.id FROM jobs JOIN found m ON m.id = jobs.media_object_id WHERE ("
            " (jobs.state = 'cancelled' AND jobs.reason = 'cancelled_with_backfill' AND jobs.pipeline_id = :pipeline)"
            " OR (jobs.state IN ('quarantined', 'retry_wait') AND jobs.reason = 'archived'"
            " AND m.key <> ALL(:archived))) ORDER BY jobs.id FOR UPDATE OF jobs)"
            f" UPDATE jobs SET {_ANEW}, next_run_at = NULL, backfill_id = coalesce(:backfill, jobs.backfill_id)"
            " FROM back WHERE jobs.id = back.id RETURNING jobs.media_object_id"
        ),
        {
            "bucket": bucket,
            "known": _known(known),
            # Mostly none.
            "archived": [key for key, item in known.items() if item.info.archived],
            "pipeline": pipeline.id,
            "backfill": backfill_id,
        },
    )
    return len(set(rows.scalars()))


def _set_observed_at(session: Session, media_id: int, seen: ObservedAt) -> None:
    session.execute(
        update(MediaObject)
        .where(MediaObject.id == media_id)
        .values(observed_at=seen.instant, observed_at_source=seen.source, observed_at_ambiguous=seen.ambiguous)
    )


# --- dispatch ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DispatchedJob:
    ref: JobRef
    kind: JobKind
    pipeline_id: int


def take_pending(
    session: Session, *, limit: int, alone: bool, epoch: str, lane: Lane | None = None, video_counts_as: int = 1
) -> list[DispatchedJob]:
    """pending → queued for at most `limit` jobs of a lane, or of both, live first. Publish only after the commit.

    `alone` selects the jobs that are sent in a message of their own. A video's job counts as `video_counts_as` of the
    limit: it fills a message that would hold so many pictures. Those of paused sources and backfills are passed over.
    SKIP LOCKED: two dispatchers share the work instead of waiting for each other.
    """
    return _queue(
        session,
        "WITH feeds AS ("
        " SELECT id AS source_id, 0::bigint AS backfill_id FROM sources WHERE paused_at IS NULL UNION ALL"
        " SELECT source_id, backfills.id FROM backfills JOIN sources ON sources.id = source_id"
        " WHERE sources.paused_at IS NULL AND backfills.paused_at IS NULL"
        "), picked AS ("
        # Feed by feed, so that a paused one costs nothing, however many of its jobs wait.
        " SELECT next.id, next.lane, next.kind FROM feeds CROSS JOIN unnest(CAST(:lanes AS smallint[])) AS lanes (lane)"
        " CROSS JOIN LATERAL ("
        # A literal and not a parameter, so that every plan can use the index of its half.
        "  SELECT id, lane, kind FROM jobs WHERE source_id = feeds.source_id AND coalesce(backfill_id, 0)"
        f"  = feeds.backfill_id AND lane = lanes.lane AND state = 'pending' AND {'alone' if alone else 'NOT alone'}"
        "  ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED) AS next ORDER BY next.lane, next.id LIMIT :limit"
        "), chosen AS (SELECT id, sum(CASE kind WHEN 'image' THEN 1 ELSE :video END) OVER (ORDER BY lane, id)"
        " <= :limit AS fits FROM picked)",
        {"limit": limit, "epoch": epoch, "video": video_counts_as, "lanes": list(Lane) if lane is None else [lane]},
    )


def take_trials(session: Session, *, epoch: str, policy: PausePolicy) -> list[DispatchedJob]:
    """pending → queued for one job of each paused source whose trial is due; each is to be sent alone."""
    taken: list[DispatchedJob] = []
    for source_id in sources.take_due_trials(session, policy):
        taken += _queue(
            session,
            "WITH chosen AS (SELECT id, true AS fits FROM jobs WHERE source_id = :source AND state = 'pending'"
            " AND NOT EXISTS (SELECT FROM backfills b WHERE b.id = jobs.backfill_id AND b.paused_at IS NOT NULL)"
            " ORDER BY id LIMIT 1 FOR UPDATE OF jobs SKIP LOCKED)",
            {"source": source_id, "epoch": epoch},
        )
    return taken


def _queue(session: Session, chosen: str, parameters: dict[str, Any]) -> list[DispatchedJob]:
    """pending → queued for what the query names `chosen` (id, fits), live lane first."""
    rows = session.execute(
        text(
            f"{chosen} UPDATE jobs SET state = 'queued', token = gen_random_uuid(), queued_at = clock_timestamp(),"
            " epoch = :epoch FROM chosen WHERE jobs.id = chosen.id AND chosen.fits"
            " RETURNING jobs.id, jobs.token, jobs.kind, jobs.pipeline_id, jobs.lane"
        ),
        parameters,
    ).all()
    rows = sorted(rows, key=lambda row: (row.lane, row.id))
    return [DispatchedJob(JobRef(row.id, row.token), JobKind(row.kind), row.pipeline_id) for row in rows]


def wake_retries(session: Session) -> int:
    """retry_wait → pending for what is due."""
    return _count(
        session,
        "WITH due AS (SELECT id FROM jobs WHERE state = 'retry_wait' AND next_run_at <= clock_timestamp()"
        " ORDER BY id FOR UPDATE SKIP LOCKED)"
        " UPDATE jobs SET state = 'pending', token = gen_random_uuid(), next_run_at = NULL FROM due"
        " WHERE jobs.id = due.id",
        {},
    )


# --- the worker's side ------------------------------------------------------------------------------------


#: The state that a worker's jobs must be in, as a parameter: so no plan goes by way of the index of all that are.
_QUEUED = {"queued": JobState.QUEUED.value}
_RUNNING = {"running": JobState.RUNNING.value}

#: What a worker learns of a job that it claims: name and expression.
_CLAIMED = {
    "id": "held.id",
    "token": "held.token",
    "kind": "held.kind",
    "attempt": "held.attempt",
    "media_object_id": "held.media_object_id",
    "source_id": "held.source_id",
    "pipeline_id": "held.pipeline_id",
    "backfill_id": "held.backfill_id",
    "lane": "held.lane",
    "range_start_ms": "held.range_start_ms",
    "range_end_ms": "held.range_end_ms",
    "duration_seconds": "m.duration_seconds",
    "queued_seconds": "extract(epoch FROM held.started_at - held.queued_at)::float",
    "last": "held.kind = 'chunk' AND NOT EXISTS (SELECT FROM jobs later WHERE later.kind = 'chunk'"
    " AND later.media_object_id = held.media_object_id AND later.pipeline_id = held.pipeline_id"
    f" AND later.range_start_ms >= held.range_end_ms AND {_PLANNED.format(jobs='later')})",
    "bucket": "m.bucket",
    "key": "m.key",
    "etag": "m.etag",
    "size_bytes": "m.size_bytes",
    "last_modified": "m.last_modified",
    "observed_at": "m.observed_at",
    "observed_at_source": "m.observed_at_source",
    "observed_at_ambiguous": "m.observed_at_ambiguous",
    "location_id": "m.location_id",
    "camera_id": "m.camera_id",
    "time_zone": "l.time_zone",
    "spec": "p.spec",
}

_CLAIM = (
    "WITH wanted AS ("
    " SELECT jobs.id FROM jobs JOIN unnest(CAST(:ids AS bigint[]), CAST(:tokens AS uuid[]))"
    " AS sent (id, token) ON jobs.id = sent.id {condition}"
    " ORDER BY jobs.id FOR UPDATE OF jobs"
    "), held AS ("
    " UPDATE jobs SET state = 'running', token = gen_random_uuid(), attempt = attempt + 1, worker = :worker,"
    " started_at = clock_timestamp(), lease_until = clock_timestamp() + make_interval(secs => :lease)"
    " FROM wanted WHERE jobs.id = wanted.id RETURNING jobs.*"
    f") SELECT {', '.join(f'{value} AS {name}' for name, value in _CLAIMED.items())}"
    " FROM held JOIN media_objects m ON m.id = held.media_object_id"
    " JOIN locations l ON l.id = m.location_id JOIN pipelines p ON p.id = held.pipeline_id"
    " CROSS JOIN set_config('synchronous_commit', 'off', true) ORDER BY held.id"
)


def claim(
    session: Session, refs: Sequence[JobRef], *, worker: str, lease_seconds: float, fence: bool = True
) -> list[ClaimedJob]:
    """queued → running for those of `refs` that still stand as they were sent; the others are dropped.

    `fence=False` exists for the tests that show what the fence is for: any message then runs its job.

    The commit does not wait for the disk. Should Postgres crash within the moment that its log takes to get there, and
    nobody else's commit has brought it there, the job stands as it was sent, and this claim is one whose work is
    refused: the message is then lost like any other, and found.
    """
    condition = "AND jobs.token = sent.token AND jobs.state = :queued" if fence else ""
    rows = session.execute(
        sql(_CLAIM.format(condition=condition), *_CLAIMED),
        {**_arrays(refs), **_QUEUED, "worker": worker, "lease": lease_seconds},
    ).all()
    return [
        ClaimedJob(
            ref=JobRef(row.id, row.token),
            kind=JobKind(row.kind),
            attempt=row.attempt,
            media_object_id=row.media_object_id,
            source_id=row.source_id,
            bucket=row.bucket,
            key=row.key,
            etag=row.etag,
            size_bytes=row.size_bytes,
            last_modified=row.last_modified,
            observed_at=_known_time(row),
            location_id=row.location_id,
            time_zone=row.time_zone,
            camera_id=row.camera_id,
            pipeline_id=row.pipeline_id,
            backfill_id=row.backfill_id,
            lane=Lane(row.lane),
            stored_spec=row.spec,
            range_start_ms=row.range_start_ms,
            range_end_ms=row.range_end_ms,
            last=row.last,
            duration_seconds=row.duration_seconds,
            queued_seconds=row.queued_seconds or 0.0,
        )
        for row in rows
    ]


def _known_time(row: Any) -> ObservedAt | None:
    """When the object was taken, as far as that is settled before it is read."""
    # Only a key's time is known for sure; a rerun reads EXIF again. For a chunk the probe has settled it.
    if row.observed_at_source == ObservedAtSource.KEY_PATTERN.value or row.kind == JobKind.CHUNK.value:
        return ObservedAt(row.observed_at, ObservedAtSource(row.observed_at_source), row.observed_at_ambiguous)
    return None


def renew(session: Session, refs: Collection[JobRef], *, lease_seconds: float) -> set[int]:
    """Heartbeat: renew the leases of these running jobs; returns the ids that are still the caller's."""
    rows = session.execute(
        text(
            "WITH mine AS ("
            " SELECT jobs.id FROM jobs JOIN unnest(CAST(:ids AS bigint[]), CAST(:tokens AS uuid[])) AS held (id, token)"
            " ON jobs.id = held.id AND jobs.token = held.token AND jobs.state = :running"
            " ORDER BY jobs.id FOR UPDATE OF jobs"
            ") UPDATE jobs SET lease_until = clock_timestamp() + make_interval(secs => :lease)"
            " FROM mine WHERE jobs.id = mine.id RETURNING jobs.id"
        ),
        {**_arrays(list(refs)), **_RUNNING, "lease": lease_seconds},
    )
    return set(rows.scalars())


def succeed(
    session: Session,
    job: ClaimedJob,
    seen: ObservedAt,
    *,
    reason: Reason | None = None,
    detail: str | None = None,
    fence: bool = True,
) -> None:
    """running → succeeded. The caller writes the job's rows in this same transaction.

    `reason` and `detail` say what is missing where only a part could be analysed.

    Raises `StaleJobError` when the job is no longer the caller's. `fence=False` as in `claim`.
    """
    if seen != job.observed_at:
        _set_observed_at(session, job.media_object_id, seen)
    _end(session, job.ref, "state = 'succeeded'", AttemptOutcome.SUCCEEDED, reason, detail, fence=fence)
    sources.answered(session, job.source_id)


def succeed_all(session: Session, ended: Sequence[tuple[ClaimedJob, ObservedAt]], *, fence: bool = True) -> None:
    """running → succeeded for jobs of as many media objects; all of them, or none: raises `StaleJobError` when one is
    no longer the caller's. The rest as of `succeed`."""
    for job, seen in sorted(ended, key=lambda pair: pair[0].media_object_id):
        if seen != job.observed_at:
            _set_observed_at(session, job.media_object_id, seen)
    guard = "AND jobs.token = mine.token AND jobs.state = :running" if fence else ""
    count = _count(
        session,
        "WITH held AS (SELECT jobs.id, attempt, worker, started_at FROM jobs"
        " JOIN unnest(CAST(:ids AS bigint[]), CAST(:tokens AS uuid[])) AS mine (id, token)"
        f" ON jobs.id = mine.id {guard} ORDER BY jobs.id FOR UPDATE OF jobs"
        "), ended AS (UPDATE jobs SET state = 'succeeded', reason = NULL, detail = NULL,"
        " finished_at = clock_timestamp(), token = gen_random_uuid(), lease_until = NULL, worker = NULL FROM held"
        " WHERE jobs.id = held.id RETURNING jobs.id, jobs.source_id"
        f"), answered AS (UPDATE sources SET {sources.ANSWERED} FROM (SELECT id FROM sources WHERE refusals > 0"
        "  AND id IN (SELECT source_id FROM ended) ORDER BY id FOR NO KEY UPDATE) AS refusing"
        " WHERE sources.id = refusing.id"
        ") INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at)"
        " SELECT held.id, held.attempt, 'succeeded', held.worker, held.started_at"
        " FROM held JOIN ended ON ended.id = held.id",
        {**_arrays([job.ref for job, _ in ended]), **_RUNNING},
    )
    if count != len(ended):
        raise StaleJobError(
            f"{len(ended) - count} of these jobs are no longer held: {[job.ref.id for job, _ in ended]}"
        )


def settled_start(session: Session, job: ClaimedJob) -> ObservedAt | None:
    """When a video's recording began, if chunks that another pipeline has planned go by that: LastModified may have
    changed since, and a recording begins once. Of the transaction that ends the probe, behind `plan_chunks`."""
    row = session.execute(
        text(
            "SELECT observed_at, observed_at_source, observed_at_ambiguous FROM media_objects m WHERE id = :media"
            " AND observed_at IS NOT NULL AND EXISTS (SELECT FROM jobs WHERE media_object_id = m.id AND kind = 'chunk'"
            f" AND pipeline_id <> :pipeline AND {_PLANNED.format(jobs='jobs')})"
        ),
        {"media": job.media_object_id, "pipeline": job.pipeline_id},
    ).first()
    return None if row is None else ObservedAt(row[0], ObservedAtSource(row[1]), row[2])


def plan_chunks(session: Session, job: ClaimedJob, info: VideoInfo, ranges_ms: Sequence[tuple[int, int]]) -> int:
    """Keep what a probe learned and insert the chunk jobs of its video; returns how many are new.

    Part of the transaction that ends the probe. A video that has a plan already keeps it, whatever its length of
    chunks: a second one would count its frames twice.
    """
    values = {"media": job.media_object_id, "pipeline": job.pipeline_id}
    kept = session.execute(
        update(MediaObject)
        .where(MediaObject.id == job.media_object_id)
        .returning(MediaObject.id)
        .values(
            container=info.container,
            codec=info.codec,
            width=info.width,
            height=info.height,
            frame_rate=info.frame_rate,
            rotation=info.rotation,
            duration_seconds=info.duration_seconds,
        )
    ).first()
    if kept is None:
        raise StaleJobError(f"what job {job.ref.id} is about was erased")
    return _count(
        session,
        "INSERT INTO jobs"
        " (media_object_id, source_id, pipeline_id, backfill_id, kind, lane, range_start_ms, range_end_ms)"
        " SELECT :media, :source, :pipeline, :backfill, 'chunk', :lane, start_ms, end_ms"
        " FROM unnest(CAST(:starts AS bigint[]), CAST(:ends AS bigint[])) AS planned (start_ms, end_ms)"
        " WHERE NOT EXISTS (SELECT FROM jobs WHERE media_object_id = :media AND pipeline_id = :pipeline"
        f" AND kind = 'chunk' AND {_PLANNED.format(jobs='jobs')})"
        " ORDER BY start_ms ON CONFLICT (media_object_id, pipeline_id, kind, range_start_ms, range_end_ms)"
        " DO UPDATE SET state = 'pending', token = gen_random_uuid(), failures = 0, crashes = 0, lost_leases = 0,"
        " finished_at = NULL, reason = NULL, detail = NULL, backfill_id = excluded.backfill_id, lane = excluded.lane"
        " WHERE jobs.state IN ('cancelled', 'source_changed')",
        {
            **values,
            "source": job.source_id,
            "backfill": job.backfill_id,
            "lane": job.lane.value,
            "starts": [start for start, _ in ranges_ms],
            "ends": [end for _, end in ranges_ms],
        },
    )


def retry_later(
    session: Session, job: ClaimedJob, reason: Reason, detail: str, *, max_attempts: int, base: float, cap: float
) -> JobState:
    """running → retry_wait after a transient error, or → quarantined when `max_attempts` such errors are used up.

    The wait is drawn from [0, min(cap, base * 2**failures)) seconds: full jitter (M. Brooker, "Exponential
    backoff and jitter", AWS Architecture Blog, 2015). Returns the new state.
    """
    spent = session.scalar(select(Job.failures).where(Job.id == job.ref.id, Job.token == job.ref.token))
    if spent is not None and spent + 1 >= max_attempts:
        detail = f"{detail} (given up after {max_attempts} tries)"
        _end(
            session,
            job.ref,
            "state = 'quarantined', failures = failures + 1",
            AttemptOutcome.QUARANTINED,
            reason,
            detail,
        )
        return JobState.QUARANTINED
    _end(
        session,
        job.ref,
        "state = 'retry_wait', failures = failures + 1, next_run_at = clock_timestamp()"
        " + make_interval(secs => random() * least(:cap, :base * power(2, failures)))",
        AttemptOutcome.RETRIED,
        reason,
        detail,
        base=base,
        cap=cap,
    )
    return JobState.RETRY_WAIT


def await_restore(
    session: Session, job: ClaimedJob, detail: str, *, check_seconds: float, wait_seconds: float
) -> JobState:
    """running → retry_wait for an archived object that was asked for less than `wait_seconds` ago, to be tried again
    after `check_seconds` or a little less, which counts as no failure; → quarantined for another. Returns the state."""
    asked = session.scalar(
        text(
            "SELECT restore_requested_at > clock_timestamp() - make_interval(secs => :wait) FROM media_objects"
            " WHERE id = :media"
        ),
        {"media": job.media_object_id, "wait": wait_seconds},
    )
    if asked:
        _end(session, job.ref, _TRIED_AGAIN, AttemptOutcome.RETRIED, Reason.ARCHIVED, detail, check=check_seconds)
        return JobState.RETRY_WAIT
    late = " (it was asked for, and has not come back)" if asked is False else ""
    _end(session, job.ref, "state = 'quarantined'", AttemptOutcome.QUARANTINED, Reason.ARCHIVED, detail + late)
    return JobState.QUARANTINED


#: Tried again after a while. Spread, so that what was put off together is not tried together.
_TRIED_AGAIN = (
    "state = 'retry_wait', next_run_at = clock_timestamp() + make_interval(secs => (0.5 + random() / 2) * :check)"
)


def restore_requested(session: Session, bucket: str, keys: Sequence[str], *, check_seconds: float) -> int:
    """quarantined → retry_wait for archived objects that S3 was asked to restore; returns how many jobs wait now."""
    session.execute(
        text(
            "WITH asked AS (SELECT id FROM media_objects WHERE bucket = :bucket AND key = ANY(:keys)"
            " AND superseded_at IS NULL ORDER BY id FOR UPDATE)"
            " UPDATE media_objects m SET restore_requested_at = clock_timestamp() FROM asked WHERE m.id = asked.id"
        ),
        {"bucket": bucket, "keys": list(keys)},
    )
    return _count(
        session,
        "WITH asked AS (SELECT jobs.id FROM jobs JOIN media_objects m ON m.id = jobs.media_object_id"
        " WHERE m.bucket = :bucket AND m.key = ANY(:keys) AND m.superseded_at IS NULL"
        " AND jobs.state = 'quarantined' AND jobs.reason = 'archived' ORDER BY jobs.id FOR UPDATE OF jobs)"
        f" UPDATE jobs SET {_TRIED_AGAIN}, token = gen_random_uuid(), finished_at = NULL FROM asked"
        " WHERE jobs.id = asked.id",
        {"bucket": bucket, "keys": list(keys), "check": check_seconds},
    )


def quarantine(session: Session, job: ClaimedJob, reason: Reason, detail: str) -> None:
    """running → quarantined after an error that another try can't mend."""
    _end(session, job.ref, "state = 'quarantined'", AttemptOutcome.QUARANTINED, reason, detail)
    if reason not in (*REFUSALS, Reason.OBJECT_GONE):
        sources.answered(session, job.source_id)


def refuse(
    session: Session,
    job: ClaimedJob,
    reason: Reason,
    detail: str,
    *,
    policy: PausePolicy,
    max_attempts: int,
    base: float,
    cap: float,
) -> JobState:
    """The job's source denied or throttled it (`domain.REFUSALS`): count that, and move the job accordingly.

    Of a source that goes on giving other objects, a denied one is quarantined at once and a throttled one tried again
    (`retry_later`). Once the source is paused, both wait, spread over the pause's longest wait, and count as failed
    tries. Returns the new state.
    """
    held = session.scalar(
        text("SELECT id FROM jobs WHERE id = :id AND token = :token AND state = :running FOR UPDATE"),
        {"id": job.ref.id, "token": job.ref.token, **_RUNNING},
    )
    if held is None:
        raise StaleJobError(f"job {job.ref.id} is no longer held under token {job.ref.token}")
    paused = sources.refused(session, job.source_id, reason, _storable(detail) or "", policy)
    if paused:
        wait = policy.cap_seconds
        return retry_later(session, job, reason, detail, max_attempts=max_attempts, base=wait, cap=wait)
    if reason is Reason.STORAGE_UNAVAILABLE:
        return retry_later(session, job, reason, detail, max_attempts=max_attempts, base=base, cap=cap)
    quarantine(session, job, reason, detail)
    return JobState.QUARANTINED


def source_changed(session: Session, job: ClaimedJob, detail: str) -> None:
    """running → source_changed: the object is no longer the planned one. The caller registers the new version."""
    _keep_from_erasing(session)
    session.execute(select(MediaObject.id).where(MediaObject.id == job.media_object_id).with_for_update())
    _end(session, job.ref, "state = 'source_changed'", AttemptOutcome.SOURCE_CHANGED, Reason.SOURCE_CHANGED, detail)


def release(session: Session, job: ClaimedJob) -> None:
    """running → pending, the attempt refunded: the worker is asked to stop and has not done this job."""
    _end(session, job.ref, "state = 'pending', attempt = jobs.attempt - 1", AttemptOutcome.RELEASED)


def give_back(session: Session, job: ClaimedJob, detail: str, *, check_seconds: float) -> None:
    """running → retry_wait, the attempt refunded: this worker can't do the job, and another one may. It is sent again
    after `check_seconds` or a little less."""
    _end(
        session,
        job.ref,
        f"{_TRIED_AGAIN}, attempt = jobs.attempt - 1",
        AttemptOutcome.RELEASED,
        detail=detail,
        check=check_seconds,
    )


#: Attempts that end without ending the job.
_UNFINISHED = (AttemptOutcome.RETRIED, AttemptOutcome.RELEASED)


def _end(
    session: Session,
    ref: JobRef,
    assignments: str,
    outcome: AttemptOutcome,
    reason: Reason | None = None,
    detail: str | None = None,
    *,
    fence: bool = True,
    **parameters: Any,
) -> None:
    """End a running attempt and tell `job_attempts` how. The row before the update still names the attempt."""
    guard = "AND token = :token AND state = :running" if fence else ""
    finish = "" if outcome in _UNFINISHED else ", finished_at = clock_timestamp()"
    ended = _count(
        session,
        "WITH held AS ("
        f" SELECT id, attempt, worker, started_at FROM jobs WHERE id = :id {guard} FOR UPDATE"
        "), ended AS ("
        f" UPDATE jobs SET {assignments}, reason = :reason, detail = :detail{finish}, token = gen_random_uuid(),"
        " lease_until = NULL, worker = NULL FROM held WHERE jobs.id = held.id RETURNING jobs.id"
        ") INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)"
        " SELECT held.id, held.attempt, :outcome, held.worker, held.started_at, :reason, :detail"
        " FROM held JOIN ended ON ended.id = held.id",
        {
            "id": ref.id,
            "token": ref.token,
            **_RUNNING,
            "outcome": outcome.value,
            "reason": reason.value if reason else None,
            "detail": _storable(detail),
            **parameters,
        },
    )
    if not ended:
        raise StaleJobError(f"job {ref.id} is no longer held under token {ref.token}")


# --- the reconciler's side --------------------------------------------------------------------------------


def report_crash(session: Session, worker: str, *, max_crashes: int) -> int:
    """The process that ran these jobs died: running → pending, or → quarantined.

    `worker` is a LIKE pattern of `jobs.worker`. A job is only blamed for a crash that happened while it ran
    alone; from its first crash on it is sent alone.
    """
    return _lose(
        session,
        "worker LIKE :worker",
        "crashes = crashes + (alone OR cardinality(ids) = 1)::int",
        "crashes + (alone OR cardinality(ids) = 1)::int >= :limit",
        AttemptOutcome.CRASHED,
        Reason.CRASHED,
        "the worker process died while it ran this job",
        {"worker": worker, "limit": max_crashes},
    )


def recover_expired(session: Session, *, max_lost_leases: int) -> int:
    """running → pending for jobs whose lease ran out, whatever the cause; → quarantined when that happened
    `max_lost_leases` times."""
    return _lose(
        session,
        "lease_until < clock_timestamp()",
        "lost_leases = lost_leases + 1",
        "lost_leases + 1 >= :limit",
        AttemptOutcome.LEASE_EXPIRED,
        Reason.LEASE_EXPIRED,
        "the worker stopped renewing its lease",
        {"limit": max_lost_leases},
    )


def _lose(
    session: Session,
    condition: str,
    counter: str,
    exhausted: str,
    outcome: AttemptOutcome,
    reason: Reason,
    detail: str,
    parameters: dict[str, Any],
) -> int:
    return _count(
        session,
        "WITH lost AS MATERIALIZED ("
        f" SELECT id, attempt, worker, started_at FROM jobs WHERE state = 'running' AND {condition}"
        " ORDER BY id FOR UPDATE SKIP LOCKED"
        "), crowd AS (SELECT array_agg(id) AS ids FROM lost"
        "), moved AS ("
        f" UPDATE jobs SET {counter}, alone = true, token = gen_random_uuid(), lease_until = NULL, worker = NULL,"
        f" state = CASE WHEN {exhausted} THEN 'quarantined' ELSE 'pending' END,"
        f" finished_at = CASE WHEN {exhausted} THEN clock_timestamp() END, reason = :reason, detail = :detail"
        " FROM lost, crowd WHERE jobs.id = lost.id RETURNING jobs.id"
        ") INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)"
        " SELECT lost.id, lost.attempt, :outcome, lost.worker, lost.started_at, :reason, :detail"
        " FROM lost JOIN moved ON moved.id = lost.id",
        {**parameters, "outcome": outcome.value, "reason": reason.value, "detail": detail},
    )


def recover_queued(
    session: Session, *, epoch: str, overdue_seconds: float, empty_lanes: Collection[Lane], lost_seconds: float
) -> int:
    """queued → pending for jobs whose message is lost: sent to a Redis that was wiped since (another epoch), overdue
    although their lane's queue is empty, or older than any message should get. (A message that was only slow is then
    dropped when it is read.)"""
    return _count(
        session,
        "WITH lost AS (SELECT id FROM jobs WHERE state = 'queued' AND (epoch IS DISTINCT FROM :epoch OR queued_at <"
        " clock_timestamp() - make_interval(secs => CASE WHEN lane = ANY(:empty) THEN :overdue ELSE :lost END))"
        " ORDER BY id FOR UPDATE SKIP LOCKED)"
        " UPDATE jobs SET state = 'pending', token = gen_random_uuid() FROM lost WHERE jobs.id = lost.id",
        {"epoch": epoch, "empty": list(empty_lanes), "overdue": overdue_seconds, "lost": lost_seconds},
    )


def recover_refused(session: Session, *, policy: PausePolicy, max_attempts: int) -> int:
    """quarantined → retry_wait for what a source refused before it was found to refuse everything."""
    return _count(
        session,
        "WITH refused AS (SELECT jobs.id FROM sources JOIN jobs ON jobs.source_id = sources.id"
        " WHERE sources.paused_at IS NOT NULL AND jobs.state = 'quarantined'"
        # Those that ran out of tries are not among them: they were refused in earlier pauses, too.
        " AND jobs.finished_at >= sources.refusing_since AND jobs.reason = ANY(:refusals)"
        " AND jobs.failures + 1 < :max ORDER BY jobs.id FOR UPDATE OF jobs SKIP LOCKED)"
        " UPDATE jobs SET state = 'retry_wait', token = gen_random_uuid(), failures = failures + 1,"
        " finished_at = NULL, next_run_at = clock_timestamp() + make_interval(secs => random() * :cap) FROM refused"
        " WHERE jobs.id = refused.id",
        {"refusals": list(REFUSALS), "cap": policy.cap_seconds, "max": max_attempts},
    )


# --- the operator's side ----------------------------------------------------------------------------------

#: Back to the start, as if it had never been tried.
_ANEW = (
    "state = 'pending', token = gen_random_uuid(), failures = 0, crashes = 0, lost_leases = 0, finished_at = NULL,"
    " reason = NULL, detail = NULL"
)


def retry(session: Session, job_ids: Sequence[int] | None = None, *, by: str) -> list[int]:
    """quarantined → pending, counters reset, for these jobs or for all; returns the ids that moved. Named ones are
    also taken back that an operator had cancelled.

    Not those that no pattern could place in time (without one they would count under their upload time), and not
    what was seen in purged time. `by` is recorded.
    """
    chosen = "state = 'quarantined' AND reason <> ALL(:hopeless)"
    if job_ids is not None:
        chosen = f"id = ANY(:ids) AND ({chosen} OR (state = 'cancelled' AND {_WISHED}))"
    rows = session.execute(
        text(
            f"WITH chosen AS (SELECT id FROM jobs WHERE {chosen} ORDER BY id FOR UPDATE)"
            f" UPDATE jobs SET {_ANEW} FROM chosen WHERE jobs.id = chosen.id RETURNING jobs.id"
        ),
        {"hopeless": list(HOPELESS), **({"ids": list(job_ids)} if job_ids is not None else {})},
    )
    return _recorded(session, "retry", by, rows.scalars())


def cancel(session: Session, job_ids: Sequence[int], *, by: str) -> list[int]:
    """active → cancelled for these jobs; returns the ids that moved. `by` is recorded.

    A worker that is at one of them goes on until it asks for its lease or wants to commit, and is refused.
    """
    chosen = {"ids": list(job_ids), "limit": None}
    return _cancel(session, "id = ANY(:ids)", chosen, Reason.CANCELLED_BY_OPERATOR, by)


def cancel_backfill(session: Session, backfill_id: int, *, by: str, limit: int) -> list[int]:
    """active → cancelled for at most `limit` jobs of a backfill; returns the ids that moved. `by` is recorded."""
    chosen = {"id": backfill_id, "limit": limit}
    return _cancel(session, "backfill_id = :id", chosen, Reason.CANCELLED_WITH_BACKFILL, by)


def _cancel(session: Session, which: str, parameters: dict[str, Any], reason: Reason, by: str) -> list[int]:
    rows = session.execute(
        text(
            "WITH stopped AS ("
            f" SELECT id, state, attempt, worker, started_at FROM jobs WHERE {which} AND state IN ({_ACTIVE})"
            " ORDER BY id LIMIT :limit FOR UPDATE"
            "), told AS (INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)"
            " SELECT id, attempt, 'cancelled', worker, started_at, :reason, :detail FROM stopped"
            " WHERE state = 'running'"
            ") UPDATE jobs SET state = 'cancelled', token = gen_random_uuid(), lease_until = NULL, worker = NULL,"
            " next_run_at = NULL, finished_at = clock_timestamp(), reason = :reason, detail = :detail"
            " FROM stopped WHERE jobs.id = stopped.id RETURNING jobs.id"
        ),
        {**parameters, "reason": reason.value, "detail": f"by {by}"},
    )
    return _recorded(session, "cancel", by, rows.scalars())


def rerun(session: Session, job_ids: Sequence[int], *, by: str) -> list[int]:
    """succeeded → pending for these pictures and chunks; what they had written is deleted, and its hours marked, in
    the same transaction. Returns the ids that moved. `by` is recorded.

    Not probes (a video keeps its plan), and not what counted in purged hours (it could not be stored again).
    """
    session.execute(
        text(
            "SELECT FROM media_objects WHERE id IN (SELECT media_object_id FROM jobs WHERE id = ANY(:ids))"
            " ORDER BY id FOR UPDATE"
        ),
        {"ids": list(job_ids)},
    )
    rows = session.execute(
        text(
            "WITH chosen AS (SELECT id FROM jobs WHERE id = ANY(:ids) AND state = 'succeeded' AND kind <> 'probe'"
            " AND NOT EXISTS (SELECT FROM frame_counts c WHERE c.job_id = jobs.id"
            f" AND c.hour < {PURGED_BEFORE_SQL}) ORDER BY id FOR UPDATE)"
            f" UPDATE jobs SET {_ANEW} FROM chosen WHERE jobs.id = chosen.id RETURNING jobs.id"
        ),
        {"ids": list(job_ids)},
    )
    moved = _recorded(session, "rerun", by, rows.scalars())
    _delete_rows(session, "SELECT unnest(CAST(:ids AS bigint[]))", "", {"ids": moved})
    return moved


def _recorded(session: Session, action: str, by: str, job_ids: Iterable[int]) -> list[int]:
    moved = sorted(job_ids)
    if moved:
        audit.record(session, action, by, job_ids=moved)
    return moved


def erase(session: Session, bucket: str, key: str, *, by: str) -> int:
    """Remove everything that came from an object, in all its versions: faces, counts, jobs and their story, and the
    object itself, which stays out from now on. Marks the hours it counted in. Returns how many versions there were.

    What remains is a hash of its URI, and the sums of purged hours, which can't be made without it any more.
    """
    keep_from_registering(session)
    media_ids = session.scalars(
        select(MediaObject.id)
        .where(MediaObject.bucket == bucket, MediaObject.key == key)
        .order_by(MediaObject.id)
        .with_for_update()
    ).all()
    parameters = {"ids": list(media_ids)}
    of_media = "SELECT id FROM jobs WHERE media_object_id = ANY(:ids)"
    # A worker that is about to commit one of them waits here, finds it gone, and is refused.
    session.execute(text(f"{of_media} ORDER BY id FOR UPDATE"), parameters)
    _delete_rows(session, of_media, "", parameters)
    session.execute(text("DELETE FROM jobs WHERE media_object_id = ANY(:ids)"), parameters)
    session.execute(text("DELETE FROM media_objects WHERE id = ANY(:ids)"), parameters)
    session.execute(
        text(
            "UPDATE backfill_parts p SET begins_after = CASE WHEN begins_after = :key THEN '' ELSE begins_after END,"
            " ends_with = nullif(ends_with, :key), cursor = nullif(cursor, :key) FROM backfills b JOIN sources s"
            " ON s.id = b.source_id WHERE b.id = p.backfill_id AND s.bucket = :bucket"
            " AND :key IN (begins_after, ends_with, cursor)"
        ),
        {"key": key, "bucket": bucket},
    )
    session.execute(
        text("INSERT INTO erased_objects (uri_sha256, action_id) VALUES (:hash, :action) ON CONFLICT DO NOTHING"),
        {"hash": _uri_hash(f"{bucket}/{key}"), "action": audit.record(session, "erase", by)},
    )
    return len(media_ids)


@dataclass(frozen=True, slots=True)
class Placement:
    """When an object is counted from now on, and what became of it if that can't be said."""

    media_object_id: int
    #: None while it is not known.
    seen: ObservedAt | None
    #: By how much its rows move.
    shift: timedelta
    #: Why it can't be counted.
    reason: Reason | None = None
    detail: str | None = None


def correct(session: Session, placements: Sequence[Placement], location: Location, *, detail: str) -> list[int]:
    """Count these media objects at a location, and at other times; returns the jobs that are to be done again.

    What was written moves with them, and the hours that it leaves and comes to are marked. Chunks that would be torn
    between hours, or would reach into purged time, start over. What counts in purged hours stays. Who works on one of
    the objects is refused. Of the transaction that changes the location or the camera, and has locked the footage
    (`lock_footage`).
    """
    rows = {
        "rows": json.dumps([_placement_row(item) for item in placements]),
        "location": location.id,
        "zone": location.time_zone,
        "unplaced": list(UNPLACED),
    }
    of_media = f"SELECT jobs.id FROM {_PLACEMENTS} JOIN jobs ON jobs.media_object_id = placed.id"
    marks = (
        "INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT DISTINCT location_id, pipeline_id, hour"
        f" FROM frame_counts WHERE job_id IN ({of_media}) AND hour >= {PURGED_BEFORE_SQL}"
    )
    session.execute(text(marks), rows)
    session.execute(
        text(
            "WITH stopped AS (SELECT jobs.id, state, attempt, worker, started_at FROM jobs"
            f" WHERE id IN ({of_media}) AND state IN ('queued', 'running')"
            "), told AS (INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, detail)"
            " SELECT id, attempt, 'released', worker, started_at, :detail FROM stopped WHERE state = 'running'"
            ") UPDATE jobs SET state = 'pending', token = gen_random_uuid(), lease_until = NULL, worker = NULL,"
            " attempt = jobs.attempt - (jobs.state = 'running')::int FROM stopped WHERE jobs.id = stopped.id"
        ),
        {**rows, "detail": detail},
    )
    lost = [item.media_object_id for item in placements if item.reason is not None]
    if lost:
        _withdraw(session, lost, detail, respect_cancelled=True)
        session.execute(
            text(
                "UPDATE jobs SET state = 'quarantined', reason = placed.reason, detail = placed.detail"
                f" FROM {_PLACEMENTS} WHERE jobs.media_object_id = placed.id AND placed.reason IS NOT NULL"
                " AND jobs.state = 'cancelled' AND jobs.reason = 'superseded' AND jobs.kind <> 'chunk'"
            ),
            rows,
        )
    again = _count_again(session, of_media, rows)
    session.execute(
        text(
            "UPDATE frame_counts SET location_id = :location, hour = CASE jobs.kind"
            " WHEN 'image' THEN date_trunc('hour', placed.at, :zone) ELSE hour + shift * interval '1 microsecond' END"
            f" FROM {_PLACEMENTS} JOIN jobs ON jobs.media_object_id = placed.id WHERE job_id = jobs.id"
            f" AND hour >= {PURGED_BEFORE_SQL}"
        ),
        rows,
    )
    session.execute(
        text(
            "UPDATE faces SET location_id = :location, observed_at = observed_at + shift * interval '1 microsecond'"
            f" FROM {_PLACEMENTS} JOIN jobs ON jobs.media_object_id = placed.id WHERE job_id = jobs.id"
            f" AND (shift <> 0 OR location_id <> :location) AND observed_at >= {PURGED_BEFORE_SQL}"
        ),
        rows,
    )
    session.execute(
        text(
            "UPDATE media_objects m SET location_id = :location, observed_at = placed.at,"
            " observed_at_source = placed.source, observed_at_ambiguous = coalesce(placed.ambiguous, false)"
            f" FROM {_PLACEMENTS} WHERE m.id = placed.id"
        ),
        rows,
    )
    session.execute(text(marks), rows)
    return again


def lock_footage(session: Session, *, location_id: int | None = None, camera_id: int | None = None) -> None:
    """Lock everything of a location or a camera, in the order that all lock in: nobody ends, plans or replaces any of
    it until this transaction ends. After `keep_from_registering`."""
    chosen, parameters = (
        ("location_id = :id", {"id": location_id}) if camera_id is None else ("camera_id = :id", {"id": camera_id})
    )
    for query in (
        f"SELECT id FROM media_objects WHERE {chosen} ORDER BY id FOR UPDATE",
        f"SELECT id FROM jobs WHERE media_object_id IN (SELECT id FROM media_objects WHERE {chosen})"
        " ORDER BY id FOR UPDATE",
    ):
        session.execute(text(f"SELECT count(*) FROM ({query}) AS locked"), parameters)


#: `Placement`s as rows.
_PLACEMENTS = (
    "json_to_recordset(CAST(:rows AS json)) AS placed (id bigint, at timestamptz, source text, ambiguous boolean,"
    " shift bigint, reason text, detail text)"
)


def _placement_row(item: Placement) -> dict[str, Any]:
    row: dict[str, Any] = {"id": item.media_object_id, "shift": item.shift // timedelta(microseconds=1)}
    if item.seen is not None:
        row |= {"at": item.seen.instant.isoformat(), "source": item.seen.source.value, "ambiguous": item.seen.ambiguous}
    if item.reason is not None:
        row |= {"reason": item.reason.value, "detail": _storable(item.detail)}
    return row


def _count_again(session: Session, of_media: str, rows: dict[str, Any]) -> list[int]:
    """→ pending for what could not be placed in time and now can, and for chunks whose counts can't move: an hour of
    theirs would be torn, or purged time is concerned, in which frames are left out."""
    torn = (
        f"EXISTS (SELECT FROM frame_counts c WHERE c.job_id = jobs.id AND c.hour >= {PURGED_BEFORE_SQL} AND ("
        " date_trunc('hour', c.hour + moved, :zone) <> c.hour + moved OR c.hour + moved < "
        f"{PURGED_BEFORE_SQL}))"
    )
    again = session.execute(
        text(
            "WITH chosen AS (SELECT jobs.id, state FROM"
            f" {_PLACEMENTS} CROSS JOIN LATERAL (SELECT shift * interval '1 microsecond' AS moved) AS step"
            " JOIN jobs ON jobs.media_object_id = placed.id WHERE placed.reason IS NULL AND at IS NOT NULL AND ("
            # A pipeline that wants the key's time gets its turn when that is what is known now.
            " (state = 'quarantined' AND ((jobs.reason = ANY(:unplaced) AND placed.source = 'key_pattern')"
            " OR (jobs.reason = 'purged' AND shift <> 0)))"
            f" OR (state = 'succeeded' AND kind = 'chunk' AND ((jobs.reason = 'purged' AND shift <> 0) OR {torn})))"
            f") UPDATE jobs SET {_ANEW} FROM chosen WHERE jobs.id = chosen.id RETURNING jobs.id"
        ),
        rows,
    ).scalars()
    moved = sorted(again)
    kept = f"AND hour >= {PURGED_BEFORE_SQL}"
    _delete_rows(session, "SELECT unnest(CAST(:ids AS bigint[]))", kept, {"ids": moved})
    return moved


def counts_by_state(session: Session, backfill_id: int | None = None) -> dict[JobState, int]:
    """How many jobs stand in each state; of one backfill or of all."""
    query = select(Job.state, func.count()).group_by(Job.state)
    if backfill_id is not None:
        query = query.where(Job.backfill_id == backfill_id)
    found = {state: count for state, count in session.execute(query).tuples()}  # noqa: C416 - keeps the types
    return {state: found.get(state, 0) for state in JobState}


def known_keys(session: Session, planned: Sequence[PlannedObject], pipeline_id: int | None) -> set[str]:
    """Those of the planned objects of one bucket that this pipeline has been given already, as they are now, and that a
    backfill would leave as they are."""
    if not planned or pipeline_id is None:
        return set()
    rows = session.execute(
        text(
            f"SELECT m.key FROM {_KNOWN} WHERE m.revision = known.etag AND EXISTS (SELECT FROM jobs WHERE"
            " media_object_id = m.id AND pipeline_id = :pipeline"
            " AND NOT (state = 'quarantined' AND reason = 'archived') AND reason IS DISTINCT FROM"
            " 'cancelled_with_backfill')"
        ),
        {
            "bucket": planned[0].info.bucket,
            "known": _known({item.info.key: item for item in planned}),
            "pipeline": pipeline_id,
        },
    )
    return set(rows.scalars())


def same_bytes(session: Session, backfill_id: int) -> int:
    """How many of a backfill's objects in buckets hold the same as another of them, by ETag and size. (Two uploads of
    the same in parts of another size have other ETags, and are not found.)"""
    return int(
        session.scalar(
            text(
                "SELECT count(*) - count(DISTINCT (m.etag, m.size_bytes)) FROM jobs"
                " JOIN media_objects m ON m.id = jobs.media_object_id"
                " WHERE jobs.backfill_id = :id AND jobs.kind <> 'chunk' AND m.bucket <> :files"
            ),
            {"id": backfill_id, "files": FILE_BUCKET},
        )
        or 0
    )


def any_active(session: Session, location: str | None = None, *, backfill_id: int | None = None) -> bool:
    """Whether a job of a backfill, of a location, or any, has something left to do. Quick, however large the ledger
    is."""
    # State by state, because each has its partial index; in one statement, because a job moves between them.
    where, parameters = _of(location, backfill_id)
    query = " OR ".join(f"EXISTS (SELECT FROM jobs WHERE state = '{state}'{where})" for state in ACTIVE_STATES)
    return bool(session.scalar(text(f"SELECT {query}"), parameters))


def _of(location: str | None, backfill_id: int | None) -> tuple[str, dict[str, Any]]:
    """A condition on the jobs of a backfill, of a location, or on none, and its parameters."""
    if backfill_id is not None:
        return " AND backfill_id = :backfill", {"backfill": backfill_id}
    if location is not None:
        of_location = (
            " AND media_object_id IN (SELECT m.id FROM media_objects m JOIN locations l ON l.id = m.location_id"
            " WHERE l.name = :location)"
        )
        return of_location, {"location": location}
    return "", {}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work on some footage is."""

    objects: int
    #: Of which every job has ended, well or not.
    objects_ended: int
    jobs_active: int
    jobs_ended: int
    #: Of videos, as far as they were probed.
    footage_seconds: float
    footage_ended_seconds: float


def progress(session: Session, location: str | None = None, *, backfill_id: int | None = None) -> Progress:
    """How far the work on a backfill, on a location, or on all is. Reads all of its jobs."""
    where, parameters = _of(location, backfill_id)
    row = session.execute(
        text(
            "SELECT count(*), count(*) FILTER (WHERE NOT is_active), coalesce(sum(active), 0), coalesce(sum(ended), 0),"
            " coalesce(sum(footage), 0) / 1000, coalesce(sum(footage_ended), 0) / 1000 FROM ("
            " SELECT bool_or(a) AS is_active, count(*) FILTER (WHERE a) AS active, count(*) FILTER (WHERE NOT a)"
            "  AS ended, sum(ms) AS footage, sum(ms) FILTER (WHERE NOT a) AS footage_ended"
            f" FROM jobs JOIN media_objects m ON m.id = media_object_id CROSS JOIN LATERAL (SELECT state IN ({_ACTIVE})"
            # The last chunk is planned as long as the others.
            f"  AS a, CASE WHEN jobs.kind = 'chunk' AND {_PLANNED.format(jobs='jobs')} THEN greatest(0,"
            "  least(range_end_ms, 1000 * m.duration_seconds) - range_start_ms) ELSE 0 END AS ms) AS each"
            f" WHERE true{where} GROUP BY media_object_id) AS objects"
        ),
        parameters,
    ).one()
    return Progress(*map(int, row[:4]), *map(float, row[4:]))


def unsummarized(session: Session, location: str | None = None) -> int:
    """How many dirty marks of a location, or of all, wait for the aggregator."""
    query = select(func.count()).select_from(DirtyMark)
    if location is not None:
        query = query.join(Location, Location.id == DirtyMark.location_id).where(Location.name == location)
    return session.scalar(query) or 0


def summary_lag(session: Session) -> float:
    """Seconds since the oldest mark that waits for the aggregator was made; 0 where none waits."""
    return float(
        session.scalar(
            text("SELECT extract(epoch FROM clock_timestamp() - created_at) FROM dirty_marks ORDER BY id LIMIT 1")
        )
        or 0.0
    )


@dataclass(frozen=True, slots=True)
class Waiting:
    """Jobs of one state, lane, source and backfill that somebody has to do something about."""

    state: JobState
    lane: Lane
    #: Pending, and not to be sent: its source or backfill is paused.
    held: bool
    #: At most the limit that was asked for.
    jobs: int
    #: Of the oldest pending one; else 0.
    oldest_seconds: float


def waiting(session: Session, *, limit: int) -> list[Waiting]:
    """How much is to be done, for metrics: counted by the partial indexes, `limit` at most of each kind, so that it
    is quick however large the ledger is."""
    rows = session.execute(text(_WAITING), {"limit": limit, "lanes": list(Lane)})
    return [Waiting(JobState(row.state), Lane(row.lane), row.held, row.jobs, float(row.oldest or 0.0)) for row in rows]


#: As dispatch takes them: source by source and backfill by backfill, by their index.
_OF_FEED = (
    "FROM jobs WHERE source_id = feeds.source_id AND coalesce(backfill_id, 0) = feeds.backfill_id"
    " AND lane = lanes.lane AND state = 'pending' AND NOT alone"
)

_WAITING = (
    "WITH feeds AS ("
    " SELECT id AS source_id, 0::bigint AS backfill_id, paused_at IS NOT NULL AS held FROM sources UNION ALL"
    " SELECT source_id, b.id, s.paused_at IS NOT NULL OR b.paused_at IS NOT NULL"
    " FROM backfills b JOIN sources s ON s.id = source_id"
    ") SELECT 'pending' AS state, lanes.lane, held, counted.jobs,"
    " extract(epoch FROM clock_timestamp() - first.created_at) AS oldest"
    " FROM feeds CROSS JOIN unnest(CAST(:lanes AS smallint[])) AS lanes (lane)"
    f" CROSS JOIN LATERAL (SELECT created_at {_OF_FEED} ORDER BY id LIMIT 1) AS first"
    f" CROSS JOIN LATERAL (SELECT count(*) AS jobs FROM (SELECT {_OF_FEED} LIMIT :limit) AS part) AS counted"
    " UNION ALL SELECT 'pending', lane, false, count(*), extract(epoch FROM clock_timestamp() - min(created_at))"
    " FROM (SELECT lane, created_at FROM jobs WHERE state = 'pending' AND alone LIMIT :limit) AS part GROUP BY lane"
) + "".join(
    f" UNION ALL SELECT '{state}', lane, false, count(*), NULL"
    # State by state: each has its index.
    f" FROM (SELECT lane FROM jobs WHERE state = '{state}' LIMIT :limit) AS part GROUP BY lane"
    for state in (JobState.QUEUED, JobState.RUNNING, JobState.RETRY_WAIT, JobState.QUARANTINED)
)


def get_job(session: Session, job_id: int) -> Job:
    job = session.get(Job, job_id)
    if job is None:
        raise MaskwatchError(f"there is no job {job_id}; list them: maskwatch jobs list")
    return job


# --- small parts ------------------------------------------------------------------------------------------


def _arrays(refs: Sequence[JobRef]) -> dict[str, str]:
    # As Postgres writes arrays: psycopg looks at each element of a list to find its type.
    return {
        "ids": f"{{{','.join(str(ref.id) for ref in refs)}}}",
        "tokens": f"{{{','.join(str(ref.token) for ref in refs)}}}",
    }


def _count(session: Session, statement: str, parameters: dict[str, Any]) -> int:
    result = session.execute(sql(statement), parameters)
    assert isinstance(result, CursorResult)
    return result.rowcount


def _storable(detail: str | None) -> str | None:
    """Postgres holds no NUL in text, and a ledger no novels."""
    return None if detail is None else detail.replace("\0", "\\0")[:DETAIL_LIMIT]
