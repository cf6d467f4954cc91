"""The producer's tasks: wiring only. Beat ticks them; a tick that comes late or twice changes nothing."""

from __future__ import annotations

from common.celery_app import app
from common.queues import ROUTES, TaskName
from common.settings import get_settings
from producer import dispatch


@app.task(name=TaskName.DISPATCH.value)
def dispatch_jobs() -> None:
    """Send pending jobs to the workers."""
    dispatch.dispatch(get_settings())


@app.task(name=TaskName.RECONCILE.value)
def reconcile_jobs() -> None:
    """Recover what got lost."""
    dispatch.reconcile(get_settings())


def schedule() -> None:
    """Let beat tick the dispatcher, the reconciler and the aggregator.

    A tick expires before the next is due: while a consumer is away, ticks don't pile up.
    """
    settings = get_settings().dispatch
    for task, seconds in (
        (TaskName.DISPATCH, settings.interval_seconds),
        (TaskName.RECONCILE, settings.reconcile_seconds),
        (TaskName.SUMMARIZE, settings.summarize_seconds),
    ):
        app.add_periodic_task(
            seconds, app.signature(task.value), name=task.value, queue=ROUTES[task].value, expires=seconds
        )
