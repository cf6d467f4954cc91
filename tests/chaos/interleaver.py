"""Actors that take turns inside their transactions: each has a connection and a thread, and stops where it is told to.

The functions of the product run as they are. Before any of their statements, or before the commit, they can be made to
stop, so that others act in between. One that waits for another's lock goes on by itself as soon as that one has ended,
as it would in production. Only one of them acts at a time, so that the same turns have the same outcome.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from sqlalchemy import Connection, create_engine, event, make_url
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from tests.mutants import Rewrite, rewrite_statements

#: Commits needn't reach the disk: nobody pulls this plug here. Deadlocks are found by us, before the server does.
OPTIONS = "-c synchronous_commit=off -c timezone=UTC -c deadlock_timeout=10s"

#: How long an actor may take for one statement before it is asked whether it waits for another.
PATIENCE_SECONDS = 0.004


class KilledError(Exception):
    """This actor's process has died in mid-transaction."""


class DeadlockError(Exception):
    """Transactions wait for each other."""


@dataclass
class Task:
    """One transaction: what is done in it, and what its actor makes of the outcome."""

    name: str
    work: Callable[[Session], Any]
    #: After the commit, with what `work` returned.
    done: Callable[[Any], None] = lambda result: None
    #: After `work` has raised `refusal` and all was rolled back.
    refused: Callable[[], None] = lambda: None
    #: After its process died, and all was rolled back.
    undone: Callable[[], None] = lambda: None
    #: The jobs that it may move; None: any.
    jobs: frozenset[int] | None = None


class Hand:
    """One connection and its thread."""

    def __init__(self, engine: Engine) -> None:
        self.connection: Connection = engine.connect()
        driver = self.connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        self.pid = driver.info.backend_pid
        self.task: Task | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.finished = False
        #: It has waited for another in this transaction.
        self.waited = False
        #: It stops before its commit, too.
        self.holding = False
        self.resting = threading.Event()
        self._session: Session | None = None
        self._left: int | None = None
        self._killed = False
        self._go = threading.Semaphore(0)
        self._thread = ThreadPoolExecutor(1)
        self._future: Future[None] | None = None
        event.listen(self.connection, "before_cursor_execute", self._before_statement)

    def begin(self, task: Task, stop: int | None) -> None:
        """Start a transaction. It stops before its statement number `stop`, from 0, or before its commit if it has
        fewer; None: it doesn't."""
        self.task, self.result, self.error = task, None, None
        self.finished = self.waited = self._killed = False
        self._allow(stop)
        self._session = Session(self.connection, expire_on_commit=False)
        self._future = self._thread.submit(self._run, task.work, self._session)

    def go_on(self, stop: int | None) -> None:
        """Let it go on from where it stopped; `stop` as in `begin`."""
        if self.finished:
            self.holding = False
        else:
            self._allow(stop)
            self._go.release()

    def end(self, *, commit: bool) -> None:
        """End a finished or stopped transaction."""
        if not self.finished:
            assert not commit
            self._killed = True
            self._go.release()
        assert self._future is not None and self._session is not None
        self._future.result(60)
        if commit:
            self._session.commit()
        else:
            self._session.rollback()
        self._session.close()
        self.task = None

    def close(self) -> None:
        self._thread.shutdown()
        self.connection.close()

    def _allow(self, stop: int | None) -> None:
        self._left = stop
        self.holding = stop is not None
        self.resting.clear()

    def _run(self, work: Callable[[Session], Any], session: Session) -> None:
        try:
            self.result = work(session)
        except BaseException as error:  # reported by the thread that waits for this hand
            self.error = error
        self.finished = True
        self.resting.set()

    def _before_statement(self, *_: object) -> None:
        if self._killed:  # a rollback to a savepoint: the dead don't do that
            raise KilledError
        if self._left is None:
            return
        if self._left > 0:
            self._left -= 1
            return
        self.resting.set()
        self._go.acquire()
        if self._killed:
            raise KilledError
        # The statement it stopped before is its first now.
        if self._left:
            self._left -= 1


