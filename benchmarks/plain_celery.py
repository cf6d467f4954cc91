"""Celery by itself, for `benchmarks.ledger`: a task that does nothing, one per message, with Celery's own settings."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("plain", set_as_current=False, broker=os.environ.get("PLAIN_BROKER_URL", "redis://"))
app.conf.update(task_ignore_result=True, worker_concurrency=1)


@app.task(name="plain.nothing")
def nothing(number: int) -> None:
    """Do nothing."""
