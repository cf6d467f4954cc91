"""The life of a worker around its tasks: the wish to stop, and the death of a child.

The main process turns SIGTERM into a file that its children look at between two pictures: they release what
they have not begun and finish. A file, because a spawned child shares no memory with its parent.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from billiard.exceptions import WorkerLostError
from celery import signals

from common import ledger
from common.database import session_scope
from common.queues import TaskName
from common.settings import get_settings
from common.telemetry import get_logger

log = get_logger(__name__)

_DRAIN_FILE = "MASKWATCH_DRAIN_FILE"


def prepare_drain() -> None:
    """Choose the file that says "stop" to this worker's children. Called before they are spawned.

    In a folder of its own that nobody else may write to: whoever makes the file stops the worker.
    """
    os.environ[_DRAIN_FILE] = str(Path(tempfile.mkdtemp(prefix="maskwatch-worker-"), "drain"))


def draining() -> bool:
    """Whether this worker was asked to stop."""
    path = os.environ.get(_DRAIN_FILE)
    return path is not None and Path(path).exists()


def worker_name(hostname: str | None, task_id: str | None) -> str:
    """What `jobs.worker` holds: which worker, and which of its messages."""
    return f"{hostname}/{task_id}"


@signals.worker_ready.connect
def _watch_for_stop(**_: Any) -> None:
    """Put ours before Celery's handlers, which only wait for the children."""
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def stop(signum: int, frame: FrameType | None, before: Any = before) -> None:
            Path(os.environ[_DRAIN_FILE]).touch()
            if callable(before):
                before(signum, frame)

        signal.signal(number, stop)


def stop_worker() -> None:
    """In a child: ask the worker it belongs to to stop."""
    os.kill(os.getppid(), signal.SIGTERM)


@signals.worker_shutdown.connect
def _clean_up(**_: Any) -> None:
    if _DRAIN_FILE in os.environ:
        shutil.rmtree(Path(os.environ[_DRAIN_FILE]).parent, ignore_errors=True)


@signals.task_failure.connect
def _report_crash(sender: Any = None, task_id: str | None = None, exception: Any = None, **_: Any) -> None:
    """In the main process: a child died. Its jobs need not wait for their lease to run out."""
    if not isinstance(exception, WorkerLostError) or sender.name != TaskName.ANALYZE.value:
        return
    try:
        with session_scope() as session:
            lost = ledger.report_crash(
                session, worker_name("%", task_id), max_crashes=get_settings().ledger.max_crashes
            )
    except Exception:
        log.exception("crash not reported; the leases will run out", task=task_id)
    else:
        log.warning("a child process died", jobs=lost, task=task_id)
