"""Dispatch and Redis with a large ledger.

The claims: 500 jobs per second are sent and done with 2 million in the ledger, and its statements read their partial
indexes; Redis stays under 32 MiB with a million jobs pending. In a ledger of their own: a tick takes less than 50 ms
beside 100,000 finished backfills, and less than 250 ms beside 1.2 million due retries.

    python -m benchmarks.dispatch [--jobs 2000000] [--seconds 20] [--backfills 100000] [--retries 1200000] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from common.models.pipeline import pipeline_spec
from common.settings import Settings

#: Jobs, each of an image of its own.
FILL = """
WITH objects AS (
    INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id, observed_at,
                               observed_at_source)
    SELECT 's3://archive', to_char(n, 'FM000000000') || '.jpg', 'e', 'e', 1, now(), 'image', 1, now(), 'key_pattern'
    FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n RETURNING id
)
INSERT INTO jobs (media_object_id, source_id, pipeline_id, backfill_id, kind, lane, state, finished_at, next_run_at)
SELECT id, 1, 1, :backfill, 'image', 1, CAST(:state AS text),
       CASE WHEN CAST(:state AS text) = 'succeeded' THEN now() END,
       CASE WHEN CAST(:state AS text) = 'retry_wait' THEN now() END
FROM objects
"""

#: Backfills that have ended long ago, and what each had to do.
FINISHED = """
WITH finished AS (
    INSERT INTO backfills (source, source_id, location_id, pipeline_id, finished_at)
    SELECT 's3://archive/' || n || '/', 1, 1, 1, now()
    FROM generate_series(1, CAST(:backfills AS bigint)) AS n
    RETURNING id
), objects AS (
    INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id, observed_at,
                               observed_at_source)
    SELECT 's3://archive', 'finished/' || id || '.jpg', 'e', 'e', 1, now(), 'image', 1, now(), 'key_pattern'
    FROM finished
    RETURNING id, key
)
INSERT INTO jobs (media_object_id, source_id, pipeline_id, backfill_id, kind, lane, state, finished_at)
SELECT objects.id, 1, 1, finished.id, 'image', 1, 'succeeded', now()
FROM finished
JOIN objects ON objects.key = 'finished/' || finished.id || '.jpg'
"""

#: Ticks that are measured of a kind. One more comes before them: its statements and pages are new to everybody.
TICKS = 20


@click.command()
@click.option("--jobs", default=2_000_000, show_default=True, help="Jobs in the ledger; half of them pending.")
@click.option("--seconds", default=20.0, show_default=True, help="For how long jobs are sent.")
@click.option("--backfills", default=100_000, show_default=True, help="Finished ones, in the ledger of the ticks.")
@click.option("--retries", default=1_200_000, show_default=True, help="Due ones, in the ledger of the ticks.")
@click.option("--json", "as_json", is_flag=True)
def main(jobs: int, seconds: float, backfills: int, retries: int, as_json: bool) -> None:
    """Fill a ledger, then send from it as fast as it goes, with somebody who takes whatever is sent; then measure
    single ticks in another one."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    try:
        os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
        result = measure(jobs, seconds)
        os.environ["MASKWATCH_STATE_DIR"] = str(folder / "ticks")
        result |= measure_ticks(backfills, retries)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['jobs']:,} jobs in the ledger, {result['pending']:,} of them pending, half of those paused")
    print(f"sent, claimed and ended  {result['per_s']:,.0f} jobs per second (the claim: 500)")
    each = f"{result['per_dispatch']:.0f} jobs in {result['dispatch_ms']:.0f} ms, at the end {result['late_ms']:.0f} ms"
    print(f"one dispatch             {each}")
    print(f"Redis at most            {result['redis_mib']:.1f} MiB (the claim: 32)")
    print(f"indexes of its statement {', '.join(result['indexes'])}")
    for name, beside, claim in (
        ("backfills", f"{backfills:,} finished backfills", 50),
        ("retries", f"{retries:,} due retries", 250),
    ):
        middle, longest = result[f"tick_{name}_ms"], result[f"tick_{name}_longest_ms"]
        print(f"a tick beside {beside}: {middle:.0f} ms, the longest {longest:.0f} ms (the claim: under {claim})")


def measure(jobs: int, seconds: float) -> dict:  # type: ignore[type-arg]
    from common.cli.parts.deployment import deployment
    from common.database.sessions import engine
    from producer.dispatch import dispatch, reconcile

    with deployment() as settings:
        begin_backfills(settings, 2)
        quarter = jobs // 4
        with autocommit() as connection:
            for number, (state, backfill) in enumerate(
                (("succeeded", 1), ("succeeded", 1), ("pending", 2), ("pending", 1))
            ):
                fill(connection, range(number * quarter, (number + 1) * quarter), state=state, backfill=backfill)
            connection.execute(text("UPDATE backfills SET paused_at = now() WHERE id = 2"))
            connection.execute(text("ANALYZE"))
        reconcile(settings)
        took: list[float] = []
        done = 0
        redis_mib = 0.0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            before = time.perf_counter()
            sent = dispatch(settings)
            took.append(time.perf_counter() - before)
            assert sent, "the archive is used up: give more --jobs"
            redis_mib = max(redis_mib, memory())
            done += work_off()
        wall = time.perf_counter() - began
        with Session(engine()) as session:
            indexes = used_indexes(session)
        return {
            "jobs": jobs,
            "pending": jobs // 2,
            "per_s": done / wall,
            "per_dispatch": done / len(took),
            "dispatch_ms": 1000 * sum(took[:5]) / 5,
            "late_ms": 1000 * sum(took[-5:]) / 5,
            "redis_mib": redis_mib,
            "indexes": indexes,
        }


