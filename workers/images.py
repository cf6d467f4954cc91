"""A group of image jobs: claimed together, ended one by one.

While one picture is analysed the next ones are read; a heartbeat renews the leases as long as there is
progress. Whatever goes wrong with one picture ends in the ledger, and the rest goes on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType

from sqlalchemy.exc import DBAPIError

from common import ledger
from common.database import DatabaseDownError, is_lost, session_scope
from common.domain import (
    Face,
    MaskwatchError,
    MediaKind,
    ObservedAt,
    PermanentJobError,
    PipelineSpec,
    Reason,
    SourceChangedError,
    TransientJobError,
)
from common.ledger import ClaimedJob, JobRef, StaleJobError
from common.planning import PlannedObject, observed_from_file, zone
from common.settings import Settings
from common.storage import open_bucket
from common.tables import Camera, Location, Pipeline
from common.telemetry import get_logger
from workers.decoding import decode_image
from workers.inference import Runtime, runtime_of
from workers.pipeline import PictureAnalyzer, load_analyzer
from workers.recording import record_image

log = get_logger(__name__)


def analyze_group(
    refs: Sequence[JobRef], *, worker: str, settings: Settings, draining: Callable[[], bool] = lambda: False
) -> int:
    """Claim these jobs and end each of them; returns how many pictures were analysed.

    Jobs whose token has changed since they were sent are not ours to do, and are dropped.
    """
    limits = settings.ledger
    with session_scope() as session:
        jobs = ledger.claim(session, refs, worker=worker, lease_seconds=limits.lease_seconds, fence=limits.fence)
    if len(jobs) < len(refs):
        log.info("dropped jobs of an outdated message", dropped=len(refs) - len(jobs))
    try:
        for spec in {job.spec for job in jobs}:
            analyzer(spec, runtime_of(settings))
    except Exception as error:  # whatever a runtime raises when it can't load a model
        _release(iter(jobs))
        raise UnfitWorkerError(str(error)) from error
    analysed = 0
    # Looked at between pictures: Celery's soft limit would raise in the middle of whatever runs just then.
    deadline = time.monotonic() + settings.worker.soft_time_limit_seconds
    with Heartbeat(jobs, settings) as heartbeat:
        waiting = deque(jobs)
        try:
            for job, read in read_ahead(jobs, settings):
                if draining() or time.monotonic() > deadline:
                    break
                waiting.popleft()
                if job.ref.id not in heartbeat.lost:
                    analysed += _finish(job, read, settings)
                heartbeat.done(job)
        finally:
            # Not begun, because we were asked to stop or ran out of time: somebody else may have them.
            _release(job for job in waiting if job.ref.id not in heartbeat.lost)
    return analysed


def _release(jobs: Iterator[ClaimedJob]) -> None:
    for job in jobs:
        try:
            with session_scope() as session:
                ledger.release(session, job)
        except StaleJobError:
            log.info("lost before release", job=job.ref.id)


def _finish(job: ClaimedJob, read: Callable[[], bytes], settings: Settings) -> bool:
    """Analyse one picture and end its job, one way or another; whether it was analysed."""
    limits = settings.ledger
    try:
        try:
            faces, seen = analyze_bytes(job, read(), settings)
            with session_scope() as session:
                record_image(session, job, faces, seen, fence=limits.fence)
            return True
        except PermanentJobError as error:
            with session_scope() as session:
                ledger.quarantine(session, job, error.reason, f"{job.uri}: {error.detail}")
            log.warning("quarantined", job=job.ref.id, uri=job.uri, reason=error.reason.value, detail=error.detail)
        except SourceChangedError as error:
            _plan_new_version(job, str(error), settings)
        except TransientJobError as error:
            _retry_later(job, error.reason, error.detail, settings)
        except (StaleJobError, DatabaseDownError):
            # Without the database there is no ledger to tell: the lease runs out, and the job is found.
            raise
        except Exception as error:
            if isinstance(error, DBAPIError) and is_lost(error):
                raise
            # A fault of ours or of a library: tried again, then kept for a person to look at.
            log.exception("unexpected error", job=job.ref.id, uri=job.uri)
            _retry_later(job, Reason.UNEXPECTED_ERROR, f"{type(error).__name__}: {error}", settings)
    except StaleJobError as error:
        log.warning("stale commit refused", job=job.ref.id, uri=job.uri, detail=str(error))
    return False


def analyze_bytes(job: ClaimedJob, data: bytes, settings: Settings) -> tuple[list[Face], ObservedAt]:
    """The faces in these bytes, and when the camera saw them."""
    image = decode_image(data, max_pixels=settings.worker.max_image_pixels)
    faces = analyzer(job.spec, runtime_of(settings)).analyze(image.rgb)
    return faces, observed_from_file(job.observed_at, image.exif_time, job.last_modified, zone(job.time_zone))


@lru_cache(maxsize=2)
def analyzer(spec: PipelineSpec, runtime: Runtime) -> PictureAnalyzer:
    """The loaded models of a pipeline; two, so that a change of pipeline in mid-archive does not thrash."""
    return load_analyzer(spec, runtime)


def _retry_later(job: ClaimedJob, reason: Reason, detail: str, settings: Settings) -> None:
    limits = settings.ledger
    with session_scope() as session:
        state = ledger.retry_later(
            session,
            job,
            reason,
            f"{job.uri}: {detail}",
            max_attempts=limits.max_attempts,
            base=limits.retry_base_seconds,
            cap=limits.retry_cap_seconds,
        )
    log.warning("failed", job=job.ref.id, uri=job.uri, reason=reason.value, detail=detail, state=state.value)


def _plan_new_version(job: ClaimedJob, detail: str, settings: Settings) -> None:
    """The object was replaced after planning: end this job, and register what lies there now."""
    try:
        found = open_bucket(job.bucket).stat(job.key)
    except PermanentJobError as error:
        with session_scope() as session:
            ledger.quarantine(session, job, error.reason, error.detail)
        return
    except TransientJobError as error:
        _retry_later(job, error.reason, error.detail, settings)
        return
    if found.etag == job.etag:
        _retry_later(job, Reason.STORAGE_UNAVAILABLE, f"{detail}, and then had it again", settings)
        return
    with session_scope() as session:
        location = session.get_one(Location, job.location_id)
        camera = session.get_one(Camera, job.camera_id) if job.camera_id is not None else None
        pipeline = session.get_one(Pipeline, job.pipeline_id)
        ledger.source_changed(session, job, f"{job.uri}: {detail}")
        registered = ledger.register(
            session,
            [PlannedObject(found, MediaKind.IMAGE, job.observed_at)],
            location=location,
            camera=camera,
            pipeline=pipeline,
            lane=job.lane,
            backfill_id=job.backfill_id,
            newest=True,
        )
    log.info("source changed", job=job.ref.id, uri=job.uri, planned=registered.new)


def read_ahead(jobs: Sequence[ClaimedJob], settings: Settings) -> Iterator[tuple[ClaimedJob, Callable[[], bytes]]]:
    """Each job with a function that returns its object's bytes, or raises what reading them raised.

    Up to `worker.read_ahead` objects, and no more than `worker.read_ahead_bytes`, are fetched ahead.
    """
    ahead: deque[tuple[ClaimedJob, Future[bytes]]] = deque()
    to_start = deque(jobs)
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="read") as pool:
        try:
            while ahead or to_start:
                while to_start and (not ahead or _has_room([job for job, _ in ahead], to_start[0], settings)):
                    job = to_start.popleft()
                    ahead.append((job, pool.submit(_read, job, settings)))
                job, future = ahead.popleft()
                yield job, future.result
        finally:
            for _, future in ahead:
                future.cancel()


def _has_room(ahead: Sequence[ClaimedJob], following: ClaimedJob, settings: Settings) -> bool:
    size = sum(job.size_bytes for job in ahead) + following.size_bytes
    return len(ahead) <= settings.worker.read_ahead and size <= settings.worker.read_ahead_bytes


def _read(job: ClaimedJob, settings: Settings) -> bytes:
    return open_bucket(job.bucket).read(job.key, job.etag, settings.storage.max_object_bytes)


class UnfitWorkerError(Exception):
    """This worker can't load what its jobs are pinned to; others may. It must stop, not fail them one by one."""


