"""Image jobs of a group: while one image is analysed, the next ones are prefetched; analysed ones are recorded
together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from common.database.errors import DatabaseDownError
from common.database.sessions import session_scope
from common.domain import Face, ObservedAt, PermanentJobError, Reason
from common.ledger import ClaimedJob
from common.observability import metrics
from common.observability.logs import get_logger, working_on
from common.observability.metrics import Stage
from common.settings import Settings
from common.storage.opening import open_bucket
from common.timestamps import observed_from_file, zone
from workers.inference import runtime_of
from workers.jobs import attempts, models
from workers.jobs.heartbeat import Heartbeat
from workers.jobs.recording import AnalysedImage, record_images
from workers.media.images import decode_image

log = get_logger(__name__)


def analyze_images(
    jobs: Sequence[ClaimedJob],
    heartbeat: Heartbeat,
    settings: Settings,
    *,
    draining: Callable[[], bool],
    deadline: float,
) -> int:
    """End each of these jobs, or give it back if there is no time left; returns how many images were recorded.

    deadline: by `time.monotonic()`. Checked between images, because Celery's soft limit would raise in the middle of
    any statement.
    """
    waiting = deque(jobs)
    recorder = _Recorder(heartbeat, settings)
    try:
        for job, read in prefetched(jobs, settings):
            if draining() or time.monotonic() > deadline:
                break
            waiting.popleft()
            analysed = _analyze(job, read, settings) if job.ref.id not in heartbeat.lost else None
            if analysed is None:
                heartbeat.done(job)
            else:
                recorder.unrecorded.append(analysed)
                heartbeat.progress()
            recorder.record_if_due()
        recorder.record()
    finally:
        # Jobs that were not begun or not recorded, because of a request to stop, the deadline or an error: given back
        # for other workers.
        left = [*(analysed.job for analysed in recorder.unrecorded), *waiting]
        attempts.release(job for job in left if job.ref.id not in heartbeat.lost)
    return recorder.recorded


def _analyze(job: ClaimedJob, read: Callable[[], bytes], settings: Settings) -> AnalysedImage | None:
    """The image's faces; None if the analysis failed and the attempt has ended."""
    found: list[AnalysedImage] = []

    def work() -> None:
        found.append(AnalysedImage(job, *analyze_bytes(job, read(), settings)))

    return found[0] if attempts.settle(job, work, settings, ends=False) else None


class _Recorder:
    """Records analysed images, several at a time, because a transaction takes longer than its rows."""

    def __init__(self, heartbeat: Heartbeat, settings: Settings) -> None:
        self.unrecorded: deque[AnalysedImage] = deque()
        self.recorded = 0
        self._heartbeat = heartbeat
        self._settings = settings
        self._recorded_at = time.monotonic()

    def record_if_due(self) -> None:
        """Record the unrecorded images, if `worker.record_seconds` have passed since the last time."""
        if time.monotonic() - self._recorded_at >= self._settings.worker.record_seconds:
            self.record()

    def record(self) -> None:
        """Record all unrecorded images together; if that fails, one by one, so that one bad image doesn't stop the
        others."""
        if len(self.unrecorded) > 1:
            self._record_together()
        while self.unrecorded:
            analysed = self.unrecorded[0]
            try:
                succeeded = attempts.record(analysed.job, partial(self._write, [analysed]), self._settings)
            except DatabaseDownError:
                self.unrecorded.popleft()  # given back already, if that was possible
                raise
            self.unrecorded.popleft()
            self._ended(analysed, succeeded=succeeded)
        self._recorded_at = time.monotonic()

    def _record_together(self) -> None:
        try:
            self._write(self.unrecorded)
        except Exception:  # a lost job, purged time, no database: recording them one by one shows which
            log.info("recorded one by one", pictures=len(self.unrecorded), exc_info=True)
        else:
            while self.unrecorded:
                self._ended(self.unrecorded.popleft(), succeeded=True)

    def _write(self, images: Collection[AnalysedImage]) -> None:
        with metrics.stage(Stage.WRITE), session_scope() as session:
            record_images(session, images)

    def _ended(self, analysed: AnalysedImage, *, succeeded: bool) -> None:
        if succeeded:
            self.recorded += 1
            attempts.succeeded(analysed.job)
            metrics.analysed(analysed.job.kind, [analysed.faces])
        self._heartbeat.done(analysed.job)


def analyze_bytes(job: ClaimedJob, data: bytes, settings: Settings) -> tuple[list[Face], ObservedAt]:
    """The faces in these bytes, and when the camera saw them."""
    with metrics.stage(Stage.DECODE):
        image = decode_image(data, max_pixels=settings.worker.max_image_pixels)
    seen = observed_from_file(job.observed_at, image.exif_time, job.last_modified, zone(job.time_zone))
    faces = models.analyzer(job.spec, runtime_of(settings)).analyze(image.rgb)
    check_faces(len(faces), Reason.IMAGE_TOO_LARGE, settings)
    return faces, seen


def check_faces(count: int, reason: Reason, settings: Settings) -> None:
    """Raises `PermanentJobError` for more faces than a photograph shows: probably a pattern that fools the detector."""
    limit = settings.worker.max_faces
    if count > limit:
        raise PermanentJobError(
            reason, f"{count:,} faces found, limit {limit:,} (MASKWATCH_WORKER__MAX_FACES): probably not a photograph"
        )


def prefetched(jobs: Sequence[ClaimedJob], settings: Settings) -> Iterator[tuple[ClaimedJob, Callable[[], bytes]]]:
    """Each job with a function that returns its object's bytes, or raises the error of reading them.

    Prefetches up to `worker.prefetch_objects` objects, and no more than `worker.prefetch_bytes`.
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
    return len(ahead) <= settings.worker.prefetch_objects and size <= settings.worker.prefetch_bytes


def _read(job: ClaimedJob, settings: Settings) -> bytes:
    # Runs in a thread that has no current job, before the job is worked on.
    with working_on(job.ref.id, job.attempt), metrics.stage(Stage.READ):
        return open_bucket(job.bucket).read(job.key, job.etag, settings.storage.max_object_bytes)