@dataclass
class Hands:
    """All actors' hands, and a connection that only looks."""

    engine: Engine
    look: psycopg.Connection[Any]
    hands: list[Hand]
    #: A fault that never fitted a statement was not planted.
    fitted: set[Rewrite]
    #: Called after each commit, with the task.
    committed: Callable[[Task], None] = lambda task: None
    #: The errors by which the product refuses an actor, and rolls its transaction back.
    refusal: type[Exception] | tuple[type[Exception], ...] = KilledError
    counts: Counter[str] = field(default_factory=Counter)

    def idle(self) -> Hand | None:
        return next((hand for hand in self.hands if hand.task is None), None)

    def stopped(self) -> list[Hand]:
        """Those that can go on when they are told to: neither idle nor waiting for another."""
        return [hand for hand in self.hands if hand.task is not None and hand.resting.is_set()]

    def act(self, task: Task, stop: int | None = None) -> None:
        """Let an idle hand do this, then let the hands that waited for it go on. It stops as in `Hand.begin`."""
        hand = self.idle()
        assert hand is not None
        hand.begin(task, stop)
        self.settle()

    def settle(self) -> None:
        """Wait until every hand is idle, has stopped, or waits for another."""
        moved = True
        while moved:
            moved = False
            for hand in self.hands:
                if hand.task is None or not self._rests(hand):
                    continue
                # An error ends a transaction at once; one that holds before its commit is for `go_on`.
                if hand.error is not None or (hand.finished and not hand.holding):
                    self._conclude(hand)
                    moved = True

    def kill(self, hand: Hand) -> None:
        """The process of a stopped hand dies: its transaction is rolled back."""
        task = hand.task
        assert task is not None
        hand.end(commit=False)
        self.counts["transactions killed"] += 1
        task.undone()
        self.settle()

    def abandon(self) -> None:
        """Roll back whatever is open and forget it."""
        for hand in self.hands:
            if hand.task is not None and not hand.resting.is_set():
                self.look.execute("SELECT pg_cancel_backend(%s)", (hand.pid,))
                hand.resting.wait(60)
        for hand in self.hands:
            if hand.task is not None:
                hand.end(commit=False)

    def _conclude(self, hand: Hand) -> None:
        task, error, result = hand.task, hand.error, hand.result
        assert task is not None
        hand.end(commit=error is None)
        if error is None:
            self.counts[f"{task.name} committed"] += 1
            task.done(result)
            self.committed(task)
        elif isinstance(error, self.refusal):
            self.counts["transactions refused"] += 1
            task.refused()
        else:
            raise error

    def _rests(self, hand: Hand) -> bool:
        """Whether it has stopped or finished; else it waits for the lock of another."""
        deadline = time.monotonic() + 120
        while not hand.resting.wait(PATIENCE_SECONDS):
            blockers = self._blockers(hand)
            if blockers:
                self._check_deadlock(hand, blockers)
                if not hand.waited:
                    self.counts["transactions waited"] += 1
                    hand.waited = True
                return False
            assert time.monotonic() < deadline, f"{hand.task} neither ends nor waits"
        return True

    def _blockers(self, hand: Hand) -> list[int]:
        # By the table of locks, not by what the waiting process says of itself: that one may not have noticed yet.
        found = self.look.execute("SELECT pg_blocking_pids(%s)", (hand.pid,)).fetchone()
        assert found is not None
        # A vacuum that is in the way goes by itself.
        ours = {self.look.info.backend_pid, *(each.pid for each in self.hands)}
        return [pid for pid in found[0] if pid in ours]

    def _check_deadlock(self, hand: Hand, blockers: Sequence[int]) -> None:
        by_pid = {each.pid: each for each in self.hands}
        seen, left = set[int](), list(blockers)
        while left:
            pid = left.pop()
            if pid == hand.pid:
                names = sorted(by_pid[each].task.name for each in seen | {pid} if by_pid[each].task)  # type: ignore
                raise DeadlockError(f"these wait for each other: {', '.join(names)}")
            if pid in by_pid and pid not in seen:
                seen.add(pid)
                left += self._blockers(by_pid[pid])


@contextmanager
def open_hands(url: str, count: int, *, rewrites: Sequence[Rewrite] = ()) -> Iterator[Hands]:
    """Hands on a database, whose statements are rewritten by planted faults; `Hands.fitted` says which ever fitted."""
    engine = create_engine(url, pool_size=count, connect_args={"options": OPTIONS})
    fitted = set[Rewrite]()
    rewrite_statements(engine, rewrites, fitted.add)
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True, options=OPTIONS) as look:
        hands = Hands(engine, look, [Hand(engine) for _ in range(count)], fitted)
        try:
            yield hands
        finally:
            hands.abandon()
            for hand in hands.hands:
                hand.close()
            engine.dispose()
