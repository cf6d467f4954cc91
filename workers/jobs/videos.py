"""Jobs of videos: a probe plans the chunks, and each chunk is analysed by a job. A video is never read whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from fractions import Fraction

from common.database.sessions import session_scope
from common.domain import FrameFaces, JobKind, ObjectInfo, PermanentJobError, Reason, TransientJobError
from common.ledger import ClaimedJob, StaleJobError
from common.observability import metrics
from common.observability.metrics import Stage
from common.planning import chunk_ranges
from common.settings import Settings
from common.timestamps import recording_start
from workers.analysis.video import SampledFrame, analyze_frames
from workers.inference import runtime_of
from workers.jobs import attempts, models
from workers.jobs.attempts import DrainedError
from workers.jobs.heartbeat import Heartbeat
from workers.jobs.images import check_faces
from workers.jobs.recording import Shortfall, record_chunk, record_probe
from workers.media.containers import NoMemoryError
from workers.media.frames import to_rgb
from workers.media.opening import opened
from workers.media.sampling import Grid, Sampler

#: How often, in seconds, a job checks whether it should go on, between two wanted frames.
CHECK_SECONDS = 0.2
#: A job that runs out of time or memory at this attempt is not tried again: the file needs too much. Before that,
#: the worker may have been the cause.
LAST_ATTEMPT = 2
#: Bytes that a video must have for each of its chunks: a tiny file that claims to last a week would make 10,000 jobs.
MIN_CHUNK_BYTES = 256


def run_video_job(
    job: ClaimedJob, heartbeat: Heartbeat, settings: Settings, *, draining: Callable[[], bool], deadline: float
) -> bool:
    """Run the job of a probe or a chunk and end it, or give it back; returns whether it succeeded. deadline: by
    `time.monotonic()`."""

    def go_on() -> None:
        heartbeat.progress()
        if job.ref.id in heartbeat.lost:
            raise StaleJobError(f"job {job.ref.id} is no longer this worker's")
        if draining():
            raise DrainedError
        if time.monotonic() > deadline:
            out_of_time = PermanentJobError if job.attempt >= LAST_ATTEMPT else TransientJobError
            raise out_of_time(
                Reason.TIME_LIMIT,
                f"not done within {settings.worker.soft_time_limit_seconds} s; shorten MASKWATCH_WORKER__CHUNK_SECONDS "
                "before the video is planned, or raise MASKWATCH_WORKER__SOFT_TIME_LIMIT_SECONDS",
            )

    def work() -> None:
        go_on()
        try:
            if job.kind is JobKind.CHUNK:
                analyze_chunk(job, settings, go_on)
            else:
                probe(job, settings)
        except NoMemoryError as error:
            if job.attempt < LAST_ATTEMPT:
                raise
            raise PermanentJobError(
                Reason.UNREADABLE_VIDEO,
                "it needed more memory than there was, twice: probably damaged; upload it again",
            ) from error

    return attempts.settle(job, work, settings)


def probe(job: ClaimedJob, settings: Settings) -> None:
    """Read a video's header, and plan its chunks in the transaction that ends the job."""
    with opened(ObjectInfo(job.bucket, job.key, job.etag, job.size_bytes, job.last_modified), settings) as video:
        info = video.info()
    limits = settings.worker
    if (info.duration_seconds or 0) > limits.max_video_seconds:
        raise PermanentJobError(
            Reason.VIDEO_TOO_LONG,
            f"it is {info.duration_seconds:,.0f} s long by its header, the limit is {limits.max_video_seconds:,.0f} s; "
            "split it or raise MASKWATCH_WORKER__MAX_VIDEO_SECONDS",
        )
    if info.width * info.height > limits.max_frame_pixels:
        raise PermanentJobError(Reason.FRAME_TOO_LARGE, f"its frames have {info.width} × {info.height} pixels")
    seen = recording_start(job.key_time, info.created_at, job.last_modified, info.duration_seconds)
    sparse = (info.duration_seconds or 0) * MIN_CHUNK_BYTES / job.size_bytes
    ranges = chunk_ranges(info.duration_seconds, max(limits.chunk_seconds, sparse))
    with metrics.stage(Stage.WRITE), session_scope() as session:
        record_probe(session, job, info, seen, ranges)


