"""What the ledger costs: jobs that do nothing, through claim, record and finish, against plain Celery's tasks.

The claims: image jobs in groups as shipped, at least as many per second as plain Celery does messages; jobs that travel
alone, as chunks do, at least 20 % of it. One worker process on either side, in turn.

    python -m benchmarks.ledger [--jobs 12000] [--rounds 3] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
from sqlalchemy import text

from common.models.pipeline import pipeline_spec

DONE = "SELECT count(*) FROM jobs WHERE state = 'succeeded'"

#: By partial indexes: to count, over and over, takes time from what is measured.
UNDONE = "SELECT EXISTS (SELECT FROM jobs WHERE state = 'queued') OR EXISTS (SELECT FROM jobs WHERE state = 'running')"


@click.command()
@click.option(
    "--jobs",
    default=12_000,
    show_default=True,
    help="Per round and side; with these, a child that does jobs one by one is replaced.",
)
@click.option("--rounds", default=3, show_default=True, help="The median counts.")
@click.option("--json", "as_json", is_flag=True)
def main(jobs: int, rounds: int, as_json: bool) -> None:
    """Compare the ledger with plain Celery in the same Redis."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_STATE_DIR"] = str(folder / "state")
    # All is sent before the worker starts, as on the other side: what takes part is the worker's half of the ledger.
    os.environ["MASKWATCH_DISPATCH__QUEUE_CAP"] = str(2 * jobs)
    try:
        result = measure(jobs, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    plain = result["plain_per_s"]
    print(f"plain Celery, a task per message   {plain:,.0f} per second")
    for name, claim in (("groups", 1.0), ("single", 0.2)):
        rate = result[f"{name}_per_s"]
        print(f"ledger, jobs {name:<22}{rate:,.0f} per second: {rate / plain:.2f} (the claim: {claim})")


def measure(jobs: int, rounds: int) -> dict[str, float]:
    from common.cli.parts.deployment import deployment

    with deployment():
        taken: dict[str, list[float]] = {"plain": [], "groups": [], "single": []}
        first = 0
        for _ in range(rounds):
            taken["plain"].append(plain(jobs))
            for name, size in (("groups", 16), ("single", 1)):
                taken[name].append(through_the_ledger(first, jobs, size))
                first += jobs
    return {f"{name}_per_s": statistics.median(rates) for name, rates in taken.items()}


def plain(jobs: int) -> float:
    """Tasks per second of plain Celery, from the first that it has taken."""
    from common.messaging.broker import transport_url
    from common.messaging.queues import redis_client

    os.environ["PLAIN_BROKER_URL"] = transport_url()
    from benchmarks.plain_celery import app, nothing

    app.conf.broker_url = transport_url()
    for number in range(jobs + 100):
        nothing.delay(number)
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.plain_celery", "worker", "-l", "ERROR", "-c", "1"]
    with started(command), redis_client() as client:
        wait(lambda: client.llen("celery") <= jobs)
        began = time.perf_counter()
        wait(lambda: client.llen("celery") == 0 and client.hlen("unacked") == 0)
        return jobs / (time.perf_counter() - began)


def through_the_ledger(first: int, jobs: int, group_size: int) -> float:
    """Jobs per second of one worker of ours."""
    from common import ledger
    from common.catalog import places
    from common.database.sessions import session_scope
    from common.domain import Lane, MediaKind, ObjectInfo, ObservedAt, ObservedAtSource
    from common.planning import PlannedObject
    from common.settings import get_settings
    from producer.dispatch import dispatch, reconcile

    os.environ["MASKWATCH_WORKER__GROUP_SIZE"] = str(group_size)
    get_settings.cache_clear()
    settings = get_settings()
    now = datetime(2026, 3, 2, 12, tzinfo=UTC)
    with session_scope() as session:
        location = places.add_location(session, "ledger", "UTC")
        pipeline = places.ensure_pipeline(session, pipeline_spec(settings))
        session.flush()
        infos = [ObjectInfo("s3://x", f"{number:09}.jpg", "e", 1, now) for number in range(first, first + jobs)]
        seen = ObservedAt(now, ObservedAtSource.KEY_PATTERN)
        planned = [PlannedObject(info, MediaKind.IMAGE, seen) for info in infos]
        ledger.register(session, planned, location=location, camera=None, pipeline=pipeline, lane=Lane.BACKFILL)
    reconcile(settings)

    def done() -> int:
        with session_scope() as session:
            return int(session.scalar(text(DONE)) or 0)

    def undone() -> bool:
        with session_scope() as session:
            return bool(session.scalar(text(UNDONE)))

    before = done()
    serve = (
        "from common.messaging.serve import serve; from common.messaging.queues import Queue;"
        " serve(Queue.MEDIA, 'noop', pool='prefork', tasks='benchmarks.noop_tasks')"
    )
    while dispatch(settings):
        pass
    # As `maskwatch worker` has it.
    with started([sys.executable, "-c", serve], MASKWATCH_DATABASE__BY_KEY="true"):
        wait(lambda: done() > before)
        begun, began = done(), time.perf_counter()
        wait(lambda: not undone())
        taken = time.perf_counter() - began
        assert done() == before + jobs, "jobs ended badly"
        return (before + jobs - begun) / taken


@contextmanager
def started(command: list[str], **environment: str) -> Iterator[None]:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def wait(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("nothing moves")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
