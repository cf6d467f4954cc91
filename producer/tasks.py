"""The producer's tasks: wiring only. Beat ticks them; a tick that comes late or twice changes nothing."""

from __future__ import annotations

from common import metrics
from common.celery_app import app
from common.queues import ROUTES, TaskName
from common.settings import get_settings
from producer import cameras, dispatch


@app.task(name=TaskName.DISPATCH.value)
def dispatch_jobs() -> None:
    """Send pending jobs to the workers."""
    dispatch.dispatch(get_settings())
    metrics.count(metrics.TICKS, task="dispatch")


@app.task(name=TaskName.RECONCILE.value)
def reconcile_jobs() -> None:
    """Recover what got lost."""
    dispatch.reconcile(get_settings())
    metrics.count(metrics.TICKS, task="reconcile")


@app.task(name=TaskName.REQUEST_SUMMARY.value)
def request_summary() -> None:
    """Have the aggregator work, if there is something to summarize."""
    dispatch.request_summary()
    metrics.count(metrics.TICKS, task="request_summary")


_watcher = cameras.Watcher()


@app.task(name=TaskName.LOOK_AT_CAMERAS.value)
def look_at_cameras() -> None:
    """Look for new footage of the cameras whose slot is due."""
    settings = get_settings()
    _watcher.look_at(cameras.tick(settings), settings)
    metrics.count(metrics.TICKS, task="look_at_cameras")


def schedule() -> None:
    """Let beat tick this producer's own tasks. A tick that was not worked off before the next is due expires."""
    settings = get_settings().dispatch
    for task, seconds in (
        (TaskName.DISPATCH, settings.interval_seconds),
        (TaskName.RECONCILE, settings.reconcile_seconds),
        (TaskName.REQUEST_SUMMARY, settings.summarize_seconds),
        (TaskName.LOOK_AT_CAMERAS, settings.look_seconds),
    ):
        app.add_periodic_task(
            seconds, app.signature(task.value), name=task.value, queue=ROUTES[task].value, expires=seconds
        )
