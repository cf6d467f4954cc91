"""The ledger: the state machine of jobs and all its SQL. Nothing else writes to `jobs`.

    pending         to be sent. From: registration, a due retry, a lost lease or message, an operator's retry
    queued          a message with this job's id and token is on its way to a worker
    running         a worker holds the lease and the token
    retry_wait      a transient error; pending again at `next_run_at`
    succeeded       final: its faces, frame counts and dirty marks were written in the same transaction
    quarantined     needs a person; `reason` and `detail` say why
    source_changed  the object was replaced after planning; the new version has a job of its own
    cancelled       an operator's wish, or a newer version of the key took its place

Every transition changes `token`. Every write of a worker names id and token and requires the state
`running`: a worker that was paused past its lease, or whose job was cancelled, gets `StaleJobError` and its
transaction rolls back. That is the fence. Leases are judged by the database's clock alone.

Every function receives a session and leaves the commit to its caller. Media objects are locked before their
jobs, and rows of one table in the order of their ids, so that no two of these transactions deadlock.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from common.domain import (
    ACTIVE_STATES,
    AttemptOutcome,
    JobKind,
    JobState,
    Lane,
    MaskwatchError,
    MediaKind,
    ObservedAt,
    ObservedAtSource,
    PipelineSpec,
    Reason,
    VideoInfo,
)
from common.planning import PlannedObject
from common.storage import FILE_BUCKET
from common.tables import Camera, DirtyMark, Job, Location, MediaObject, Pipeline

#: How much of an error's text is kept.
DETAIL_LIMIT = 2000


#: Reasons of objects whose time is unknown: only a pattern that fits can help them.
UNPLACED = (Reason.TIME_PATTERN_MISMATCH, Reason.NONEXISTENT_LOCAL_TIME)

#: Whether a chunk belongs to the plan of its video as it stands: those of a withdrawn version's plan don't.
_PLANNED = "{jobs}.state NOT IN ('cancelled', 'source_changed')"


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
    time gets its second chance when the new one can.

    `newest` says that the objects were just looked at, whatever their times say; without it a version that was
    modified before the current one is taken for a listing that another producer has overtaken.
    """
    result = Registered()
    if not planned:
        return result
    bucket = planned[0].info.bucket
    by_key = {item.info.key: item for item in planned}
    # The time of a local file is whatever its writer set, so it tells nothing of the order.
    result.superseded = _supersede_older(session, bucket, by_key, newest=newest or bucket == FILE_BUCKET)
    result.new += _revive(session, bucket, by_key)
    session.execute(
        insert(MediaObject)
        .values([_media_values(item, location, camera) for item in by_key.values()])
        .on_conflict_do_nothing()
    )
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
        jobs.append(_job_values(media_id, by_key[key], pipeline, lane, backfill_id))
    made: Sequence[Any] = ()
    if jobs:
        made = session.execute(insert(Job).values(jobs).on_conflict_do_nothing().returning(Job.id, Job.state)).all()
    result.new += len(made)
    result.quarantined = sum(state is JobState.QUARANTINED for _, state in made)
    result.known = len(planned) - result.new
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


def _job_values(
    media_id: int, item: PlannedObject, pipeline: Pipeline, lane: Lane, backfill_id: int | None
) -> dict[str, Any]:
    return {
        "media_object_id": media_id,
        "pipeline_id": pipeline.id,
        "backfill_id": backfill_id,
        "kind": JobKind.IMAGE if item.kind is MediaKind.IMAGE else JobKind.PROBE,
        "lane": lane.value,
        "state": JobState.QUARANTINED if item.reason else JobState.PENDING,
        "reason": item.reason,
        "detail": item.detail,
        "finished_at": func.clock_timestamp() if item.reason else None,
    }


def _supersede_older(session: Session, bucket: str, by_key: dict[str, PlannedObject], *, newest: bool) -> int:
    current = session.execute(
        select(MediaObject.id, MediaObject.key, MediaObject.revision, MediaObject.last_modified)
        .where(MediaObject.bucket == bucket, MediaObject.key.in_(list(by_key)), MediaObject.superseded_at.is_(None))
        .order_by(MediaObject.id)
        .with_for_update()
    ).all()
    older = [
        media_id
        for media_id, key, revision, modified in current
        if revision != by_key[key].info.etag and (newest or modified <= by_key[key].info.last_modified)
    ]
    if older:
        session.execute(
            update(MediaObject).where(MediaObject.id.in_(older)).values(superseded_at=func.clock_timestamp())
        )
        _withdraw(session, older, "a newer version of the key was registered")
    return len(older)


