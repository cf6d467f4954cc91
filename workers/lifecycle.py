"""A worker's life outside its tasks: how it stops, and what happens when a child dies.

The main process holds a lock on a file, and releases it at SIGTERM. Its children check the lock between two images:
once it is free, they give back the jobs that they have not begun, and finish. A file, because a spawned child shares no
memory with its parent; a lock, because to release it needs no room on a disk, and a killed worker's lock is free.
"""

from __future__ import annotations

import os
import signal
import tempfile
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals

from common import files, ledger
from common.database.sessions import session_scope
from common.domain import MaskwatchError, first_line
from common.messaging.queues import TaskName
from common.observability import metrics
from common.observability.logs import get_logger
from common.settings import get_settings

log = get_logger(__name__)

_RUNS_FILE = "MASKWATCH_RUNS_FILE"
_PREFIX = "maskwatch-worker-"

#: The file that this process holds locked while it runs, if it is the main process of a worker.
_held: list[int] = []


def prepare_drain() -> None:
    """Lock the file that tells this worker's children to go on, and remove those that killed workers have left.

    Call it before the children are spawned. Raises `MaskwatchError` if no file can be made.
    """
    files.remove_left_over(_PREFIX)
    try:
        # Readable by its owner alone: another user who could open it could lock it, and keep the worker from stopping.
        path, handle = files.make_held(_PREFIX)
    except OSError as error:
        raise MaskwatchError(
            f"no file can be made in {tempfile.gettempdir()}: {first_line(error)}; make room there, or set TMPDIR"
        ) from error
    _held.append(handle)
    os.environ[_RUNS_FILE] = str(path)


def draining() -> bool:
    """Whether this worker was asked to stop, or its main process has died."""
    path = os.environ.get(_RUNS_FILE)
    if path is None:
        return False
    try:
        return files.try_lock(_opened(path), shared=True)
    except FileNotFoundError:
        return False  # the file was deleted by a cleanup: not a request to stop


@lru_cache(maxsize=1)
def _opened(path: str) -> int:
    """The file, kept open from the first check on, so that it may be renamed or deleted."""
    return os.open(path, os.O_RDONLY)


def worker_name(hostname: str | None, task_id: str | None) -> str:
    """The value of `jobs.worker`: the worker, and the message that it works on."""
    return f"{hostname}/{task_id}"


@signals.worker_ready.connect
def _watch_for_stop(**_: Any) -> None:
    """Run our signal handler before Celery's, which only waits for the children."""
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def stop(signum: int, frame: FrameType | None, before: Any = before) -> None:
            _let_go()
            if callable(before):
                before(signum, frame)

        signal.signal(number, stop)


def stop_worker() -> None:
    """In a child: ask its worker (the main process) to stop."""
    os.kill(os.getppid(), signal.SIGTERM)


def end_process() -> NoReturn:
    """In a child whose device is broken: end it. The worker starts another child in its place."""
    log.critical("this process can no longer use the device and ends; another process takes its place")
    raise SystemExit(1)


def _let_go() -> None:
    for handle in _held:
        files.unlock(handle)


@signals.worker_shutdown.connect
def _clean_up(**_: Any) -> None:
    if _held:
        Path(os.environ[_RUNS_FILE]).unlink(missing_ok=True)


@signals.task_failure.connect
def _report_crash(sender: Any = None, task_id: str | None = None, exception: Any = None, **_: Any) -> None:
    """In the main process: a child died, or is killed because it takes too long. Report it, so that its jobs need not
    wait for their lease to run out."""
    if not isinstance(exception, WorkerLostError | TimeLimitExceeded) or sender.name != TaskName.ANALYZE.value:
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
        metrics.count(metrics.LEASE_LOSSES, lost, cause="crashed")
