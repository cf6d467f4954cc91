"""Opens a video in a store, to be read in blocks and never whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.domain import ObjectInfo, PermanentJobError, Reason
from common.observability import metrics
from common.observability.metrics import Stage
from common.settings import Settings, StorageSettings
from common.storage.blocks import BlockReader
from common.storage.opening import open_bucket
from workers.inference import runtime_of
from workers.media.containers import VideoFile


@contextmanager
def opened(info: ObjectInfo, settings: Settings) -> Iterator[VideoFile]:
    """Open a video, pinned to its ETag. Errors as `workers.media.containers.VideoFile`, and those of reading the
    object."""
    if info.size_bytes > settings.storage.max_video_bytes:
        raise PermanentJobError(
            Reason.OBJECT_TOO_LARGE,
            f"the video has {info.size_bytes:,} bytes, the limit is {settings.storage.max_video_bytes:,}; "
            "split it or raise MASKWATCH_STORAGE__MAX_VIDEO_BYTES",
        )
    with block_reader(info, settings.storage) as reader:
        # Half of the threads, because the models use all of theirs at the same time.
        threads = max(1, runtime_of(settings).threads // 2)
        video = VideoFile(reader, max_pixels=settings.worker.max_frame_pixels, threads=threads)
        try:
            yield video
        finally:
            video.close()


def block_reader(info: ObjectInfo, settings: StorageSettings) -> BlockReader:
    """An object as a file that is read in blocks."""
    store = open_bucket(info.bucket)

    def fetch(start: int, stop: int) -> bytes:
        with metrics.stage(Stage.READ):
            return store.read_range(info.key, info.etag, start, stop)

    return BlockReader(
        fetch,
        info.size_bytes,
        block_bytes=settings.block_bytes,
        cached_blocks=settings.cached_blocks,
        tries=settings.block_tries,
    )
