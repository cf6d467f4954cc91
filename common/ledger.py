"""The ledger: the state machine of jobs and all its SQL. Nothing else writes to `jobs`.

    pending         to be sent. From: registration, a due retry, a lost lease or message, an operator's retry or rerun
    queued          a message with this job's id and token is on its way to a worker
    running         a worker holds the lease and the token
    retry_wait      a transient error; pending again at `next_run_at`
    succeeded       final: its faces, frame counts and dirty marks were written in the same transaction. Only an
                    operator's rerun, which removes them again, and a newer version of the key lead out of it
    quarantined     needs a person; `reason` and `detail` say why
    source_changed  the object was replaced after planning; the new version has a job of its own
    cancelled       an operator's wish (and back by his retry), or a newer version of the key took its place

Every transition changes `token`. Every write of a worker names id and token and requires the state
`running`: a worker that was paused past its lease, or whose job was cancelled, gets `StaleJobError` and its
transaction rolls back. That is the fence. Leases are judged by the database's clock alone.

A source that refuses everything pauses itself (`common/sources.py`): its pending jobs are passed over, and those it
refused wait for their turn instead of filling the quarantine.

Every function receives a session and leaves the commit to its caller. Media objects are locked before their jobs,
jobs before their sources, and rows of one table in the order of their ids, so that no two of these transactions
deadlock.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from common import audit, sources
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
UNPLACED = (Reason.TIME_PATTERN_MISMATCH, Reason.NONEXISTENT_LOCAL_TIME)

#: Reasons that no retry helps against.
HOPELESS = (*UNPLACED, Reason.PURGED)

#: Whether a chunk belongs to the plan of its video as it stands: those of a withdrawn version's plan don't. One that an
#: operator has cancelled does: its neighbours must not do its part.
_PLANNED = "({jobs}.state NOT IN ('cancelled', 'source_changed') OR {jobs}.reason = 'cancelled_by_operator')"

_ACTIVE = ", ".join(f"'{state.value}'" for state in ACTIVE_STATES)

#: Held by transactions that register objects (shared) and that erase some: "maskwatch erase".
_ERASE_LOCK = 0x6D77_6572


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
    spec: PipelineSpec
    #: Half-open range of a chunk, in ms of the file's own time; 0 and 0 for others.
    range_start_ms: int = 0
    range_end_ms: int = 0
    #: The last chunk of its video: it goes on to the end of the file.
    last: bool = False
    #: Of a chunk's video, by its header.
    duration_seconds: float | None = None

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
    """
    result = Registered()
    if not planned:
        return result
    bucket = planned[0].info.bucket
    by_key = {item.info.key: item for item in _not_erased(session, planned)}
    result.erased = len(planned) - len(by_key)
    if not by_key:
        return result
    source_id = sources.ensure(session, bucket)
    purged = purged_before(session)
    # The time of a local file is whatever its writer set, so it tells nothing of the order.
    newest = newest or bucket == FILE_BUCKET
    older = _lock_older(session, bucket, by_key, newest=newest)
    while True:
        _supersede(session, older)
        result.superseded += len(older)
        result.new += _revive(session, bucket, by_key)
        session.execute(
            insert(MediaObject)
            .values([_media_values(item, location, camera) for item in by_key.values()])
            .on_conflict_do_nothing()
        )
        # What another registered meanwhile, and the insert had to wait for, is seen only now.
        older = _lock_older(session, bucket, by_key, newest=newest)
        if not older:
            break
    current = session.execute(
        select(MediaObject.id, MediaObject.key, MediaObject.location_id, MediaObject.camera_id).where(
            MediaObject.bucket == bucket,
            tuple_(MediaObject.key, MediaObject.revision).in_([(k, i.info.etag) for k, i in by_key.items()]),
            MediaObject.superseded_at.is_(None),
        )
    ).all()
    jobs = []
    for media_id, key, location_id, camera_id in current:
        if (location_id, camera_id) != (location.id, camera.id if camera else None):
            result.elsewhere += 1
            result.first_elsewhere = result.first_elsewhere or f"{bucket}/{key}"
        jobs.append(
            {
                "media_object_id": media_id,
                "source_id": source_id,
                "pipeline_id": pipeline.id,
                "backfill_id": backfill_id,
                "lane": lane.value,
                **_job_values(by_key[key], purged),
            }
        )
    made: Sequence[Any] = ()
    if jobs:
        made = session.execute(insert(Job).values(jobs).on_conflict_do_nothing().returning(Job.id, Job.state)).all()
    result.new += len(made)
    result.quarantined = sum(state is JobState.QUARANTINED for _, state in made)
    result.known = len(by_key) - result.new
    placed = [item for item in by_key.values() if item.reason is None and item.observed_at]
    _replan(session, bucket, placed, location, camera)
    return result


