"""Aggregators side by side: one is stopped between counting an hour and writing it, while another begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

from common.database.versions import AGGREGATION_LOCK
from common.domain import ObservedAt, ObservedAtSource
from tests.ledger_rows import claim, dispatch, face, planned, register, scalar
from tests.services import wait_until
from workers.jobs.recording import record_image
from workers.summaries.aggregation import recompute

EIGHT = datetime(2026, 3, 2, 8, tzinfo=UTC)


def commit_image(session: Session, key: str, faces: int) -> None:
    """What a worker does: a picture of the hour from eight, its mark in the same transaction."""
    register(session, planned(key, at=EIGHT))
    (job,) = claim(session, dispatch(session))
    record_image(session, job, [face()] * faces, ObservedAt(EIGHT, ObservedAtSource.KEY_PATTERN))
    session.commit()


Batch = Callable[[Session, int], tuple[int, int]]


def overtake(session: Session, batch: Batch) -> str:
    """An aggregator has counted an hour and not yet written it when a picture of that hour is committed and
    a second aggregator begins. Tells whether the second one "waits" for the first, or "ends" before it."""
    commit_image(session, "first.jpg", faces=1)
    with ThreadPoolExecutor(2) as threads, held_before_writing(session) as held:
        first = threads.submit(aggregate, session, batch, held=True)
        assert waits_or_ends(session, first, PAUSE_LOCK) == "waits"
        commit_image(session, "late.jpg", faces=2)
        second = threads.submit(aggregate, session, batch)
        outcome = waits_or_ends(session, second, AGGREGATION_LOCK)
        assert not first.done()
        held.release()
        assert first.result(timeout=60) == second.result(timeout=60) == (1, 1)
    return outcome


def aggregate(session: Session, batch: Batch, *, held: bool = False) -> tuple[int, int]:
    """One batch in a transaction of its own; `held` stops it where `held_before_writing` says."""
    with Session(session.bind) as own, own.begin():
        own.execute(text("SET LOCAL statement_timeout = '60s'"))
        if held:
            own.execute(text("SET LOCAL maskwatch_test.held = 'yes'"))
        return batch(own, 100)


def batch_without_the_lock(session: Session, limit: int) -> tuple[int, int]:
    """Aggregators side by side: each takes marks that no other has taken, and recomputes their hours."""
    taken = session.execute(
        text(
            "DELETE FROM dirty_marks WHERE id IN"
            " (SELECT id FROM dirty_marks ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED)"
            " RETURNING location_id, pipeline_id, hour"
        ),
        {"limit": limit},
    ).all()
    return len(taken), recomputed(session, taken)


def recomputed(session: Session, marks: Sequence[Any]) -> int:
    hours = sorted({tuple(mark) for mark in marks})
    recompute(session, hours)
    return len(hours)


#: Any constant that nothing else locks.
PAUSE_LOCK = 0x7465_7374


@dataclass
class Held:
    """Holds the lock that the transaction to be stopped waits for."""

    connection: Connection

    def release(self) -> None:
        self.connection.execute(text("SELECT pg_advisory_unlock_all()"))


@contextmanager
def held_before_writing(session: Session) -> Iterator[Held]:
    """Stop a transaction that asks for it inside its INSERT: what it will write is counted, nothing is written.

    A trigger, because one statement counts and writes: its snapshot is taken, and does not change while it waits.
    """
    assert isinstance(session.bind, Engine)
    with session.bind.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(
            text(
                "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS"
                f" $$ BEGIN PERFORM pg_advisory_xact_lock({PAUSE_LOCK}); RETURN NEW; END $$"
            )
        )
        try:
            connection.execute(
                text(
                    "CREATE TRIGGER hold BEFORE INSERT ON compliance_hourly FOR EACH ROW"
                    " WHEN (current_setting('maskwatch_test.held', true) = 'yes') EXECUTE FUNCTION hold()"
                )
            )
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": PAUSE_LOCK})
            held = Held(connection)
            try:
                yield held
            finally:
                held.release()
        finally:
            connection.execute(text("DROP FUNCTION hold CASCADE"))


def waits_or_ends(session: Session, batch: Future[tuple[int, int]], lock: int) -> str:
    """What comes first: Postgres says that someone waits for this advisory lock, or the batch has ended."""

    def outcome() -> str | None:
        if batch.done():
            return "ends"
        waiting = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND classid = 0 AND objid = CAST(:lock AS oid) AND objsubid = 1"
        )
        return "waits" if scalar(session, waiting, lock=lock) == 1 else None

    answer = wait_until(outcome, what="waiting for the lock, or ending")
    assert isinstance(answer, str)
    return answer
