"""Real services and real worker processes for the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
from redis import Redis
from sqlalchemy import create_engine, text

from common.database.tables import Base
from common.local.stack import Endpoints, LocalStack
from tests import commands

#: So that a test sees in seconds what a deployment sees in minutes.
QUICK = {
    "MASKWATCH_DISPATCH__INTERVAL_SECONDS": "0.3",
    "MASKWATCH_DISPATCH__RECONCILE_SECONDS": "0.5",
    "MASKWATCH_DISPATCH__SUMMARIZE_SECONDS": "0.5",
    "MASKWATCH_LEDGER__LEASE_SECONDS": "3",
    "MASKWATCH_LEDGER__HEARTBEAT_SECONDS": "0.5",
    "MASKWATCH_LEDGER__OVERDUE_SECONDS": "3",
    "MASKWATCH_LEDGER__RETRY_BASE_SECONDS": "0.1",
    "MASKWATCH_WORKER__THREADS": "1",
}


@dataclass
class Services:
    """The embedded stack of this test run."""

    endpoints: Endpoints
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def empty(self) -> None:
        """Forget everything: rows, partitions, messages. (Buckets are made anew by each test.)"""
        engine = create_engine(self.endpoints.database_url)
        # What the migrations have written stays.
        names = ", ".join({table.name for table in Base.metadata.sorted_tables} - {"oldest_versions"})
        with engine.begin() as connection:
            partitions = connection.execute(
                text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'faces'::regclass")
            )
            for (name,) in partitions.all():
                if name != "faces_default":
                    connection.execute(text(f"DROP TABLE {name}"))
            connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
        engine.dispose()
        with Redis.from_url(self.endpoints.redis_url) as client:
            client.flushall()


@contextmanager
def start_services(folder: Path) -> Iterator[Services]:
    """The embedded stack under `folder`, migrated."""
    import migrations

    stack = LocalStack(folder / "state")
    with stack.session() as endpoints:
        engine = create_engine(endpoints.database_url)
        migrations.upgrade(engine)
        engine.dispose()
        environment = {**endpoints.environment(), "MASKWATCH_STATE_DIR": str(folder / "state")}
        yield Services(endpoints, folder, environment)


def forget_settings() -> None:
    """Let this process read its environment again."""
    from common.cli.parts.deployment import _forget

    _forget()


@dataclass
class Bucket:
    """One bucket, to put objects into."""

    name: str
    client: Any

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    @classmethod
    def create(cls, name: str, endpoint_url: str) -> Bucket:
        client = boto3.client("s3", endpoint_url=endpoint_url)
        client.create_bucket(Bucket=name)
        return cls(name, client)

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)


def locate(*cameras: str, name: str = "lobby", zone: str = "UTC") -> None:
    """Register a location and cameras, as `maskwatch locations add` and `cameras add` do."""
    from common.catalog import places
    from common.database.sessions import session_scope

    with session_scope() as session:
        location = places.add_location(session, name, zone)
        for camera in cameras:
            places.add_camera(session, location, camera)


def maskwatch(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, to its end."""
    return commands.run(arguments, {**os.environ, **(env or {})}, cwd, timeout)


@contextmanager
def running(*arguments: str, log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A long-running command (worker, producer, aggregator); killed with all its children at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "common.cli", *arguments],
            env={**os.environ, **(env or {})}, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and all its descendants, and reap it if that ends it."""
    if process.poll() is not None:
        return  # its number may be somebody else's by now
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    if number == signal.SIGKILL:
        process.wait(30)


def wait_until(condition: Callable[[], Any], *, seconds: float = 60, what: str = "it") -> Any:
    """Poll until the condition holds and return what it returned; fail naming what did not happen."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")
