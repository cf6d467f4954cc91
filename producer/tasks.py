"""The producer's Celery tasks: each only calls a function. Celery beat sends them periodically; running one late or
twice does no harm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.domain import MaskwatchError
from common.messaging.celery_app import app
from common.messaging.queues import ROUTES, TaskName
from common.observability import metrics
from common.observability.logs import get_logger
from common.settings import get_settings
from producer import cameras, dispatch

log = get_logger(__name__)


@contextmanager
def _ticking(task: str) -> Iterator[None]:
    """Count a tick. An error that a person can put right, such as a service that is down, becomes a line in the log;
    the next tick tries again."""
    try:
        yield
    except MaskwatchError as error:
        log.error("tick failed", task=task, detail=str(error))
    else:
        metrics.count(metrics.TICKS, task=task)


@app.task(name=TaskName.DISPATCH.value)
def dispatch_jobs() -> None:
    """Send pending jobs to the workers."""
    with _ticking("dispatch"):
        dispatch.dispatch(get_settings())


@app.task(name=TaskName.RECONCILE.value)
def reconcile_jobs() -> None:
    """Recover what got lost."""
    with _ticking("reconcile"):
        dispatch.reconcile(get_settings())


@app.task(name=TaskName.REQUEST_SUMMARY.value)
def request_summary() -> None:
    """Ask the aggregator to work, if there is something to summarize."""
    with _ticking("request_summary"):
        dispatch.request_summary()


_poller = cameras.Poller()


@app.task(name=TaskName.POLL_CAMERAS.value)
def poll_cameras() -> None:
    """Poll the cameras whose slot is due for new footage."""
    settings = get_settings()
    with _ticking("look_at_cameras"):
        _poller.poll(cameras.tick(settings), settings)


def schedule() -> None:
    """Have beat tick this producer's own tasks. A tick that was not run before the next is due expires."""
    settings = get_settings().dispatch
    for task, seconds in (
        (TaskName.DISPATCH, settings.interval_seconds),
        (TaskName.RECONCILE, settings.reconcile_seconds),
        (TaskName.REQUEST_SUMMARY, settings.summarize_seconds),
        (TaskName.POLL_CAMERAS, settings.poll_seconds),
    ):
        app.add_periodic_task(
            seconds, app.signature(task.value), name=task.value, queue=ROUTES[task].value, expires=seconds
        )
