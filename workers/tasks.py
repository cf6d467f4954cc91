"""The workers' tasks: wiring only."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from common.database.errors import DatabaseDownError
from common.database.versions import OutdatedProgramError
from common.messaging.celery_app import app
from common.messaging.queues import TaskName, decode_refs
from common.observability.logs import get_logger
from common.settings import get_settings
from workers.lifecycle import draining, end_process, stop_worker, worker_name
from workers.summaries import aggregation

log = get_logger(__name__)

#: How long a worker takes no messages after the database was down, or had no room for its results.
PAUSE_SECONDS = 5.0

#: How long a worker takes no messages after one whose pipelines were all unknown to it. Short, because it may know the
#: pipeline of the next message.
UNKNOWN_PAUSE_SECONDS = 1.0


@app.task(name=TaskName.ANALYZE.value, bind=True)
def analyze(self: Any, message: Any) -> None:
    """Do the jobs that a message names: pictures, the probe of a video, a chunk of one."""
    # Imported here: a worker that only aggregates loads neither decoders nor a model runtime.
    from workers.inference.faults import device_is_broken
    from workers.jobs.attempts import UnfitWorkerError, UnknownPipelineError
    from workers.jobs.run import run_jobs

    def must_stop() -> bool:
        return draining() or device_is_broken()

    try:
        refs = decode_refs(message)
    except ValueError as error:
        # Maskwatch didn't send this message, so no job in the ledger waits for it.
        log.error("dropped a message that names no jobs", detail=str(error))
        return
    name = worker_name(self.request.hostname, self.request.id)
    try:
        run_jobs(refs, worker=name, settings=get_settings(), draining=must_stop)
    except UnfitWorkerError as error:
        log.critical("this worker can't do its jobs and stops; the jobs were given back", detail=str(error))
        stop_worker()
    except UnknownPipelineError:
        # Logged already. Without a pause a backfill of such jobs would be claimed and given back in a tight loop.
        _pause(UNKNOWN_PAUSE_SECONDS, must_stop)
    except DatabaseDownError as error:
        log.error("this worker waits for the database", detail=str(error), seconds=PAUSE_SECONDS)
        _pause(PAUSE_SECONDS, must_stop)
    finally:
        if device_is_broken():
            end_process()


def _pause(seconds: float, must_stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not must_stop():
        time.sleep(0.1)


@app.task(name=TaskName.SUMMARIZE.value)
def summarize() -> None:
    """Bring the hourly summaries up to date."""
    try:
        aggregation.summarize()
    # In both cases the marks are still there, and the producer asks again.
    except OutdatedProgramError as error:
        _tell_once(str(error))
    except DatabaseDownError as error:
        log.error("not summarized", detail=str(error))


@lru_cache(maxsize=1)
def _tell_once(detail: str) -> None:
    """Log once, and not each time that the producer asks."""
    log.error("this aggregator waits, because its version may not work on the database", detail=detail)
