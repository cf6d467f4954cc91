"""A large object as a seekable file that fetches only the blocks it is asked for.

Demuxers read in small steps, jump to an index and back, and then read sequentially. So blocks are cached, and while the
reading is sequential the next blocks are prefetched during decoding. A block that could not be fetched is tried again
here, so that the reader never notices.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from common.domain import TransientJobError

#: Fetches the bytes [start, stop) of the object; raises the job errors of `common/domain.py`.
Fetch = Callable[[int, int], bytes]

#: Blocks to prefetch. At the end of a chunk, at most this many were fetched for nothing.
AHEAD = 2
#: Longest wait before the second try at a block, in seconds; doubled for each further try.
RETRY_SECONDS = 0.5


class BlockReader:
    """A seekable binary file of `size` bytes. Not for several threads at once.

    `error` holds the error of a fetch after its last try, because FFmpeg replaces its reader's error by one of its own.
    From then on the file reads as ended: FFmpeg reads again, and PyAV would only log a second error.
    """

    def __init__(self, fetch: Fetch, size: int, *, block_bytes: int, cached_blocks: int, tries: int) -> None:
        self.size = size
        self.error: Exception | None = None
        self._fetch = fetch
        self._block_bytes = block_bytes
        self._cached_blocks = max(cached_blocks, AHEAD + 2)
        self._tries = tries
        self._position = 0
        self._last_block = -1
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=AHEAD, thread_name_prefix="blocks")
        self._closed = threading.Event()
        self._sizes: list[int] = []

    @property
    def fetched_bytes(self) -> int:
        """Bytes fetched so far, prefetched ones included."""
        return sum(self._sizes)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._blocks.clear()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._position, 2: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"can't seek to {base + offset}; valid: 0 to {self.size}")
        self._position = base + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        """At most `count` bytes, and at most the rest of the block; b"" at the end of the object.

        Raises the error of a fetch, once.
        """
        if self.error is not None or self._position >= self.size or count == 0:
            return b""
        index, offset = divmod(self._position, self._block_bytes)
        try:
            block = self._block(index)
        except Exception as error:
            self.error = error
            raise
        data = block[offset:] if count < 0 else block[offset : offset + count]
        self._position += len(data)
        return data

    def _block(self, index: int) -> bytes:
        wanted = [index]
        if index == self._last_block + 1 and index > 0:
            wanted += range(index + 1, min(index + 1 + AHEAD, self._count))
        for number in wanted:
            if number not in self._blocks:
                self._blocks[number] = self._pool.submit(self._fetched, number)
        self._last_block = index
        self._blocks.move_to_end(index)
        while len(self._blocks) > self._cached_blocks:
            self._blocks.popitem(last=False)[1].cancel()
        try:
            return self._blocks[index].result()
        except Exception:
            self._blocks.pop(index, None)
            raise

    @property
    def _count(self) -> int:
        return -(-self.size // self._block_bytes)

    def _fetched(self, index: int) -> bytes:
        start = index * self._block_bytes
        stop = min(start + self._block_bytes, self.size)
        for attempt in range(1, self._tries + 1):
            try:
                data = self._fetch(start, stop)
            except TransientJobError:
                wait = random.uniform(0, RETRY_SECONDS * 2 ** (attempt - 1))
                if attempt == self._tries or self._closed.wait(wait):
                    raise
            else:
                self._sizes.append(len(data))
                return data
        raise AssertionError("unreachable: the last try returns or raises")
