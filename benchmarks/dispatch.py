"""Dispatch and Redis with a large ledger.

The claims: 500 jobs per second are sent and done with 2 million in the ledger, and its statements read their partial
indexes; Redis stays under 32 MiB with a million jobs pending.

    python -m benchmarks.dispatch [--jobs 2000000] [--seconds 20] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import click
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.models.pipeline import pipeline_spec

#: A quarter each: done; done; pending; pending of a paused backfill.
FILL = """
WITH objects AS (
    INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id, observed_at,
                               observed_at_source)
    SELECT 's3://archive', to_char(n, 'FM000000000') || '.jpg', 'e', 'e', 1, now(), 'image', 1, now(), 'key_pattern'
    FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n RETURNING id
)
INSERT INTO jobs (media_object_id, source_id, pipeline_id, backfill_id, kind, lane, state, finished_at)
SELECT id, 1, 1, :backfill, 'image', 1, :state, now() FROM objects
"""


@click.command()
@click.option("--jobs", default=2_000_000, show_default=True, help="Jobs in the ledger; half of them pending.")
@click.option("--seconds", default=20.0, show_default=True, help="For how long jobs are sent.")
@click.option("--json", "as_json", is_flag=True)
def main(jobs: int, seconds: float, as_json: bool) -> None:
    """Fill a ledger, then send from it as fast as it goes, with somebody who takes whatever is sent."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    try:
        result = measure(jobs, seconds)
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


def measure(jobs: int, seconds: float) -> dict:  # type: ignore[type-arg]
    from common import ledger
    from common.catalog import places
    from common.cli.parts.deployment import deployment
    from common.database.sessions import engine, session_scope
    from common.database.tables import Backfill
    from common.domain import JobRef, Lane
    from common.ledger import circuit_breaker
    from common.messaging.queues import Queue, list_of, redis_client
    from producer.dispatch import dispatch, reconcile

    with deployment() as settings:
        with session_scope() as session:
            location = places.add_location(session, "archive", "UTC")
            pipeline = places.ensure_pipeline(session, pipeline_spec(settings))
            source = circuit_breaker.ensure(session, "s3://archive")
            for _ in range(2):
                session.add(
                    Backfill(source="s3://archive/", source_id=source, location_id=location.id, pipeline_id=pipeline.id)
                )
        quarter = jobs // 4
        with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("SET statement_timeout = 0"))
            for number, (state, backfill) in enumerate(
                (("succeeded", 1), ("succeeded", 1), ("pending", 2), ("pending", 1))
            ):
                for first in range(number * quarter, (number + 1) * quarter, 100_000):
                    last = min(first + 100_000, (number + 1) * quarter) - 1
                    connection.execute(text(FILL), {"first": first, "last": last, "state": state, "backfill": backfill})
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
            with redis_client() as client:
                # Somebody who takes it all: Redis has been looked at, and what follows is the ledger's work.
                client.delete(*(list_of(Queue.MEDIA, lane) for lane in Lane))
            with session_scope() as session:
                refs = [
                    JobRef(row.id, row.token)
                    for row in session.execute(text("SELECT id, token FROM jobs WHERE state = 'queued' ORDER BY id"))
                ]
            for start in range(0, len(refs), 16):
                with session_scope() as session:
                    claimed = ledger.claim(session, refs[start : start + 16], worker="w/1", lease_seconds=60)
                    for job in claimed:
                        assert job.observed_at is not None
                        ledger.succeed(session, job, job.observed_at)
                    done += len(claimed)
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
