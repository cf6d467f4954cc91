"""`maskwatch worker`: run a worker that analyses images and videos."""

from __future__ import annotations

import os

import click

from common.cli.parts.console import note
from common.cli.parts.options import put_setting, runtime_options
from common.cli.parts.serving import ready_to_serve
from common.machine import oversubscribed
from common.messaging.queues import Queue
from common.messaging.serve import serve
from common.observability.metrics import Role
from common.settings import get_settings
from workers.inference import runtime_of
from workers.jobs.preflight import require_runtime
from workers.lifecycle import prepare_drain


@click.command()
@click.option("--processes", type=click.IntRange(1), help="Child processes (default: MASKWATCH_WORKER__PROCESSES, 1).")
@click.option("--threads", type=click.IntRange(1), help="Threads per model runtime (default: cores // processes).")
@runtime_options
@click.option("--name", default=None, help="A name for logs and for `jobs show` (default: worker- and the process id).")
def worker(processes: int | None, threads: int | None, name: str | None) -> None:
    """Run a worker that analyses pictures and videos, until SIGTERM.

    On SIGTERM it finishes its current picture, gives its other jobs back, and exits. It does not start if the device it
    is told to use is missing.

    \b
    Examples, on a machine with 8 cores, and on one with a GPU:
      maskwatch worker --processes 4
      maskwatch worker --device cuda:0
    """
    # Through the environment, because the children read their settings themselves.
    if "MASKWATCH_DATABASE__BY_KEY" not in os.environ:
        put_setting("MASKWATCH_DATABASE__BY_KEY", "true")
    if processes:
        put_setting("MASKWATCH_WORKER__PROCESSES", str(processes))
    if threads:
        put_setting("MASKWATCH_WORKER__THREADS", str(threads))
    settings = get_settings()
    # Checked before any job is claimed: an unfit worker would claim jobs and give them back for ever.
    require_runtime(runtime_of(settings))
    if (warning := oversubscribed(settings.worker.processes, settings.worker.threads)) is not None:
        note(f"warning: {warning}")
    with ready_to_serve(Role.WORKER):
        prepare_drain()
        serve(Queue.MEDIA, name or f"worker-{os.getpid()}", pool="prefork", tasks="workers.tasks")
