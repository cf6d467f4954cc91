"""A stack to break: real Postgres, Redis, S3 server and Celery workers of one experiment, and what to ask of them.

An experiment does the same thing twice, once as shipped and once with the mechanism it is about switched off, and says
what it counted both times. One that holds with the mechanism off would have proved nothing.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Engine, create_engine, text

from common.local.stack import LocalStack
from tests.mutants import injected
from tests.photos import jpeg, portrait
from tests.services import (
    QUICK,
    Bucket,
    Services,
    forget_settings,
    locate,
    maskwatch,
    running,
    start_services,
    wait_until,
)

#: Small pictures analysed as they are, in small groups, so that an experiment has many jobs and not many minutes.
SMALL = {
    "MASKWATCH_PIPELINE__ENLARGE_BELOW_PX": "0",
    "MASKWATCH_WORKER__GROUP_SIZE": "4",
    "MASKWATCH_BROKER__SOCKET_TIMEOUT_SECONDS": "2",
}

#: Media objects that are current and whose pictures were not counted exactly once.
DOUBLED = """
SELECT count(*) FROM (
    SELECT j.id FROM jobs j JOIN frame_counts c ON c.job_id = j.id
    WHERE j.kind = 'image' GROUP BY j.id HAVING sum(c.frames) <> 1) AS each
