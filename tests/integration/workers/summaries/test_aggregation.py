"""Summaries always equal a full recompute, however the work was interleaved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import Session

from common.database.versions import AGGREGATION_LOCK
from common.domain import MaskStatus, ObservedAt, ObservedAtSource
from tests.ledger_rows import claim, dispatch, face, planned, register, rows, scalar
from tests.services import wait_until
from workers.jobs.recording import record_image
from workers.summaries.aggregation import recompute, summarize, summarize_batch

#: Summed by an analyst's GROUP BY over the faces, and by the aggregator.
DIRECT = """
SELECT date_trunc('hour', f.observed_at, l.time_zone) AS hour, count(*), count(*) FILTER (WHERE status = 'with_mask'),
       count(*) FILTER (WHERE status = 'without_mask'), count(*) FILTER (WHERE status = 'uncertain')
FROM faces f JOIN locations l ON l.id = f.location_id GROUP BY 1 ORDER BY 1
"""
SUMMARY = "SELECT hour, faces, with_mask, without_mask, uncertain FROM compliance_hourly WHERE faces > 0 ORDER BY hour"


def analyse(session: Session, at: list[datetime], zone: str = "UTC", seed: int = 1) -> None:
    """One picture per time, with up to three faces of any status."""
    draw = random.Random(seed)
    objects = [planned(f"{seed}-{n}.jpg", at=instant) for n, instant in enumerate(at)]
    register(session, *objects, zone=zone)
    for job in claim(session, dispatch(session, 1000)):
        assert job.observed_at is not None
        faces = [face(draw.choice(list(MaskStatus))) for _ in range(draw.randrange(4))]
        record_image(session, job, faces, job.observed_at)
        session.commit()


def test_summaries_equal_a_group_by(session: Session) -> None:
    start = datetime(2026, 3, 28, 20, tzinfo=UTC)  # over the night Berlin's clocks change
    analyse(session, [start + timedelta(minutes=11 * n) for n in range(60)], zone="Europe/Berlin")
    assert summarize() > 5
    assert rows(session, DIRECT) == rows(session, SUMMARY) != []
    assert scalar(session, "SELECT sum(frames) FROM compliance_hourly") == 60
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 0


def test_an_hour_of_a_half_hour_zone_and_of_a_half_hour_change(session: Session) -> None:
    # Lord Howe Island sets its clocks back by half an hour: on 5 April 2026 its hour from 01:00 lasts 90 minutes.
    start = datetime(2026, 4, 4, 12, tzinfo=UTC)
    analyse(session, [start + timedelta(minutes=7 * n) for n in range(50)], zone="Australia/Lord_Howe")
    summarize()
    assert rows(session, DIRECT) == rows(session, SUMMARY) != []


def test_late_footage_changes_only_its_own_hour(session: Session) -> None:
    base = datetime(2026, 3, 2, 8, tzinfo=UTC)
    analyse(session, [base, base + timedelta(hours=1)])
    summarize()
    before = rows(session, "SELECT hour, summarized_at FROM compliance_hourly ORDER BY hour")
    analyse(session, [base + timedelta(minutes=5)], seed=2)
    assert summarize() == 1
    after = rows(session, "SELECT hour, summarized_at FROM compliance_hourly ORDER BY hour")
    assert [row.hour for row in before] == [row.hour for row in after]
    assert before[0].summarized_at < after[0].summarized_at and before[1] == after[1]
    assert rows(session, DIRECT) == rows(session, SUMMARY)


def test_hours_with_images_and_no_faces_are_there(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    assert job.observed_at is not None
    record_image(session, job, [], job.observed_at)
    session.commit()
    summarize()
    assert rows(session, "SELECT frames, faces FROM compliance_hourly") == [(1, 0)]
    assert rows(session, "SELECT compliance_rate, rate_low FROM compliance_by_hour") == [(None, None)]


def test_an_hour_whose_rows_were_withdrawn_disappears(session: Session) -> None:
    analyse(session, [datetime(2026, 3, 2, 8, tzinfo=UTC)])
    summarize()
    late = datetime(2026, 3, 3, tzinfo=UTC)
    register(session, planned("1-0.jpg", etag="e2", modified=late, at=datetime(2026, 3, 2, 8, tzinfo=UTC)))
    summarize()
    assert scalar(session, "SELECT count(*) FROM compliance_hourly") == 0


EIGHT = datetime(2026, 3, 2, 8, tzinfo=UTC)


def commit_image(session: Session, key: str, faces: int) -> None:
    """What a worker does: a picture of the hour from eight, its mark in the same transaction."""
    register(session, planned(key, at=EIGHT))
    (job,) = claim(session, dispatch(session))
    record_image(session, job, [face()] * faces, ObservedAt(EIGHT, ObservedAtSource.KEY_PATTERN))
    session.commit()


def test_what_is_committed_while_an_aggregator_works_keeps_its_mark(session: Session) -> None:
    commit_image(session, "first.jpg", faces=1)
    with Session(session.bind) as aggregator, aggregator.begin():
        assert summarize_batch(aggregator, 100) == (1, 1)
        commit_image(session, "late.jpg", faces=2)
    assert scalar(session, FACES_SUMMARIZED) == 1
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 1
    assert summarize() == 1
    assert rows(session, DIRECT) == rows(session, SUMMARY) == [(EIGHT, 3, 3, 0, 0)]


def test_marks_taken_after_counting_would_lose_it(session: Session) -> None:
    commit_image(session, "first.jpg", faces=1)
    with Session(session.bind) as aggregator, aggregator.begin():
        recomputed(aggregator, aggregator.execute(text("SELECT location_id, pipeline_id, hour FROM dirty_marks")).all())
        commit_image(session, "late.jpg", faces=2)
        aggregator.execute(text("DELETE FROM dirty_marks"))
    assert summarize() == 0
    assert rows(session, DIRECT) == [(EIGHT, 3, 3, 0, 0)]
    assert scalar(session, FACES_SUMMARIZED) == 1


def test_a_second_aggregator_waits_until_the_first_has_committed(session: Session) -> None:
    commit_image(session, "first.jpg", faces=1)
    with ThreadPoolExecutor(1) as threads, Session(session.bind) as first, first.begin():
        assert summarize_batch(first, 100) == (1, 1)
        commit_image(session, "late.jpg", faces=2)
        second = threads.submit(aggregate, session, summarize_batch)
        assert waits_or_ends(session, second, AGGREGATION_LOCK) == "waits"
        first.commit()
        assert second.result(timeout=60) == (1, 1)
    assert rows(session, DIRECT) == rows(session, SUMMARY) == [(EIGHT, 3, 3, 0, 0)]


def test_of_two_aggregators_the_one_that_counted_last_writes_last(session: Session) -> None:
    assert overtake(session, summarize_batch) == "waits"
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 0
    assert rows(session, DIRECT) == rows(session, SUMMARY) == [(EIGHT, 3, 3, 0, 0)]


def test_without_the_lock_the_older_count_would_overwrite_the_newer(session: Session) -> None:
    assert overtake(session, batch_without_the_lock) == "ends"
    assert summarize() == 0  # no mark is left that would mend it
    assert rows(session, DIRECT) == [(EIGHT, 3, 3, 0, 0)]
    assert scalar(session, FACES_SUMMARIZED) == 1


FACES_SUMMARIZED = "SELECT sum(faces)::int FROM compliance_hourly"

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
