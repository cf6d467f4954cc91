"""A worker's moves of its jobs: claim, renew, and the ends of an attempt.

Every write names id and token and requires the state `running`: a worker that was paused past its lease, or whose job
was cancelled, gets `StaleJobError` and its transaction rolls back. That is the fence. Only the database's clock decides
whether a lease has run out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.database.tables import Job, MediaObject
from common.domain import (
    REFUSALS,
    AttemptOutcome,
    JobKind,
    JobRef,
    JobState,
    Lane,
    ObservedAt,
    ObservedAtSource,
    PausePolicy,
    PipelineSpec,
    Reason,
    VideoInfo,
)
from common.ledger import circuit_breaker
from common.ledger.registration import insert_chunks, keep_from_erasing, set_observed_at, storable
from common.ledger.transitions import (
    RENEW,
    SAID,
    SENT,
    Attempt,
    StaleJobError,
    Transition,
    count_moved,
    held_refs,
    move,
    transition,
)
from common.ledger.withdrawal import PLANNED


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that this worker holds, with all that the worker needs to do it."""

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
    #: For an image or a probe: the time in the key, if it has one. For a chunk: the start of the recording.
    observed_at: ObservedAt | None
    location_id: int
    time_zone: str
    camera_id: int | None
    pipeline_id: int
    backfill_id: int | None
    lane: Lane
    #: The pipeline's spec as stored; `spec` parses it.
    stored_spec: dict[str, Any]
    #: Half-open range of a chunk, in ms of the file's own time; 0 and 0 for others.
    range_start_ms: int = 0
    range_end_ms: int = 0
    #: Whether this is the last chunk of its video, which reaches to the end of the file.
    last: bool = False
    #: For a chunk: the video's duration by its header.
    duration_seconds: float | None = None
    #: From when it was queued to when it was claimed.
    queued_seconds: float = 0.0

    @property
    def spec(self) -> PipelineSpec:
        """Raises `UnknownSpecError` if this version doesn't know all of the spec: then give the job back."""
        return PipelineSpec.from_dict(self.stored_spec)

    @property
    def uri(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def key_time(self) -> ObservedAt | None:
        """The time in the key, if it has one; a newer version of the object is planned with it, too."""
        seen = self.observed_at
        return seen if seen is not None and seen.source is ObservedAtSource.KEY_PATTERN else None


#: The job's own columns that `claim` needs.
_OF_THE_JOB = (
    "id", "token", "kind", "attempt", "media_object_id", "source_id", "pipeline_id", "backfill_id", "lane",
    "range_start_ms", "range_end_ms", "started_at", "queued_at",
)  # fmt: skip

#: What `claim` selects of a job: names and SQL expressions.
_CLAIMED = {
    "id": "moved.id",
    "token": "moved.token",
    "kind": "moved.kind",
    "attempt": "moved.attempt",
    "media_object_id": "moved.media_object_id",
    "source_id": "moved.source_id",
    "pipeline_id": "moved.pipeline_id",
    "backfill_id": "moved.backfill_id",
    "lane": "moved.lane",
    "range_start_ms": "moved.range_start_ms",
    "range_end_ms": "moved.range_end_ms",
    "duration_seconds": "m.duration_seconds",
    "queued_seconds": "extract(epoch FROM moved.started_at - moved.queued_at)::float",
    "last": f"""moved.kind = 'chunk' AND NOT EXISTS (
           SELECT
           FROM jobs
           WHERE jobs.kind = 'chunk' AND jobs.media_object_id = moved.media_object_id
             AND jobs.pipeline_id = moved.pipeline_id AND jobs.range_start_ms >= moved.range_end_ms AND {PLANNED}
       )""",
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

_CLAIM = transition(
    (JobState.QUEUED,),
    JobState.RUNNING,
    SENT,
    sets={
        "attempt": "jobs.attempt + 1",
        "worker": ":worker",
        "started_at": "clock_timestamp()",
        "lease_until": "clock_timestamp() + make_interval(secs => :lease)",
    },
    by_key=True,
    returning=_OF_THE_JOB,
    select=f"""
SELECT {", ".join(f"{value} AS {name}" for name, value in _CLAIMED.items())}
FROM moved
JOIN media_objects m ON m.id = moved.media_object_id
JOIN locations l ON l.id = m.location_id
JOIN pipelines p ON p.id = moved.pipeline_id
CROSS JOIN set_config('synchronous_commit', 'off', true)
ORDER BY moved.id""",
    columns=tuple(_CLAIMED),
)


def claim(session: Session, refs: Sequence[JobRef], *, worker: str, lease_seconds: float) -> list[ClaimedJob]:
    """queued → running for those of `refs` whose state and token are as they were sent; the others are dropped.

    The commit does not wait for the disk. If Postgres crashes before this commit's log reaches the disk, the job is
    queued again under its old token: this worker's writes are refused, and the reconciler treats the job's message as
    lost.
    """
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
        for row in move(session, _CLAIM, {**held_refs(refs), "worker": worker, "lease": lease_seconds})
    ]


def _known_time(row: Any) -> ObservedAt | None:
    """When the object was taken, if that is settled before the object is read."""
    # Only a time from the key is settled; a rerun reads EXIF again. For a chunk, the probe has settled the time.
    if row.observed_at_source == ObservedAtSource.KEY_PATTERN.value or row.kind == JobKind.CHUNK.value:
        return ObservedAt(row.observed_at, ObservedAtSource(row.observed_at_source), row.observed_at_ambiguous)
    return None


#: The state of a worker's jobs, as a parameter: so no plan uses the index of all running jobs (ADR 11).
_RUNNING = {"running": JobState.RUNNING.value}


def renew(session: Session, refs: Collection[JobRef], *, lease_seconds: float) -> set[int]:
    """Heartbeat: renew the leases of these running jobs; returns the ids that are still the caller's."""
    rows = session.execute(sql(RENEW), {**held_refs(list(refs)), **_RUNNING, "lease": lease_seconds})
    return set(rows.scalars())


# --- ends -------------------------------------------------------------------------------------------------


def _ends(new: JobState, outcome: AttemptOutcome, **sets: str) -> Transition:
    """running → `new` for one job, with the reason and detail of its attempt."""
    return transition(
        (JobState.RUNNING,),
        new,
        """
        FROM jobs
        WHERE jobs.id = :id AND jobs.token = :token
        """,
        sets={**sets, **SAID},
        attempt=Attempt(outcome, ":reason", ":detail"),
        by_key=True,
        counted=True,
        one=True,
    )


_SUCCEED = _ends(JobState.SUCCEEDED, AttemptOutcome.SUCCEEDED, alone="false")
_QUARANTINE = _ends(JobState.QUARANTINED, AttemptOutcome.QUARANTINED)
_GIVE_UP = _ends(JobState.QUARANTINED, AttemptOutcome.QUARANTINED, failures="jobs.failures + 1")
_CHANGE = _ends(JobState.SOURCE_CHANGED, AttemptOutcome.SOURCE_CHANGED)
_RELEASE = _ends(JobState.PENDING, AttemptOutcome.RELEASED, attempt="jobs.attempt - 1")
#: Full jitter (M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015).
_RETRY_LATER = _ends(
    JobState.RETRY_WAIT,
    AttemptOutcome.RETRIED,
    failures="jobs.failures + 1",
    next_run_at="clock_timestamp() + make_interval(secs => random() * least(:cap, :base * power(2, jobs.failures)))",
)
#: Spread at random, so that jobs put off together are not all tried together.
AFTER_A_CHECK = "clock_timestamp() + make_interval(secs => (0.5 + random() / 2) * :check)"
_GIVE_BACK = _ends(JobState.RETRY_WAIT, AttemptOutcome.RELEASED, attempt="jobs.attempt - 1", next_run_at=AFTER_A_CHECK)
_AWAIT = _ends(JobState.RETRY_WAIT, AttemptOutcome.RETRIED, next_run_at=AFTER_A_CHECK)


def _end(
    session: Session,
    ref: JobRef,
    how: Transition,
    reason: Reason | None = None,
    detail: str | None = None,
    **parameters: float,
) -> None:
    """End a running attempt. Raises `StaleJobError` when the job is no longer the caller's."""
    said = {"reason": reason.value if reason else None, "detail": storable(detail)}
    if not count_moved(session, how, {"id": ref.id, "token": ref.token, **said, **parameters}):
        raise StaleJobError(f"job {ref.id} is no longer held under token {ref.token}")


def succeed(
    session: Session, job: ClaimedJob, seen: ObservedAt, *, reason: Reason | None = None, detail: str | None = None
) -> None:
    """running → succeeded. The caller writes the job's rows in this same transaction.

    `reason` and `detail` say what is missing if only a part could be analysed.

    Raises `StaleJobError` when the job is no longer the caller's.
    """
    if seen != job.observed_at:
        set_observed_at(session, job.media_object_id, seen)
    _end(session, job.ref, _SUCCEED, reason, detail)
    circuit_breaker.answered(session, job.source_id)


#: Jobs of different media objects in one statement, which also clears the refusals of their sources.
_SUCCEED_ALL = transition(
    (JobState.RUNNING,),
    JobState.SUCCEEDED,
    SENT,
    sets={"alone": "false", "reason": "NULL", "detail": "NULL"},
    attempt=Attempt(AttemptOutcome.SUCCEEDED),
    by_key=True,
    counted=True,
    returning=("id", "source_id"),
    after=f"""
answered AS (
    UPDATE sources
    SET {circuit_breaker.ANSWERED}
    FROM (
        SELECT id
        FROM sources
        WHERE refusals > 0 AND id IN (SELECT source_id FROM moved)
        ORDER BY id
        FOR NO KEY UPDATE
    ) AS refusing
    WHERE sources.id = refusing.id
)""",
)


def succeed_all(session: Session, ended: Sequence[tuple[ClaimedJob, ObservedAt]]) -> None:
    """running → succeeded for jobs of different media objects; all or none: raises `StaleJobError` when one is no
    longer the caller's. Otherwise as `succeed`."""
    for job, seen in sorted(ended, key=lambda pair: pair[0].media_object_id):
        if seen != job.observed_at:
            set_observed_at(session, job.media_object_id, seen)
    count = count_moved(session, _SUCCEED_ALL, held_refs([job.ref for job, _ in ended]))
    if count != len(ended):
        ids = [job.ref.id for job, _ in ended]
        raise StaleJobError(f"{len(ended) - count} of these jobs are no longer held: {ids}")


def retry_later(
    session: Session, job: ClaimedJob, reason: Reason, detail: str, *, max_attempts: int, base: float, cap: float
) -> JobState:
    """running → retry_wait after a transient error, or → quarantined when `max_attempts` such errors are used up.

    The wait is drawn from [0, min(cap, base * 2**failures)) seconds. Returns the new state.
    """
    spent = session.scalar(select(Job.failures).where(Job.id == job.ref.id, Job.token == job.ref.token))
    if spent is not None and spent + 1 >= max_attempts:
        _end(session, job.ref, _GIVE_UP, reason, f"{detail} (given up after {max_attempts} tries)")
        return JobState.QUARANTINED
    _end(session, job.ref, _RETRY_LATER, reason, detail, base=base, cap=cap)
    return JobState.RETRY_WAIT


def await_restore(
    session: Session, job: ClaimedJob, detail: str, *, check_seconds: float, wait_seconds: float
) -> JobState:
    """running → retry_wait for an archived object whose restore was requested less than `wait_seconds` ago, to be tried
    again after half to all of `check_seconds`; that counts as no failure. → quarantined for any other archived object.
    Returns the new state."""
    asked = session.scalar(sql(_ASKED), {"media": job.media_object_id, "wait": wait_seconds})
    if asked:
        _end(session, job.ref, _AWAIT, Reason.ARCHIVED, detail, check=check_seconds)
        return JobState.RETRY_WAIT
    late = " (its restore was requested, and has not ended in time)" if asked is False else ""
    _end(session, job.ref, _QUARANTINE, Reason.ARCHIVED, detail + late)
    return JobState.QUARANTINED


_ASKED = """
SELECT restore_requested_at > clock_timestamp() - make_interval(secs => :wait)
FROM media_objects
WHERE id = :media
"""


def quarantine(session: Session, job: ClaimedJob, reason: Reason, detail: str) -> None:
    """running → quarantined after an error that another try can't help."""
    _end(session, job.ref, _QUARANTINE, reason, detail)
    if reason not in (*REFUSALS, Reason.OBJECT_GONE):
        circuit_breaker.answered(session, job.source_id)


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
    """The source denied or throttled the job's object (`domain.REFUSALS`): count that, and move the job.

    While the source still gives other objects, a denied object is quarantined at once and a throttled one tried again
    (`retry_later`). Once the source is paused, both wait, spread over the pause's longest wait, and count as failed
    tries. Returns the new state.
    """
    held = session.scalar(sql(_LOCK_HELD), {"id": job.ref.id, "token": job.ref.token, **_RUNNING})
    if held is None:
        raise StaleJobError(f"job {job.ref.id} is no longer held under token {job.ref.token}")
    paused = circuit_breaker.refused(session, job.source_id, reason, storable(detail) or "", policy)
    if paused:
        wait = policy.cap_seconds
        return retry_later(session, job, reason, detail, max_attempts=max_attempts, base=wait, cap=wait)
    if reason is Reason.STORAGE_UNAVAILABLE:
        return retry_later(session, job, reason, detail, max_attempts=max_attempts, base=base, cap=cap)
    quarantine(session, job, reason, detail)
    return JobState.QUARANTINED


_LOCK_HELD = """
SELECT id
FROM jobs
WHERE id = :id AND token = :token AND state = :running
FOR UPDATE
"""


def source_changed(session: Session, job: ClaimedJob, detail: str) -> None:
    """running → source_changed: the object is no longer the planned one. The caller registers the new version."""
    keep_from_erasing(session)
    session.execute(select(MediaObject.id).where(MediaObject.id == job.media_object_id).with_for_update())
    _end(session, job.ref, _CHANGE, Reason.SOURCE_CHANGED, detail)


def release(session: Session, job: ClaimedJob) -> None:
    """running → pending without counting the attempt: the worker was asked to stop before it did this job."""
    _end(session, job.ref, _RELEASE)


def give_back(session: Session, job: ClaimedJob, detail: str, *, check_seconds: float) -> None:
    """running → retry_wait without counting the attempt: this worker can't do the job, but another one may. The job is
    sent again after half to all of `check_seconds`."""
    _end(session, job.ref, _GIVE_BACK, detail=detail, check=check_seconds)


# --- probes -----------------------------------------------------------------------------------------------


def settled_start(session: Session, job: ClaimedJob) -> ObservedAt | None:
    """When a video's recording began, if another pipeline has planned chunks with that time: LastModified may have
    changed since then, but the start of the recording must stay the same. Call it in the transaction that ends the
    probe, after `plan_chunks`."""
    row = session.execute(sql(_SETTLED), {"media": job.media_object_id, "pipeline": job.pipeline_id}).first()
    return None if row is None else ObservedAt(row[0], ObservedAtSource(row[1]), row[2])


_SETTLED = f"""
SELECT observed_at, observed_at_source, observed_at_ambiguous
FROM media_objects m
WHERE id = :media AND observed_at IS NOT NULL
  AND EXISTS (
      SELECT
      FROM jobs
      WHERE media_object_id = m.id AND kind = 'chunk' AND pipeline_id <> :pipeline AND {PLANNED}
  )
"""


def plan_chunks(session: Session, job: ClaimedJob, info: VideoInfo, ranges_ms: Sequence[tuple[int, int]]) -> int:
    """Store the header of a probed video and insert its chunk jobs; returns how many are new.

    Call it in the transaction that ends the probe. A video that has a plan already keeps it, whatever the length of its
    chunks: a second plan would count frames twice.
    """
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
        raise StaleJobError(f"the object of job {job.ref.id} was erased")
    return insert_chunks(
        session,
        ranges_ms,
        media=job.media_object_id,
        source=job.source_id,
        pipeline=job.pipeline_id,
        backfill=job.backfill_id,
        lane=job.lane.value,
    )
