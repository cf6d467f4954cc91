"""Services that go away under running workers and come back: the work goes on, nothing is lost or doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from common.local.stack import LocalStack
from tests.ledger_rows import scalar, states
from tests.photos import face_jpeg
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

#: Small groups, and a broker that is not waited for.
NIMBLE = {"MASKWATCH_WORKER__GROUP_SIZE": "4", "MASKWATCH_BROKER__SOCKET_TIMEOUT_SECONDS": "2"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """A stack of this test's own, to break."""
    with start_services(tmp_path) as services:
        for name, value in {**services.environment, **QUICK, **NIMBLE}.items():
            monkeypatch.setenv(name, value)
        forget_settings()
        yield services
        forget_settings()
        # Started again by hand, it counts as meant to stay.
        LocalStack(services.folder / "state").down(purge=True)


@pytest.mark.parametrize("service", ["redis", "postgres"])
def test_a_service_that_is_killed_and_comes_back(own: Services, tmp_path: Path, service: str) -> None:
    count = 16
    bucket = Bucket.create("outage", own.endpoints.s3_endpoint_url)
    for number in range(count):
        bucket.put(f"{number:03}.jpg", face_jpeg(number))
    locate()
    stack = LocalStack(own.folder / "state")
    before = own.endpoints
    (pid,) = [status.pid for status in stack.status() if status.name == service]
    assert pid is not None
    engine = create_engine(before.database_url, pool_pre_ping=True)
    with ExitStack() as exits, Session(engine) as session:
        for command in ("producer", "aggregator", "worker"):
            exits.enter_context(running(command, log=tmp_path / f"{command}.log"))
        assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
        wait_until(lambda: states(session).get("succeeded", 0) >= 2, what="the first pictures")
        session.close()
        os.kill(pid, signal.SIGKILL)
        assert stack.up() == before  # at the same address
        wait_until(
            lambda: states(session) == {"succeeded": count} and not scalar(session, "SELECT count(*) FROM dirty_marks"),
            seconds=120,
            what="the rest, after the outage",
        )
        assert scalar(session, "SELECT count(*) FROM faces") == count
        assert scalar(session, "SELECT sum(faces) FROM compliance_hourly") == count
        session.close()
    engine.dispose()
