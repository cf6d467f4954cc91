"""An object that is read in blocks: the same bytes as a file's, few fetches, little memory, and patience."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain import PermanentJobError, Reason, SourceChangedError, TransientJobError
from common.storage import blocks
from common.storage.blocks import AHEAD, BlockReader

BLOCK = 100
CONTENT = bytes(number * 7 % 251 for number in range(20 * BLOCK - 30))


@dataclass
class Storage:
    """Hands out ranges of CONTENT and remembers which blocks were fetched, in the order of the blocks."""

    content: bytes = CONTENT
    #: What happens at a fetch of this block, before it is answered.
    faults: dict[int, Callable[[], None]] = field(default_factory=dict)
    fetched: list[int] = field(default_factory=list)

    def fetch(self, start: int, stop: int) -> bytes:
        block = start // BLOCK
        assert start % BLOCK == 0 and stop == min(start + BLOCK, len(self.content))
        self.fetched.append(block)
        self.faults.get(block, lambda: None)()
        return self.content[start:stop]

    def open(self, *, cached_blocks: int = 8, tries: int = 4) -> BlockReader:
        return BlockReader(
            self.fetch, len(self.content), block_bytes=BLOCK, cached_blocks=cached_blocks, tries=tries
        )  # fmt: skip

    def settled(self, reader: BlockReader) -> list[int]:
        """The blocks fetched, sorted, once nothing is fetched any more."""
        before = -1
        while before < len(self.fetched):
            before = len(self.fetched)
            time.sleep(0.05)
        reader.close()
        return sorted(self.fetched)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "RETRY_SECONDS", 0.0)


def raising(*errors: Exception) -> Callable[[], None]:
    """Raises these one after the other, and then nothing."""
    left = list(errors)

    def fault() -> None:
        if left:
            raise left.pop(0)

    return fault


def busy() -> TransientJobError:
    return TransientJobError(Reason.STORAGE_UNAVAILABLE, "slow down")


def read_at(reader: BlockReader, block: int) -> bytes:
    reader.seek(block * BLOCK)
    return reader.read(BLOCK)


def read_all(reader: BlockReader) -> bytes:
    return b"".join(iter(lambda: reader.read(64), b""))


READS = st.tuples(st.just("read"), st.integers(-1, 90))
SEEKS = st.tuples(st.sampled_from(["start", "here", "end"]), st.integers(-150, 350))


@given(
    content=st.binary(max_size=300),
    block_bytes=st.integers(1, 70),
    cached_blocks=st.integers(1, 9),
    steps=st.lists(READS | SEEKS, max_size=30),
)
def test_it_reads_what_a_file_reads(
    content: bytes, block_bytes: int, cached_blocks: int, steps: list[tuple[str, int]]
) -> None:
    def fetch(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(content)
        return content[start:stop]

    file = io.BytesIO(content)
    with BlockReader(fetch, len(content), block_bytes=block_bytes, cached_blocks=cached_blocks, tries=1) as reader:
        for step, number in steps:
            if step == "read":
                expected = file.read(number)
                data = reader.read(number)
                # It may give less, but nothing only where there is nothing.
                assert expected.startswith(data) and bool(data) == bool(expected)
                file.seek(len(data) - len(expected), 1)
            else:
                whence = ["start", "here", "end"].index(step)
                target = [0, file.tell(), len(content)][whence] + number
                if target < 0:
                    with pytest.raises(ValueError, match="can't seek"):
                        reader.seek(number, whence)
                else:
                    assert reader.seek(number, whence) == file.seek(number, whence) == target
            assert reader.tell() == file.tell()


def test_nothing_is_fetched_of_an_empty_object() -> None:
    storage = Storage(b"")
    with storage.open() as reader:
        assert reader.read() == reader.read(5) == b""
    assert storage.fetched == []


def test_a_block_is_fetched_once_while_it_is_cached() -> None:
    storage = Storage()
    with storage.open() as reader:
        for block in (3, 9, 3, 9, 3):
            for part in range(0, BLOCK, 10):
                reader.seek(block * BLOCK + part)
                assert reader.read(10) == CONTENT[block * BLOCK + part :][:10]
    assert sorted(storage.fetched) == [3, 9]


def test_reading_on_fetches_ahead_and_no_further_than_the_end() -> None:
    storage = Storage()
    reader = storage.open(cached_blocks=30)
    for block in (4, 5):
        read_at(reader, block)
    assert storage.settled(reader) == [4, 5, *range(6, 6 + AHEAD)]
    storage = Storage()
    reader = storage.open()
    assert read_all(reader) == CONTENT
    assert storage.settled(reader) == list(range(20))
    assert reader.fetched_bytes == len(CONTENT)


def test_jumping_fetches_what_is_read_alone() -> None:
    storage = Storage()
    reader = storage.open()
    for block in (0, 7, 3, 15, 13, 19):
        assert read_at(reader, block) == CONTENT[block * BLOCK :][:BLOCK]
    assert storage.settled(reader) == [0, 3, 7, 13, 15, 19]
    assert reader.fetched_bytes == 5 * BLOCK + BLOCK - 30


def test_the_next_block_is_fetched_while_the_last_one_is_used() -> None:
    storage = Storage()
    arrived = threading.Event()
    storage.faults[3] = arrived.set
    with storage.open() as reader:
        read_at(reader, 1)
        read_at(reader, 2)
        assert arrived.wait(10)
        assert 3 in storage.fetched
        before = len(storage.fetched)
        read_at(reader, 3)
        assert storage.fetched.count(3) == 1 and len(storage.fetched) <= before + 2


class Block(bytes):
    """Bytes that are counted while they are kept."""

    alive = 0

    def __del__(self) -> None:
        Block.alive -= 1


@pytest.mark.parametrize("cached_blocks", [4, 8])
def test_memory_is_bounded(cached_blocks: int) -> None:
    def fetch(start: int, stop: int) -> bytes:
        Block.alive += 1
        return Block(CONTENT[start:stop])

    most = 0
    with BlockReader(fetch, len(CONTENT), block_bytes=BLOCK, cached_blocks=cached_blocks, tries=1) as reader:
        for _ in range(3):
            reader.seek(0)
            while reader.read(70):
                most = max(most, Block.alive)
    # One more for each thread that has just fetched one which is not wanted any longer.
    assert cached_blocks - AHEAD <= most <= cached_blocks + AHEAD
    assert Block.alive == 0


def test_what_was_read_long_ago_goes_first() -> None:
    storage = Storage()
    reader = storage.open(cached_blocks=4)
    for block in (0, 2, 4, 6, 0, 8):
        read_at(reader, block)
    assert storage.fetched == [0, 2, 4, 6, 8]
    read_at(reader, 0)
    assert storage.fetched == [0, 2, 4, 6, 8]
    read_at(reader, 2)
    assert storage.settled(reader) == [0, 2, 2, 4, 6, 8]


def test_a_block_that_could_not_be_fetched_is_tried_again() -> None:
    storage = Storage()
    storage.faults = {block: raising(busy(), busy()) for block in (0, 4, 5, 19)}
    reader = storage.open(tries=3)
    assert read_all(reader) == CONTENT
    assert reader.error is None
    assert storage.settled(reader) == sorted([*range(20), *[0, 4, 5, 19] * 2])
    assert reader.fetched_bytes == len(CONTENT)


def test_without_tries_the_same_faults_end_it() -> None:
    storage = Storage()
    storage.faults = {4: raising(busy())}
    with storage.open(tries=1) as reader:
        with pytest.raises(TransientJobError, match="slow down") as caught:
            read_all(reader)
        assert reader.tell() == 4 * BLOCK
        assert reader.error is caught.value
        # FFmpeg, which was told of it, asks again.
        assert reader.read(10) == b""


def test_tries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage()
    storage.faults = {2: raising(*[busy() for _ in range(9)])}
    with storage.open(tries=3) as reader, pytest.raises(TransientJobError):
        read_at(reader, 2)
    assert storage.fetched == [2, 2, 2]


@pytest.mark.parametrize("error", [SourceChangedError("changed"), PermanentJobError(Reason.OBJECT_GONE, "gone")])
def test_what_no_patience_helps_against_is_not_tried_again(error: Exception) -> None:
    storage = Storage()
    storage.faults = {6: raising(error)}
    with storage.open() as reader:
        with pytest.raises(type(error)):
            read_at(reader, 6)
        assert reader.error is error
    assert storage.fetched == [6]


def test_what_fails_ahead_and_is_never_read_is_no_error() -> None:
    storage = Storage()
    storage.faults = {3: raising(PermanentJobError(Reason.OBJECT_GONE, "gone"))}
    reader = storage.open()
    for block in (1, 2, 0):
        assert read_at(reader, block)
    assert storage.settled(reader) == [0, 1, 2, 3, 4]
    assert reader.error is None


def test_close_ends_the_waiting_for_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "RETRY_SECONDS", 60.0)
    monkeypatch.setattr("random.uniform", lambda _low, high: high)
    storage = Storage()
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise busy()

    storage.faults = {2: fail}
    reader = storage.open()
    for block in (0, 1):
        read_at(reader, block)
    assert failed.wait(10)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 10
    count = len(storage.fetched)
    assert storage.fetched.count(2) == 1
    with pytest.raises(RuntimeError):
        reader.read(1) or read_at(reader, 9)
    assert len(storage.fetched) == count