"""

#: A full recompute of the summaries, and those that are stored; rows that only one of the two has.
RECOMPUTED = """
WITH looked AS (
    SELECT location_id, pipeline_id, hour, sum(frames)::bigint AS frames, round(sum(seconds)::numeric, 6) AS seconds
    FROM frame_counts GROUP BY 1, 2, 3
), found AS (
    SELECT f.location_id, f.pipeline_id, date_trunc('hour', f.observed_at, l.time_zone) AS hour, count(*) AS faces,
           count(*) FILTER (WHERE status = 'with_mask') AS with_mask,
           count(*) FILTER (WHERE status = 'without_mask') AS without_mask,
           count(*) FILTER (WHERE status = 'uncertain') AS uncertain
    FROM faces f JOIN locations l ON l.id = f.location_id GROUP BY 1, 2, 3
), expected AS (
    SELECT location_id, pipeline_id, hour, frames, seconds, coalesce(faces, 0) AS faces,
           coalesce(with_mask, 0) AS with_mask, coalesce(without_mask, 0) AS without_mask,
           coalesce(uncertain, 0) AS uncertain
    FROM looked FULL JOIN found USING (location_id, pipeline_id, hour)
), stored AS (
    SELECT location_id, pipeline_id, hour, frames, round(seconds::numeric, 6) AS seconds, faces, with_mask,
           without_mask, uncertain
    FROM compliance_hourly
)
SELECT count(*) FROM ((TABLE expected EXCEPT TABLE stored) UNION ALL (TABLE stored EXCEPT TABLE expected)) AS different
"""

ENDED = ("succeeded", "quarantined", "source_changed", "cancelled")


class Scale(Enum):
    """How much of it: what the figures of docs/reliability.md are from, or what `make test` has time for."""

    FULL = "full"
    SHORT = "short"


@dataclass(frozen=True)
class Outcome:
    """What an experiment counted, as shipped and with the mechanism off. `held`: the promise was kept as shipped;
    `control_failed`: it was broken with the mechanism off, as it has to be."""

    figures: Mapping[str, object]
    control: Mapping[str, object]
    held: bool
    control_failed: bool


@dataclass(frozen=True)
class Experiment:
    """One line of the table. `promise` and `off` are for people: what is promised, and what the control lacks."""

    name: str
    promise: str
    off: str
    run: Callable[[Lab, Scale], Outcome]


@dataclass
class Lab:
    """The services of one experiment, made for it and thrown away with it. `random` reproduces its choices."""

    services: Services
    folder: Path
    random: random.Random
    _logs: int = field(default=0, repr=False)
    _faults: int = field(default=0, repr=False)

    @cached_property
    def engine(self) -> Engine:
        """For looking; every look is a transaction of its own."""
        return create_engine(self.services.endpoints.database_url, pool_pre_ping=True)

    @property
    def stack(self) -> LocalStack:
        """To find and restart the services: `stack.status()` has their pids, `stack.up()` starts what is down."""
        return LocalStack(self.services.folder / "state")

    def pid_of(self, service: str) -> int:
        """The process of `postgres`, `redis` or `s3`."""
        (pid,) = [status.pid for status in self.stack.status() if status.name == service]
        assert pid is not None, f"{service} is not running"
        return pid

    def scalar(self, query: str, **parameters: Any) -> Any:
        """The first value that a query returns."""
        with self.engine.connect() as connection:
            return connection.execute(text(query), parameters).scalar()

    def rows(self, query: str, **parameters: Any) -> list[Any]:
        """All rows that a query returns."""
        with self.engine.connect() as connection:
            return list(connection.execute(text(query), parameters).all())

    def states(self) -> dict[str, int]:
        """Jobs by state."""
        return {row[0]: row[1] for row in self.rows("SELECT state, count(*) FROM jobs GROUP BY 1")}

    # --- footage ---

    def bucket(self, name: str = "footage") -> Bucket:
        """A new bucket."""
        return Bucket.create(name, self.services.endpoints.s3_endpoint_url)

    def put(self, bucket: Bucket, count: int, *, first: int = 0) -> None:
        """Pictures with one face each, 00000.jpg and so on; no two have the same bytes."""
        photo = portrait(128)
        with ThreadPoolExecutor(8) as pool:
            for done in [
                pool.submit(bucket.put, f"{number:05}.jpg", jpeg(photo, comment=str(number).encode()))
                for number in range(first, first + count)
            ]:
                done.result()

    def backfill(self, bucket: Bucket, *options: str) -> None:
        """`maskwatch backfill` of a whole bucket into the location `lobby`, registered if need be."""
        if not self.scalar("SELECT count(*) FROM locations"):
            locate()
        done = maskwatch("backfill", bucket.uri, "--location", "lobby", *options)
        assert done.returncode == 0, done.stderr

    # --- processes ---

    @contextmanager
    def running(self, *command: str, env: Mapping[str, str] | None = None) -> Iterator[Any]:
        """A `maskwatch` command that goes on until the end of the block; killed with all its children then."""
        self._logs += 1
        log = self.folder / "logs" / f"{self._logs:03}-{command[0]}.log"
        log.parent.mkdir(exist_ok=True)
        with running(*command, log=log, env=env) as process:
            yield process

    @contextmanager
    def processes(self, *commands: str, env: Mapping[str, str] | None = None) -> Iterator[list[Any]]:
        """Run several `maskwatch` commands at once, e.g. `processes("producer", "aggregator", "worker", "worker")`."""
        with ExitStack() as exits:
            yield [exits.enter_context(self.running(command, env=env)) for command in commands]

    def injected(self, fault: str) -> dict[str, str]:
        """The environment of processes that run this Python code at their start, and so do their children: how a fault
        or a missing mechanism gets into them."""
        self._faults += 1
        return injected(self.folder / "faults" / str(self._faults), fault)

    @staticmethod
    def children(process: Any) -> list[psutil.Process]:
        """The child processes of a worker that do its work."""
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def logged(self, event: str) -> int:
        """How many lines of the processes' logs tell of an event, by its name."""
        lines = [line for log in self.folder.glob("logs/*.log") for line in log.read_text().splitlines()]
        return sum(f'"event": "{event}"' in line for line in lines)

    # --- what is promised ---

    def wait_until_done(self, count: int, *, seconds: float = 300) -> None:
        """Wait until this many jobs have ended one way or another, and nothing is left to summarize."""

        def done() -> bool:
            states = self.states()
            return (
                sum(states.get(state, 0) for state in ENDED) == count == sum(states.values())
                and self.scalar("SELECT count(*) FROM dirty_marks") == 0
            )

        wait_until(done, seconds=seconds, what=f"the end of {count} jobs (states: {self.states()})")

    def lost(self, count: int) -> int:
        """How many of `count` pictures did not come to be analysed."""
        return count - int(self.scalar("SELECT count(*) FROM jobs WHERE state = 'succeeded'"))

    def doubled(self) -> int:
        """How many pictures were counted other than exactly once."""
        return int(self.scalar(DOUBLED))

    def summary_difference(self) -> int:
        """Hours in which the summaries differ from a full recompute; 0 once all marks are worked off."""
        return int(self.scalar(RECOMPUTED))

    def empty(self) -> None:
        """Forget everything, for the control. Processes must have ended."""
        self.services.empty()


@contextmanager
def open_lab(name: str, seed: int, **settings: str) -> Iterator[Lab]:
    """A lab of its own for one experiment; `settings` by the names of their variables, without the prefix. Our own
    environment is put back at the end."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="maskwatch-chaos-", ignore_cleanup_errors=True) as folder:
        for inherited in [key for key in os.environ if key.startswith(("MASKWATCH_", "AWS_"))]:
            del os.environ[inherited]
        stack = LocalStack(Path(folder) / "state")
        try:
            with start_services(Path(folder)) as services:
                chosen = {f"MASKWATCH_{key.upper()}": value for key, value in settings.items()}
                os.environ.update({**services.environment, **QUICK, **SMALL, **chosen})
                forget_settings()
                lab = Lab(services, Path(folder), random.Random(f"{seed} {name}"))
                try:
                    yield lab
                finally:
                    lab.engine.dispose()
        finally:
            # A service that an experiment has started again counts as meant to stay.
            stack.down(purge=True)
            os.environ.clear()
            os.environ.update(before)
            forget_settings()


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def seconds_since(start: float) -> float:
    """By `time.monotonic()`."""
    return time.monotonic() - start