def _media_values(item: PlannedObject, location: Location, camera: Camera | None) -> dict[str, Any]:
    seen = item.observed_at
    return {
        "bucket": item.info.bucket,
        "key": item.info.key,
        "revision": item.info.etag,
        "etag": item.info.etag,
        "size_bytes": item.info.size_bytes,
        "last_modified": item.info.last_modified,
        "kind": item.kind,
        "location_id": location.id,
        "camera_id": camera.id if camera else None,
        "observed_at": seen.instant if seen else None,
        "observed_at_source": seen.source if seen else None,
        "observed_at_ambiguous": seen.ambiguous if seen else False,
    }


def _job_values(item: PlannedObject, purged: datetime | None) -> dict[str, Any]:
    """Of the first job of an object: what it is, and why it can't be done, if so."""
    reason, detail = item.reason, item.detail
    if reason is None and purged is not None and item.observed_at is not None and item.observed_at.instant < purged:
        reason, detail = Reason.PURGED, f"{item.info.uri}: {purged_detail(item.observed_at.instant, purged)}"
    return {
        "kind": JobKind.IMAGE if item.kind is MediaKind.IMAGE else JobKind.PROBE,
        "state": JobState.QUARANTINED if reason else JobState.PENDING,
        "reason": reason,
        "detail": detail,
        "finished_at": func.clock_timestamp() if reason else None,
    }


def purged_detail(seen_at: datetime, purged: datetime) -> str:
    """Why footage of purged time is refused."""
    return f"seen at {seen_at:%Y-%m-%d %H:%M:%S} UTC, and everything before {purged:%Y-%m-%d} was purged"


def _not_erased(session: Session, planned: Sequence[PlannedObject]) -> list[PlannedObject]:
    """Those that nobody has erased."""
    _keep_from_erasing(session)
    by_hash = {_uri_hash(item.info.uri): item for item in planned}
    erased = session.execute(
        text("SELECT uri_sha256 FROM erased_objects WHERE uri_sha256 = ANY(:hashes)"), {"hashes": list(by_hash)}
    ).scalars()
    gone = set(map(bytes, erased))
    return [item for uri_hash, item in by_hash.items() if uri_hash not in gone]


def _keep_from_erasing(session: Session) -> None:
    """Before media objects are locked by who registers some: an erasure waits for us, or we for it and then see what
    it erased."""
    session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": _ERASE_LOCK})


def _uri_hash(uri: str) -> bytes:
    return hashlib.sha256(uri.encode()).digest()


