"""One step of the work ahead of the next: a thread fills a bounded queue, its consumer empties it in groups."""

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
    """The items in their order, in groups of those that wait and are `alike`, `max_items` at most.

    `items` is iterated in a thread of its own. It stops while what waits and what the consumer has in hand add up to
    more than `max_size`, so that at least one item is always on its way. When the consumer leaves, the thread ends
    behind the item at hand, and a generator is closed: nothing of it runs later, when what it reads from may be gone.
    What `items` raises is raised behind the items that came before it. A group belongs to the consumer until it asks
    for the next one, and is emptied then.
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
        except BaseException as error:  # handed over, whatever it is
            state.error = error
        finally:
            try:
                if isinstance(items, Generator):
                    items.close()
            finally:
                with changed:
                    state.ended = True
                    changed.notify_all()

    # In a copy of our context: what is logged there names the job, too.
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
    """What both threads know; changed under the condition's lock alone."""

    def __init__(self) -> None:
        #: The size of what waits and of what the consumer has in hand.
        self.held = 0
        self.ended = False
        self.left = False
        self.error: BaseException | None = None
