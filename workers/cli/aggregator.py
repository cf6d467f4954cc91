"""`maskwatch aggregator`: run a worker that only builds summaries."""

from __future__ import annotations

import os

import click

from common.cli.parts.serving import ready_to_serve
from common.messaging.queues import Queue
from common.messaging.serve import serve
from common.observability.metrics import Role
from workers.lifecycle import prepare_drain


@click.command()
@click.option("--name", default=None, help="A name for logs (default: aggregator- and the process id).")
def aggregator(name: str | None) -> None:
    """Run a worker that only builds summaries, until SIGTERM. It loads no model and no decoder.

    \b
    Example:
      maskwatch aggregator
    """
    with ready_to_serve(Role.AGGREGATOR):
        prepare_drain()
        # solo: one task at a time, in this process; the database bounds its statements' time.
        serve(Queue.AGGREGATION, name or f"aggregator-{os.getpid()}", pool="solo", tasks="workers.tasks")
