"""`producer`, `worker` and `aggregator` find the broker of the embedded stack, and stop where there is none."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.messaging.queues import Queue, TaskName, queue_length, redis_client, send
from tests.services import Services, maskwatch, running, wait_until

URLS = ("MASKWATCH_DATABASE__URL", "MASKWATCH_BROKER__URL")

#: What makes each of them do something, and the queue that it waits in.
WORK = {
    "worker": (TaskName.ANALYZE, ("names no jobs",), Queue.MEDIA),
    "aggregator": (TaskName.SUMMARIZE, (), Queue.AGGREGATION),
    "producer": (TaskName.RECONCILE, (), Queue.PRODUCER),
}


def waiting(queue: Queue) -> int:
    with redis_client() as client:
        return queue_length(client, queue)


@pytest.mark.parametrize("command", WORK)
def test_it_works_off_its_queue_in_the_embedded_stack(
    command: str, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, message, queue = WORK[command]
    send(task, message)
    assert waiting(queue) == 1
    log = tmp_path / "log"
    with monkeypatch.context() as unconfigured:
        # The stack of this test run is the one that MASKWATCH_STATE_DIR names.
        for name in URLS:
            unconfigured.delenv(name)
        with running(command, log=log) as process:
            wait_until(lambda: process.poll() is not None or "ready." in log.read_text(), what="its being ready")
            wait_until(lambda: waiting(queue) == 0, what="the message being taken")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
    assert "amqp" not in log.read_text()
    assert waiting(queue) >= 0, "the stack still runs: it has other users"


def test_an_app_that_nobody_told_of_a_broker_would_look_for_another_kind_of_it_for_ever(
    services: Services, tmp_path: Path
) -> None:
    """What `serve` prevents, and the test above looks for."""
    code = "from common.messaging.celery_app import app; app.worker_main(['worker', '-P', 'solo', '-l', 'INFO'])"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
    try:
        wait_until(lambda: "amqp" in log.read_text() and "Trying again" in log.read_text(), what="its looking for amqp")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", WORK)
def test_without_a_broker_it_stops_with_one_line(
    command: str, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASKWATCH_BROKER__URL")
    done = maskwatch(command, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: no broker is configured: set MASKWATCH_BROKER__URL, or install the embedded one "
        "(pip install 'maskwatch[local]')"
    ]


@pytest.mark.parametrize("command", WORK)
def test_without_the_embedded_stack_it_stops_with_one_line(
    command: str, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in URLS:
        monkeypatch.delenv(name)
    code = (
        f"import sys; sys.modules['psutil'] = None; sys.argv = ['maskwatch', {command!r}]\n"
        "from common.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no database is configured: set MASKWATCH_DATABASE__URL and MASKWATCH_BROKER__URL")