def analyze_chunk(job: ClaimedJob, settings: Settings, go_on: Callable[[], None] = lambda: None) -> None:
    """Analyse the frames of a chunk, and record them in the transaction that ends the job.

    `go_on` is called for each packet and each frame, and raises what should end the work early.
    """
    grid = Grid.of(job.spec)
    first = grid.first_from(job.range_start_ms)
    stop = None if job.last else grid.first_from(job.range_end_ms)
    with opened(ObjectInfo(job.bucket, job.key, job.etag, job.size_bytes, job.last_modified), settings) as video:
        sampler = Sampler(video, grid, job.spec.sample, first, stop, tick=_seldom(go_on))
        frames: list[FrameFaces] = []
        analysed = analyze_frames(
            sampled_frames(sampler, grid, job.duration_seconds),
            models.analyzer(job.spec, runtime_of(settings)),
            job.spec.sample_fps,
            buffer_bytes=settings.worker.frame_buffer_bytes,
            batch=settings.worker.batch_frames,
        )
        # Closed before the video is: its thread reads from it.
        with closing(analysed):
            for frame in analysed:
                go_on()
                check_faces(len(frame.faces), Reason.FRAME_TOO_LARGE, settings)
                frames.append(frame)
                _check_frames(len(frames), settings)
    shortfall = _shortfall(job, sampler, bool(frames))
    with metrics.stage(Stage.WRITE), session_scope() as session:
        record_chunk(session, job, frames, shortfall)
    metrics.analysed(job.kind, [frame.faces for frame in frames])


def _check_frames(count: int, settings: Settings) -> None:
    limit = settings.worker.max_frames
    if count > limit:
        raise PermanentJobError(
            Reason.VIDEO_TOO_LONG,
            f"there are more than {limit:,} frames to analyse in one job; analyse fewer per second "
            "(--sample-fps), shorten MASKWATCH_WORKER__CHUNK_SECONDS or raise MASKWATCH_WORKER__MAX_FRAMES",
        )


def _seldom(call: Callable[[], None]) -> Callable[[], None]:
    """A function that may be called for each packet, and calls `call` at most every `CHECK_SECONDS`."""
    due = 0.0

    def now_and_then() -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + CHECK_SECONDS
            call()

    return now_and_then


def sampled_frames(sampler: Sampler, grid: Grid, duration_seconds: float | None) -> Iterator[SampledFrame]:
    """The frames that a sampler takes, as RGB images for the analyzer."""
    samples = iter(sampler)
    while True:
        with metrics.stage(Stage.DECODE):
            sample = next(samples, None)
            if sample is None:
                return
            rgb = to_rgb(sample.frame)
        # The last cell ends with the video. Its end is taken from the header, so that the chunk length changes nothing.
        end = grid.start(sample.cell + 1)
        if duration_seconds is not None and Fraction(duration_seconds) > sample.at:
            end = min(end, Fraction(duration_seconds))
        yield SampledFrame(rgb, sample.at, end - grid.start(sample.cell))
        # Not kept while the next one is decoded: a frame takes up to 100 MB.
        del sample, rgb


def _shortfall(job: ClaimedJob, sampler: Sampler, something: bool) -> Shortfall | None:
    """Why frames of a chunk are missing, or None. Raises `PermanentJobError` if the whole chunk is missing."""
    if sampler.cut_off_at is not None:
        until = timedelta(milliseconds=round(sampler.cut_off_at * 1000))
        of = "" if job.duration_seconds is None else f" of {timedelta(milliseconds=round(job.duration_seconds * 1000))}"
        detail = f"the video is cut off: it can be decoded up to {until}{of}"
        if not something and sampler.cut_off_at * 1000 <= job.range_start_ms:
            raise PermanentJobError(
                Reason.TRUNCATED_VIDEO, f"{detail}, which is before this chunk; upload it again, whole"
            )
        return Shortfall(Reason.TRUNCATED_VIDEO, f"{job.uri}: {detail}; until there it was analysed")
    if sampler.undecodable:
        return Shortfall(
            Reason.DAMAGED_VIDEO,
            f"{job.uri}: the video is damaged: {sampler.undecodable} of the frames to analyse could not be decoded; "
            "the others were analysed",
        )
    return None
