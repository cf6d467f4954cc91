"""`maskwatch producer`: run the dispatcher and the reconciler."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from common.cli.parts.serving import ready_to_serve
from common.messaging.queues import Queue
from common.messaging.serve import serve
from common.observability.metrics import Role
from producer.tasks import schedule

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


def _gauges() -> Iterable[Collector]:
    # Imported here, after `serving` has made the folder: Prometheus's library reads its place when it is imported.
    from producer.gauges import LedgerGauges

    return [LedgerGauges()]


@click.command()
def producer() -> None:
    """Run the dispatcher and the reconciler, until SIGTERM: they send jobs from the ledger to Redis, and recover lost
    messages and jobs. Also polls cameras and ticks the aggregator. Several producers may run at once.

    \b
    Example:
      maskwatch producer
    """
    with ready_to_serve(Role.PRODUCER, _gauges):
        schedule()
        # solo: one task at a time, in this process; the database bounds its statements' time.
        serve(Queue.PRODUCER, f"producer-{os.getpid()}", pool="solo", tasks="producer.tasks", beat=True)
