"""Prefetches items: a thread fills a bounded queue, and the consumer empties it in groups."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def ahead(
    items: Iterable[T],
    *,
    size_of: Callable[[T], int],
    alike: Callable[[T, T], bool],
    max_size: int,
    max_items: int,
) -> Generator[list[T], None, None]:
    """The items in their order, in groups of waiting items that are `alike`, `max_items` at most.

    `items` is iterated in a thread of its own. The thread pauses while the waiting items and the consumer's group add
    up to `max_size` or more; it always fetches at least one item. When the consumer leaves, the thread ends after its
    current item, and closes a generator, so that no code of it runs later, when its source may be gone. An error of
    `items` is raised after the items before it. A group belongs to the consumer until it asks for the next one, and is
    emptied then.
    """
    changed = threading.Condition()
    waiting: deque[T] = deque()
    state = _State()

    def fill() -> None:
        try:
            for item in items:
                with changed:
                    waiting.append(item)
                    state.held += size_of(item)
                    changed.notify_all()
                    changed.wait_for(lambda: state.held < max_size or state.left)
                    if state.left:
                        return
        except BaseException as error:  # any error is passed to the consumer
            state.error = error
        finally:
            try:
                if isinstance(items, Generator):
                    items.close()
            finally:
                with changed:
                    state.ended = True
                    changed.notify_all()

    # In a copy of this thread's context, so that log lines there name the job, too.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(fill,), name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or state.ended)
                group: list[T] = []
                while waiting and len(group) < max_items and (not group or alike(group[0], waiting[0])):
                    group.append(waiting.popleft())
            if not group:
                break
            yield group
            freed = sum(size_of(item) for item in group)
            group.clear()
            with changed:
                state.held -= freed
                changed.notify_all()
        if state.error is not None:
            raise state.error
    finally:
        with changed:
            state.left = True
            changed.notify_all()
        thread.join()


class _State:
    """State shared by both threads; changed only under the condition's lock."""

    def __init__(self) -> None:
        #: The size of the waiting items and of the consumer's group.
        self.held = 0
        self.ended = False
        self.left = False
        self.error: BaseException | None = None
