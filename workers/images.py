"""Image jobs of a group: while one picture is analysed the next ones are read, and each ends by itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from common import metrics
from common.database import session_scope
from common.domain import Face, ObservedAt, PermanentJobError, Reason
from common.ledger import ClaimedJob
from common.metrics import Stage
from common.planning import observed_from_file, zone
from common.settings import Settings
from common.storage import open_bucket
from common.telemetry import working_on
from workers import attempts
from workers.attempts import Heartbeat
from workers.decoding import decode_image
from workers.inference import runtime_of
from workers.recording import record_image


def analyze_images(
    jobs: Sequence[ClaimedJob],
    heartbeat: Heartbeat,
    settings: Settings,
    *,
    draining: Callable[[], bool],
    deadline: float,
) -> int:
    """End each of these jobs, or give it back if there is no time left; returns how many pictures were analysed.

    deadline: by `time.monotonic()`. Looked at between pictures: Celery's soft limit would raise in the middle of
    whatever runs just then.
    """
    analysed = 0
    waiting = deque(jobs)
    try:
        for job, read in read_ahead(jobs, settings):
            if draining() or time.monotonic() > deadline:
                break
            waiting.popleft()
            if job.ref.id not in heartbeat.lost:
                analysed += _analyze(job, read, settings)
            heartbeat.done(job)
    finally:
        # Not begun, because we were asked to stop or ran out of time: somebody else may have them.
        attempts.release(job for job in waiting if job.ref.id not in heartbeat.lost)
    return analysed


def _analyze(job: ClaimedJob, read: Callable[[], bytes], settings: Settings) -> bool:
    def work() -> None:
        faces, seen = analyze_bytes(job, read(), settings)
        with metrics.stage(Stage.WRITE), session_scope() as session:
            record_image(session, job, faces, seen, fence=settings.ledger.fence)
        metrics.analysed(job.kind, [faces])

    return attempts.settle(job, work, settings)


def analyze_bytes(job: ClaimedJob, data: bytes, settings: Settings) -> tuple[list[Face], ObservedAt]:
    """The faces in these bytes, and when the camera saw them."""
    with metrics.stage(Stage.DECODE):
        image = decode_image(data, max_pixels=settings.worker.max_image_pixels)
    faces = attempts.analyzer(job.spec, runtime_of(settings)).analyze(image.rgb)
    check_faces(len(faces), Reason.IMAGE_TOO_LARGE, settings)
    return faces, observed_from_file(job.observed_at, image.exif_time, job.last_modified, zone(job.time_zone))


def check_faces(count: int, reason: Reason, settings: Settings) -> None:
    """Raises `PermanentJobError` for more faces than a photograph can show: a pattern made for the detector."""
    limit = settings.worker.max_faces
    if count > limit:
        raise PermanentJobError(
            reason, f"{count:,} faces were found in it, the limit is {limit:,}; is it one? MASKWATCH_WORKER__MAX_FACES"
        )


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
    # In a thread of its own, for a job that is worked on later.
    with working_on(job.ref.id, job.attempt), metrics.stage(Stage.READ):
        return open_bucket(job.bucket).read(job.key, job.etag, settings.storage.max_object_bytes)