def _revive(session: Session, bucket: str, by_key: dict[str, PlannedObject]) -> int:
    """Bytes that were replaced and are back: their media object is current again, its jobs start over.

    Only a key without a current version is concerned, which is one that `_supersede_older` has just dealt with.
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
            ") UPDATE jobs SET state = 'pending', token = gen_random_uuid(), failures = 0, crashes = 0,"
            " lost_leases = 0, finished_at = NULL, reason = NULL, detail = NULL"
            " FROM again WHERE jobs.id = again.id RETURNING jobs.id"
        ),
        {
            "bucket": bucket,
            "keys": list(by_key),
            "etags": [item.info.etag for item in by_key.values()],
            "times": [item.info.last_modified for item in by_key.values()],
        },
    )
    return len(rows.all())


def _withdraw(session: Session, media_ids: Sequence[int], detail: str) -> None:
    """Cancel all jobs of these media objects, delete what they wrote, and mark the hours it counted in.

    A job that ended as `source_changed` keeps saying so: it is how the newer version was found.
    """
    parameters = {"ids": list(media_ids), "reason": Reason.SUPERSEDED.value, "detail": detail}
    session.execute(
        text(
            "WITH stopped AS ("
            " SELECT id, state, attempt, worker, started_at FROM jobs WHERE media_object_id = ANY(:ids)"
            " AND state NOT IN ('cancelled', 'source_changed') ORDER BY id FOR UPDATE"
            "), told AS (INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)"
            " SELECT id, attempt, 'cancelled', worker, started_at, :reason, :detail FROM stopped"
            " WHERE state = 'running'"
            ") UPDATE jobs SET state = 'cancelled', token = gen_random_uuid(), lease_until = NULL,"
            " finished_at = clock_timestamp(), reason = :reason, detail = :detail"
            " FROM stopped WHERE jobs.id = stopped.id"
        ),
        parameters,
    )
    session.execute(
        text(
            "WITH gone AS (DELETE FROM frame_counts WHERE job_id IN"
            " (SELECT id FROM jobs WHERE media_object_id = ANY(:ids)) RETURNING location_id, pipeline_id, hour)"
            " INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT DISTINCT location_id, pipeline_id, hour"
            " FROM gone"
        ),
        parameters,
    )
    session.execute(
        text("DELETE FROM faces WHERE job_id IN (SELECT id FROM jobs WHERE media_object_id = ANY(:ids))"), parameters
    )


def _replan(
    session: Session, bucket: str, placed: Sequence[PlannedObject], location: Location, camera: Camera | None
) -> None:
    """Give objects that no pattern could place in time, and now one can, their time and their turn.

    Only those of this location and camera: another's zone would read the key as another time.
    """
    if not placed:
        return
    stuck = session.execute(
        select(Job.id, MediaObject.id, MediaObject.key)
        .join(MediaObject, MediaObject.id == Job.media_object_id)
        .where(
            MediaObject.bucket == bucket,
            MediaObject.key.in_([item.info.key for item in placed]),
            MediaObject.superseded_at.is_(None),
            MediaObject.location_id == location.id,
            MediaObject.camera_id.is_not_distinct_from(camera.id if camera else None),
            Job.state == JobState.QUARANTINED,
            Job.reason.in_(UNPLACED),
        )
        .order_by(MediaObject.id)
        .with_for_update(of=MediaObject)
    ).all()
    by_key = {item.info.key: item for item in placed}
    for job_id, media_id, key in stuck:
        seen = by_key[key].observed_at
        assert seen is not None
        _set_observed_at(session, media_id, seen)
        session.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(state=JobState.PENDING, token=func.gen_random_uuid(), reason=None, detail=None, finished_at=None)
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
    limit: it fills a message that would hold so many pictures. SKIP LOCKED: two dispatchers share the work instead of
    waiting for each other.
    """
    rows = session.execute(
        text(
            "WITH picked AS ("
            # A literal and not a parameter, so that every plan can use the index of its half.
            f" SELECT id, lane, kind FROM jobs WHERE state = 'pending' AND {'alone' if alone else 'NOT alone'}"
            " ORDER BY lane, id LIMIT :limit FOR UPDATE SKIP LOCKED"
            "), counted AS (SELECT id, sum(CASE kind WHEN 'image' THEN 1 ELSE :video END) OVER (ORDER BY lane, id)"
            " AS total FROM picked"
            ") UPDATE jobs SET state = 'queued', token = gen_random_uuid(), queued_at = clock_timestamp(),"
            " epoch = :epoch FROM counted WHERE jobs.id = counted.id AND counted.total <= :limit"
            " RETURNING jobs.id, jobs.token, jobs.kind, jobs.pipeline_id, jobs.lane"
        ),
        {"limit": limit, "epoch": epoch, "video": video_counts_as},
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
            ") SELECT held.id, held.token, held.kind, held.attempt, held.media_object_id, held.pipeline_id,"
            " held.backfill_id, held.lane, held.range_start_ms, held.range_end_ms, m.duration_seconds,"
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


def plan_chunks(session: Session, job: ClaimedJob, info: VideoInfo, ranges_ms: Sequence[tuple[int, int]]) -> int:
    """Keep what a probe learned and insert the chunk jobs of its video; returns how many are new.

    Part of the transaction that ends the probe. A video that has a plan already keeps it, whatever its length of
    chunks: a second one would count its frames twice.
    """
    values = {"media": job.media_object_id, "pipeline": job.pipeline_id}
    session.execute(
        update(MediaObject)
        .where(MediaObject.id == job.media_object_id)
        .values(
            container=info.container,
            codec=info.codec,
            width=info.width,
            height=info.height,
            frame_rate=info.frame_rate,
            rotation=info.rotation,
            duration_seconds=info.duration_seconds,
        )
    )
    return _count(
        session,
        "INSERT INTO jobs (media_object_id, pipeline_id, backfill_id, kind, lane, range_start_ms, range_end_ms)"
        " SELECT :media, :pipeline, :backfill, 'chunk', :lane, start_ms, end_ms"
        " FROM unnest(CAST(:starts AS bigint[]), CAST(:ends AS bigint[])) AS planned (start_ms, end_ms)"
        " WHERE NOT EXISTS (SELECT FROM jobs WHERE media_object_id = :media AND pipeline_id = :pipeline"
        f" AND kind = 'chunk' AND {_PLANNED.format(jobs='jobs')})"
        " ORDER BY start_ms ON CONFLICT (media_object_id, pipeline_id, kind, range_start_ms, range_end_ms)"
        " DO UPDATE SET state = 'pending', token = gen_random_uuid(), failures = 0, crashes = 0, lost_leases = 0,"
        " finished_at = NULL, reason = NULL, detail = NULL, backfill_id = excluded.backfill_id, lane = excluded.lane"
        " WHERE jobs.state IN ('cancelled', 'source_changed')",
        {
            **values,
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


def source_changed(session: Session, job: ClaimedJob, detail: str) -> None:
    """running → source_changed: the object is no longer the planned one. The caller registers the new version."""
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


# --- the operator's side ----------------------------------------------------------------------------------


def retry(session: Session, job_ids: Sequence[int] | None = None) -> list[int]:
    """quarantined → pending, counters reset, for these jobs or for all; returns the ids that moved.

    Not those that no pattern could place in time: without one they would count under their upload time.
    """
    only = "AND id = ANY(:ids)" if job_ids is not None else ""
    rows = session.execute(
        text(
            f"WITH chosen AS (SELECT id FROM jobs WHERE state = 'quarantined' {only} AND reason <> ALL(:unplaced)"
            " ORDER BY id FOR UPDATE)"
            " UPDATE jobs SET state = 'pending', token = gen_random_uuid(), failures = 0, crashes = 0,"
            " lost_leases = 0, finished_at = NULL, reason = NULL, detail = NULL FROM chosen"
            " WHERE jobs.id = chosen.id RETURNING jobs.id"
        ),
        {"unplaced": list(UNPLACED), **({"ids": list(job_ids)} if job_ids is not None else {})},
    )
    return sorted(rows.scalars())


def counts_by_state(session: Session, backfill_id: int | None = None) -> dict[JobState, int]:
    """How many jobs stand in each state; of one backfill or of all."""
    query = select(Job.state, func.count()).group_by(Job.state)
    if backfill_id is not None:
        query = query.where(Job.backfill_id == backfill_id)
    found = {state: count for state, count in session.execute(query).tuples()}  # noqa: C416 - keeps the types
    return {state: found.get(state, 0) for state in JobState}


def any_active(session: Session, location: str | None = None) -> bool:
    """Whether a job of a location, or any, has something left to do. Quick, however large the ledger is."""
    for state in ACTIVE_STATES:
        # State by state, because each has its partial index.
        query = select(Job.id).where(text(f"jobs.state = '{state.value}'")).limit(1)
        if location is not None:
            query = (
                query.join(MediaObject, MediaObject.id == Job.media_object_id)
                .join(Location, Location.id == MediaObject.location_id)
                .where(Location.name == location)
            )
        if session.scalar(query) is not None:
            return True
    return False


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
    active, ended = session.execute(query).tuples().one()
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