def _lock_older(session: Session, bucket: str, by_key: dict[str, PlannedObject], *, newest: bool) -> list[int]:
    """Lock the current versions of these keys; returns those that the planned ones are to replace.

    A version that is seen again with a later time was put again: what is older than that must not replace it.
    """
    current = session.execute(
        select(MediaObject.id, MediaObject.key, MediaObject.revision, MediaObject.last_modified)
        .where(MediaObject.bucket == bucket, MediaObject.key.in_(list(by_key)), MediaObject.superseded_at.is_(None))
        .order_by(MediaObject.id)
        .with_for_update()
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
    return [
        media_id
        for media_id, key, revision, modified in current
        if revision != by_key[key].info.etag and (newest or modified <= by_key[key].info.last_modified)
    ]


def _supersede(session: Session, media_ids: Sequence[int]) -> None:
    if media_ids:
        session.execute(
            update(MediaObject).where(MediaObject.id.in_(media_ids)).values(superseded_at=func.clock_timestamp())
        )
        _withdraw(session, media_ids, "a newer version of the key was registered")


def _revive(session: Session, bucket: str, by_key: dict[str, PlannedObject]) -> int:
    """Bytes that were replaced and are back: their media object is current again, its jobs start over.

    Only a key without a current version is concerned, which is one that `_supersede` has just dealt with.
    """
    rows = session.execute(
        text(
            "WITH back AS (UPDATE media_objects m SET superseded_at = NULL, last_modified = seen.modified"
            " FROM unnest(CAST(:keys AS text[]), CAST(:etags AS text[]), CAST(:times AS timestamptz[]))"
            " AS seen (key, etag, modified) WHERE m.bucket = :bucket AND m.key = seen.key AND m.revision = seen.etag"
            " AND m.superseded_at IS NOT NULL AND NOT EXISTS (SELECT FROM media_objects c WHERE c.bucket = m.bucket"
            " AND c.key = m.key AND c.superseded_at IS NULL) RETURNING m.id"
            "), again AS (SELECT j.id FROM jobs j JOIN back ON back.id = j.media_object_id"
            # Chunks are planned anew by the probe, perhaps with another length or start of the recording.
            " WHERE j.state IN ('cancelled', 'source_changed') AND j.kind <> 'chunk' ORDER BY j.id FOR UPDATE OF j"
            f") UPDATE jobs SET {_ANEW} FROM again WHERE jobs.id = again.id RETURNING jobs.id"
        ),
        {
            "bucket": bucket,
            "keys": list(by_key),
            "etags": [item.info.etag for item in by_key.values()],
            "times": [item.info.last_modified for item in by_key.values()],
        },
    )
    return len(rows.all())


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
            " AND state <> 'source_changed' AND (state <> 'cancelled' OR reason = 'cancelled_by_operator'"
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
    session: Session, *, limit: int, alone: bool, epoch: str, video_counts_as: int = 1
) -> list[DispatchedJob]:
    """pending → queued for at most `limit` jobs, live lane first. Publish only after the commit.

    `alone` selects the jobs that are sent in a message of their own. A video's job counts as `video_counts_as` of the
    limit: it fills a message that would hold so many pictures. Those of paused sources are passed over. SKIP LOCKED:
    two dispatchers share the work instead of waiting for each other.
    """
    return _queue(
        session,
        "WITH picked AS ("
        # Source by source, so that a paused one costs nothing, however many of its jobs wait.
        " SELECT next.id, next.lane, next.kind FROM sources CROSS JOIN LATERAL ("
        # A literal and not a parameter, so that every plan can use the index of its half.
        f"  SELECT id, lane, kind FROM jobs WHERE source_id = sources.id AND state = 'pending'"
        f"  AND {'alone' if alone else 'NOT alone'} ORDER BY lane, id LIMIT :limit FOR UPDATE SKIP LOCKED) AS next"
        " WHERE sources.paused_at IS NULL ORDER BY next.lane, next.id LIMIT :limit"
        "), chosen AS (SELECT id, sum(CASE kind WHEN 'image' THEN 1 ELSE :video END) OVER (ORDER BY lane, id)"
        " <= :limit AS fits FROM picked)",
        {"limit": limit, "epoch": epoch, "video": video_counts_as},
    )


