"""One step of the work ahead of the next: order, groups, bounds, errors, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.services import wait_until
from workers.media.prefetch import ahead

Item = tuple[str, int]


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert not running()
    yield
    assert not running()


def groups(items: Iterable[Item], *, max_size: int = 1000, max_items: int = 4) -> Iterator[list[Item]]:
    """Copies of the groups of items (kind, size); those of one kind are alike."""
    for group in ahead(
        items,
        size_of=lambda item: item[1],
        alike=lambda a, b: a[0] == b[0],
        max_size=max_size,
        max_items=max_items,
    ):
        yield list(group)


@given(
    items=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), max_size=30),
    max_size=st.integers(1, 60),
    max_items=st.integers(1, 5),
)
def test_the_order_is_kept_and_groups_are_alike(items: list[Item], max_size: int, max_items: int) -> None:
    found = list(groups(iter(items), max_size=max_size, max_items=max_items))
    assert [item for group in found for item in group] == items
    assert all(0 < len(group) <= max_items and len({kind for kind, _ in group}) == 1 for group in found)


def test_what_waits_comes_together() -> None:
    made = threading.Event()

    def items() -> Iterator[Item]:
        yield from [("a", 1)] * 7 + [("b", 1)] * 2 + [("a", 1)]
        made.set()

    found = []
    for group in groups(items(), max_items=4):
        made.wait(10)
        found.append((group[0][0], len(group)))
    # The first may have been alone, because the consumer was there before the others.
    assert sum(count for _, count in found) == 10
    assert ("a", 4) in found and ("b", 2) in found and found[-1] == ("a", 1)


def test_nothing_gives_nothing() -> None:
    assert list(groups([])) == []


@pytest.mark.parametrize(("max_size", "most"), [(25, 3), (30, 3), (31, 4), (1, 1)])
def test_the_producer_gets_no_further_ahead(max_size: int, most: int) -> None:
    made = 0

    def items() -> Iterator[Item]:
        nonlocal made
        for _ in range(12):
            made += 1
            yield ("a", 10)

    released = 0
    furthest = 0
    for group in groups(items(), max_size=max_size, max_items=2):
        # What the consumer has in hand counts, too. The producer works on until it is as far ahead as it may be.
        wait_until(lambda so_far=released: made == 12 or made - so_far >= most, seconds=10)
        time.sleep(0.03)
        furthest = max(furthest, made - released)
        released += len(group)
    assert made == released == 12
    assert furthest == most


def test_an_item_larger_than_the_limit_passes_alone() -> None:
    huge = [("a", 1), ("a", 5000), ("a", 6000), ("a", 1)]
    assert [item for group in groups(iter(huge), max_size=100) for item in group] == huge


class _OddError(Exception):
    pass


def test_an_error_comes_behind_the_items_before_it() -> None:
    def items() -> Iterator[Item]:
        yield from [("a", 1), ("b", 1), ("a", 1)]
        raise _OddError("the source is gone")

    found: list[Item] = []
    with pytest.raises(_OddError, match="the source is gone"):
        for group in groups(items()):
            time.sleep(0.02)
            found += group
    assert found == [("a", 1), ("b", 1), ("a", 1)]


def test_errors_that_are_no_exceptions_come_through() -> None:
    def items() -> Iterator[Item]:
        yield ("a", 1)
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(groups(items()))


@pytest.mark.parametrize("max_size", [1, 10_000])
def test_leaving_early_ends_the_thread_and_closes_its_source(max_size: int) -> None:
    closed_in: list[str] = []

    def items() -> Iterator[Item]:
        try:
            while True:
                time.sleep(0.001)
                yield ("a", 1)
        finally:
            closed_in.append(threading.current_thread().name)

    source = items()
    for _ in groups(source, max_size=max_size):
        break
    assert not running()
    # `source` is still held here, as it is by the traceback of an error.
    assert closed_in == ["ahead"]


@pytest.mark.parametrize("max_size", [1, 10_000])
def test_a_consumer_that_fails_leaves_no_thread_and_no_open_source(max_size: int) -> None:
    closed = threading.Event()

    def items() -> Iterator[Item]:
        try:
            while True:
                time.sleep(0.001)
                yield ("a", 1)
        finally:
            closed.set()

    def consume() -> None:
        source = items()
        for _ in groups(source, max_size=max_size):
            raise _OddError

    with pytest.raises(_OddError):
        consume()
    assert not running() and closed.is_set()


def test_leaving_before_the_first_item_waits_for_it_alone() -> None:
    went_on = threading.Event()

    def items() -> Iterator[Item]:
        yield ("a", 1)
        time.sleep(0.1)
        yield ("a", 1)
        went_on.set()
        yield ("a", 1)

    for _ in groups(items()):
        break
    assert not went_on.is_set()