class Heartbeat:
    """Renews the leases of a group's unfinished jobs from a thread of its own, while there is progress.

    `lost` holds the ids that the ledger no longer counts as ours. Their work is not interrupted (native code
    can't be), but its commit would be refused.
    """

    def __init__(self, jobs: Sequence[ClaimedJob], settings: Settings) -> None:
        self.lost: set[int] = set()
        self._limits = settings.ledger
        self._held = {job.ref.id: job.ref for job in jobs}
        self._progress_at = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def done(self, job: ClaimedJob) -> None:
        """The job has ended: no lease to renew, and a sign of progress."""
        with self._lock:
            self._held.pop(job.ref.id, None)
            self._progress_at = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(self._limits.heartbeat_seconds):
            with self._lock:
                held = dict(self._held)
                stalled = time.monotonic() - self._progress_at > self._limits.stall_seconds
            if stalled:
                log.error("no progress: leases are left to run out", jobs=sorted(held))
                continue
            try:
                with session_scope() as session:
                    mine = ledger.renew(session, list(held.values()), lease_seconds=self._limits.lease_seconds)
            except (MaskwatchError, DBAPIError):
                log.warning("heartbeat failed", exc_info=True)
                continue
            with self._lock:
                # A job that ended while we asked is not lost, it is done.
                self.lost |= {job_id for job_id in held if job_id not in mine and job_id in self._held}
