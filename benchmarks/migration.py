"""How long a claim waits while the schema is migrated beneath it.

The claim: at most 0.5 s, while the migrations behind 0008 run over a ledger of a million jobs and a worker goes on.

    python -m benchmarks.migration [--jobs 1000000] [--queued 50000] [--json]
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path

import click
from alembic import command
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

import migrations
from benchmarks.dispatch import fill
from common.local.stack import LocalStack

#: The schema before the constraints.
BEFORE = "0008"

#: How long claims are watched before the migrations begin, to compare.
CALM_SECONDS = 3.0

#: What jobs belong to. In SQL, because the tables that the code knows are those of the newest schema.
BEGIN = (
    "INSERT INTO locations (name, time_zone) VALUES ('archive', 'UTC')",
    "INSERT INTO pipelines (fingerprint, detector, classifier, spec) VALUES ('f', 'd', 'c', '{}')",
    "INSERT INTO sources (bucket) VALUES ('s3://archive')",
    "INSERT INTO backfills (source, source_id, location_id, pipeline_id) VALUES ('s3://archive/', 1, 1, 1)",
)

#: A hundredth of what has ended lacks the time that the new constraints ask for, which its attempt has: work for the
#: repair.
TO_REPAIR = (
    """
    INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at)
    SELECT id, 1, 'succeeded', 'w/1', now()
    FROM jobs
    WHERE state = 'succeeded' AND id % 100 = 0
    """,
    """
    UPDATE jobs
    SET finished_at = NULL
    WHERE state = 'succeeded' AND id % 100 = 0
    """,
)

#: By the constraints themselves.
NOT_REPAIRED = """
SELECT count(*)
FROM jobs
WHERE (state = 'succeeded' AND finished_at IS NULL) OR (state = 'running' AND (lease_until IS NULL OR worker IS NULL))
"""


@click.command()
@click.option("--jobs", default=1_000_000, show_default=True, help="Jobs in the ledger, nearly all of them done.")
@click.option("--queued", default=50_000, show_default=True, help="Of these, jobs that are there to be claimed.")
@click.option("--json", "as_json", is_flag=True)
def main(jobs: int, queued: int, as_json: bool) -> None:
    """Fill a ledger of an older schema, then migrate it while somebody claims one job after another."""
    with tempfile.TemporaryDirectory(prefix="maskwatch-bench-") as folder:
        result = measure(Path(folder), jobs, queued)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{jobs:,} jobs migrated from {BEFORE} in {result['migration_s']:.1f} s, {result['claims']:,} claims meanwhile"
    )
    print(f"the longest claim        {result['longest_s']:.3f} s (the claim: 0.5)")
    print(f"the longest before that  {result['longest_before_s']:.3f} s, in {CALM_SECONDS:.0f} s")


def measure(folder: Path, jobs: int, queued: int) -> dict[str, float]:
    with LocalStack(folder / "state").session() as endpoints:
        engine = create_engine(endpoints.database_url)
        command.upgrade(migrations.config(engine), BEFORE)
        fill_ledger(engine, jobs, queued)
        claims = Claims(engine)
        claims.start()
        time.sleep(CALM_SECONDS)
        began = time.perf_counter()
        try:
            migrations.upgrade(engine)
            ended = time.perf_counter()
        finally:
            claims.stop()
        with engine.connect() as connection:
            assert not connection.scalar(text(NOT_REPAIRED)), "the migrations left jobs that their constraints refuse"
        engine.dispose()
    # Also those that began before and were held up.
    meanwhile = [seconds for at, seconds in claims.took if at + seconds > began and at < ended]
    return {
        "jobs": jobs,
        "migration_s": ended - began,
        "claims": len(meanwhile),
        "longest_s": max(meanwhile),
        "longest_before_s": max(seconds for at, seconds in claims.took if at + seconds <= began),
    }


def fill_ledger(engine: Engine, jobs: int, queued: int) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in BEGIN:
            connection.execute(text(statement))
        fill(connection, range(jobs - queued), state="succeeded", backfill=1)
        fill(connection, range(jobs - queued, jobs), state="queued", backfill=1)
        for statement in TO_REPAIR:
            connection.execute(text(statement))
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("CHECKPOINT"))


class Claims:
    """Somebody who claims one job after another, each in a transaction of its own, and notes how long that takes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        #: When each began, and how many seconds it took.
        self.took: list[tuple[float, float]] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Raises what ended the claims before their time."""
        self._stopped.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._claim_all()
        except BaseException as error:  # for the thread that waits for this one
            self._error = error

    def _claim_all(self) -> None:
        from common import ledger
        from common.domain import JobRef

        with Session(self._engine) as session:
            waiting = session.execute(text("SELECT id, token FROM jobs WHERE state = 'queued' ORDER BY id")).all()
            session.commit()
            for row in waiting:
                if self._stopped.is_set():
                    return
                began = time.perf_counter()
                claimed = ledger.claim(session, [JobRef(row.id, row.token)], worker="w/1", lease_seconds=600)
                session.commit()
                self.took.append((began, time.perf_counter() - began))
                assert len(claimed) == 1, f"job {row.id} could not be claimed"
                time.sleep(0.001)
        raise AssertionError("all jobs were claimed before the migrations ended: give more --queued")


if __name__ == "__main__":
    main()