def take_trials(session: Session, *, epoch: str, policy: PausePolicy) -> list[DispatchedJob]:
    """pending → queued for one job of each paused source whose trial is due; each is to be sent alone."""
    taken: list[DispatchedJob] = []
    for source_id in sources.take_due_trials(session, policy):
        taken += _queue(
            session,
            "WITH chosen AS (SELECT id, true AS fits FROM jobs WHERE source_id = :source AND state = 'pending'"
            " ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)",
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


def claim(
    session: Session, refs: Sequence[JobRef], *, worker: str, lease_seconds: float, fence: bool = True
) -> list[ClaimedJob]:
    """queued → running for those of `refs` that still stand as they were sent; the others are dropped.

    `fence=False` exists for the tests that show what the fence is for: any message then runs its job.
    """
    condition = "AND jobs.token = sent.token AND jobs.state = 'queued'" if fence else ""
    rows = session.execute(
        text(
            "WITH wanted AS ("
            " SELECT jobs.id FROM jobs JOIN unnest(CAST(:ids AS bigint[]), CAST(:tokens AS uuid[]))"
            f" AS sent (id, token) ON jobs.id = sent.id {condition}"
            " ORDER BY jobs.id FOR UPDATE OF jobs"
            "), held AS ("
            " UPDATE jobs SET state = 'running', token = gen_random_uuid(), attempt = attempt + 1, worker = :worker,"
            " started_at = clock_timestamp(), lease_until = clock_timestamp() + make_interval(secs => :lease)"
            " FROM wanted WHERE jobs.id = wanted.id RETURNING jobs.*"
            ") SELECT held.id, held.token, held.kind, held.attempt, held.media_object_id, held.source_id,"
            " held.pipeline_id, held.backfill_id, held.lane, held.range_start_ms, held.range_end_ms,"
            " m.duration_seconds,"
            " held.kind = 'chunk' AND NOT EXISTS (SELECT FROM jobs later WHERE later.kind = 'chunk'"
            " AND later.media_object_id = held.media_object_id AND later.pipeline_id = held.pipeline_id"
            f" AND later.range_start_ms >= held.range_end_ms AND {_PLANNED.format(jobs='later')}) AS last,"
            " m.bucket, m.key, m.etag, m.size_bytes, m.last_modified, m.observed_at, m.observed_at_source,"
            " m.observed_at_ambiguous, m.location_id, m.camera_id, l.time_zone, p.spec"
            " FROM held JOIN media_objects m ON m.id = held.media_object_id"
            " JOIN locations l ON l.id = m.location_id JOIN pipelines p ON p.id = held.pipeline_id ORDER BY held.id"
        ),
        {**_arrays(refs), "worker": worker, "lease": lease_seconds},
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
            spec=PipelineSpec.from_dict(row.spec),
            range_start_ms=row.range_start_ms,
            range_end_ms=row.range_end_ms,
            last=row.last,
            duration_seconds=row.duration_seconds,
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
            " ON jobs.id = held.id AND jobs.token = held.token AND jobs.state = 'running'"
            " ORDER BY jobs.id FOR UPDATE OF jobs"
            ") UPDATE jobs SET lease_until = clock_timestamp() + make_interval(secs => :lease)"
            " FROM mine WHERE jobs.id = mine.id RETURNING jobs.id"
        ),
        {**_arrays(list(refs)), "lease": lease_seconds},
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
        text("SELECT id FROM jobs WHERE id = :id AND token = :token AND state = 'running' FOR UPDATE"),
        {"id": job.ref.id, "token": job.ref.token},
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
    guard = "AND token = :token AND state = 'running'" if fence else ""
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


def recover_queued(session: Session, *, epoch: str, overdue_seconds: float, queue_empty: bool) -> int:
    """queued → pending for jobs whose message is lost: sent to a Redis that was wiped since (another epoch),
    or overdue although the queue is empty."""
    return _count(
        session,
        "WITH lost AS (SELECT id FROM jobs WHERE state = 'queued' AND (epoch IS DISTINCT FROM :epoch OR"
        " (:queue_empty AND queued_at < clock_timestamp() - make_interval(secs => :overdue)))"
        " ORDER BY id FOR UPDATE SKIP LOCKED)"
        " UPDATE jobs SET state = 'pending', token = gen_random_uuid() FROM lost WHERE jobs.id = lost.id",
        {"epoch": epoch, "queue_empty": queue_empty, "overdue": overdue_seconds},
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
        chosen = f"id = ANY(:ids) AND ({chosen} OR (state = 'cancelled' AND reason = 'cancelled_by_operator'))"
    rows = session.execute(
        text(
            f"WITH chosen AS (SELECT id FROM jobs WHERE {chosen} ORDER BY id FOR UPDATE)"
            f" UPDATE jobs SET {_ANEW} FROM chosen WHERE jobs.id = chosen.id RETURNING jobs.id"
        ),
        {"hopeless": list(HOPELESS), **({"ids": list(job_ids)} if job_ids is not None else {})},
    )
    return _recorded(session, "retry", by, rows.scalars())


def cancel(
    session: Session, job_ids: Sequence[int] | None = None, *, by: str, backfill_id: int | None = None
) -> list[int]:
    """active → cancelled, for these jobs or for those of a backfill; returns the ids that moved. `by` is recorded.

    A worker that is at one of them goes on until it asks for its lease or wants to commit, and is refused.
    """
    assert (job_ids is None) is not (backfill_id is None), "name the jobs or the backfill"
    which, value = (
        ("id = ANY(:which)", list(job_ids or ())) if backfill_id is None else ("backfill_id = :which", backfill_id)
    )
    rows = session.execute(
        text(
            "WITH stopped AS ("
            f" SELECT id, state, attempt, worker, started_at FROM jobs WHERE {which} AND state IN ({_ACTIVE})"
            " ORDER BY id FOR UPDATE"
            "), told AS (INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)"
            " SELECT id, attempt, 'cancelled', worker, started_at, :reason, :detail FROM stopped"
            " WHERE state = 'running'"
            ") UPDATE jobs SET state = 'cancelled', token = gen_random_uuid(), lease_until = NULL, worker = NULL,"
            " next_run_at = NULL, finished_at = clock_timestamp(), reason = :reason, detail = :detail"
            " FROM stopped WHERE jobs.id = stopped.id RETURNING jobs.id"
        ),
        {"which": value, "reason": Reason.CANCELLED_BY_OPERATOR.value, "detail": f"by {by}"},
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
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ERASE_LOCK})
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
    session.execute(text("UPDATE backfills SET cursor = NULL WHERE cursor = :key"), {"key": key})
    session.execute(
        text("INSERT INTO erased_objects (uri_sha256, action_id) VALUES (:hash, :action) ON CONFLICT DO NOTHING"),
        {"hash": _uri_hash(f"{bucket}/{key}"), "action": audit.record(session, "erase", by)},
    )
    return len(media_ids)


def counts_by_state(session: Session, backfill_id: int | None = None) -> dict[JobState, int]:
    """How many jobs stand in each state; of one backfill or of all."""
    query = select(Job.state, func.count()).group_by(Job.state)
    if backfill_id is not None:
        query = query.where(Job.backfill_id == backfill_id)
    found = {state: count for state, count in session.execute(query).tuples()}  # noqa: C416 - keeps the types
    return {state: found.get(state, 0) for state in JobState}


def any_active(session: Session, location: str | None = None) -> bool:
    """Whether a job of a location, or any, has something left to do. Quick, however large the ledger is."""
    # State by state, because each has its partial index; in one statement, because a job moves between them.
    of_location = (
        " AND media_object_id IN (SELECT m.id FROM media_objects m JOIN locations l ON l.id = m.location_id"
        " WHERE l.name = :location)"
    )
    where = of_location if location is not None else ""
    query = " OR ".join(f"EXISTS (SELECT FROM jobs WHERE state = '{state}'{where})" for state in ACTIVE_STATES)
    return bool(session.scalar(text(f"SELECT {query}"), {"location": location} if location is not None else {}))


def progress(session: Session, location: str | None = None) -> tuple[int, int]:
    """(active, ended) jobs of a location, or of all."""
    query = select(
        func.count().filter(Job.state.in_(ACTIVE_STATES)), func.count().filter(Job.state.not_in(ACTIVE_STATES))
    ).select_from(Job)
    if location is not None:
        query = (
            query.join(MediaObject, MediaObject.id == Job.media_object_id)
            .join(Location, Location.id == MediaObject.location_id)
            .where(Location.name == location)
        )
    active, ended = session.execute(query).one()
    return active, ended


def unsummarized(session: Session, location: str | None = None) -> int:
    """How many dirty marks of a location, or of all, wait for the aggregator."""
    query = select(func.count()).select_from(DirtyMark)
    if location is not None:
        query = query.join(Location, Location.id == DirtyMark.location_id).where(Location.name == location)
    return session.scalar(query) or 0


def get_job(session: Session, job_id: int) -> Job:
    job = session.get(Job, job_id)
    if job is None:
        raise MaskwatchError(f"there is no job {job_id}; list them: maskwatch jobs list")
    return job


# --- small parts ------------------------------------------------------------------------------------------


def _arrays(refs: Sequence[JobRef]) -> dict[str, Any]:
    return {"ids": [ref.id for ref in refs], "tokens": [ref.token for ref in refs]}


def _count(session: Session, statement: str, parameters: dict[str, Any]) -> int:
    result = session.execute(text(statement), parameters)
    assert isinstance(result, CursorResult)
    return result.rowcount


def _storable(detail: str | None) -> str | None:
    """Postgres holds no NUL in text, and a ledger no novels."""
    return None if detail is None else detail.replace("\0", "\\0")[:DETAIL_LIMIT]