def measure_ticks(backfills: int, retries: int) -> dict[str, float]:
    """Single ticks in a ledger in which nearly nothing is to be done, beside much that has ended or waits."""
    from common.cli.parts.deployment import deployment
    from producer.dispatch import reconcile

    with deployment() as settings, autocommit() as connection:
        begin_backfills(settings, 2)
        connection.execute(text(FINISHED), {"backfills": backfills})
        connection.execute(text("ANALYZE"))
        reconcile(settings)
        result = ticks("backfills", settings, connection, sent=16)
        first = 16 * (TICKS + 1)
        fill(connection, range(first, first + retries), state="retry_wait", backfill=2)
        connection.execute(text("ANALYZE"))
        return result | ticks("retries", settings, connection)


def ticks(name: str, settings: Settings, connection: Connection, *, sent: int = 0) -> dict[str, float]:
    """What ticks take, each of which finds `sent` new jobs (0: only what it wakes itself), and all that was sent before
    it done."""
    from producer.dispatch import dispatch

    took = []
    for number in range(TICKS + 1):
        fill(connection, range(number * sent, (number + 1) * sent), state="pending", backfill=1)
        began = time.perf_counter()
        found = dispatch(settings)
        took.append(1000 * (time.perf_counter() - began))
        assert found == sent or (found and not sent), f"a tick sent {found} jobs"
        work_off()
    return {f"tick_{name}_ms": statistics.median(took[1:]), f"tick_{name}_longest_ms": max(took[1:])}


def begin_backfills(settings: Settings, count: int) -> None:
    """A location, a pipeline, a source and so many backfills of it, all with the numbers from 1 on."""
    from common.catalog import places
    from common.database.sessions import session_scope
    from common.database.tables import Backfill
    from common.ledger import circuit_breaker

    with session_scope() as session:
        location = places.add_location(session, "archive", "UTC")
        pipeline = places.ensure_pipeline(session, pipeline_spec(settings))
        source = circuit_breaker.ensure(session, "s3://archive")
        session.flush()
        for _ in range(count):
            session.add(
                Backfill(source="s3://archive/", source_id=source, location_id=location.id, pipeline_id=pipeline.id)
            )


@contextmanager
def autocommit() -> Iterator[Connection]:
    """A connection whose statements may take as long as they need."""
    from common.database.sessions import engine

    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = 0"))
        yield connection


def fill(connection: Connection, numbers: range, *, state: str, backfill: int) -> None:
    """A job of an image for each of these numbers, none of which has one."""
    for part in (numbers[start : start + 100_000] for start in range(0, len(numbers), 100_000)):
        values = {"first": part[0], "last": part[-1], "state": state, "backfill": backfill}
        connection.execute(text(FILL), values)


def work_off() -> int:
    """Somebody who takes all that was sent, and does it; returns how many jobs that were."""
    from common import ledger
    from common.database.sessions import session_scope
    from common.domain import JobRef, Lane
    from common.messaging.queues import Queue, list_of, redis_client

    with redis_client() as client:
        # Redis has been looked at, and what follows is the ledger's work.
        client.delete(*(list_of(Queue.MEDIA, lane) for lane in Lane))
    with session_scope() as session:
        refs = [
            JobRef(row.id, row.token)
            for row in session.execute(text("SELECT id, token FROM jobs WHERE state = 'queued' ORDER BY id"))
        ]
    done = 0
    for start in range(0, len(refs), 16):
        with session_scope() as session:
            claimed = ledger.claim(session, refs[start : start + 16], worker="w/1", lease_seconds=60)
            for job in claimed:
                assert job.observed_at is not None
                ledger.succeed(session, job, job.observed_at)
            done += len(claimed)
    return done


def memory() -> float:
    """What Redis takes, by its own account, in MiB."""
    from common.messaging.queues import redis_client

    with redis_client() as client:
        return client.info("memory")["used_memory"] / 2**20  # type: ignore[index]


def used_indexes(session: Session) -> list[str]:
    """The indexes that the dispatcher's statement goes by."""
    from sqlalchemy import event

    from common import ledger
    from common.domain import Lane

    seen: list[tuple[str, object]] = []

    def watch(_conn: object, _cursor: object, statement: str, parameters: object, *_rest: object) -> None:
        seen.append((statement, parameters))

    event.listen(session.get_bind(), "before_cursor_execute", watch)
    feeds = ledger.feeds_with_work(session)[Lane.BACKFILL]
    ledger.take_pending(session, feeds, ledger.Dispatch(Lane.BACKFILL, "e", 16), lane=Lane.BACKFILL, limit=1000)
    event.remove(session.get_bind(), "before_cursor_execute", watch)
    session.rollback()
    statement, parameters = next(entry for entry in seen if "chosen AS" in entry[0])
    plan = session.connection().exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()  # type: ignore[arg-type]
    assert not any("Seq Scan on jobs" in line for line in plan), "\n".join(plan)
    return sorted({line.split(" using ")[1].split(" ")[0] for line in plan if " using " in line})


if __name__ == "__main__":
    main()
