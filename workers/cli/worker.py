"""The commands of the workers' side: run one, run the aggregator, summarize now."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from common.cli.console import json_option, note, print_json
from common.cli.options import runtime_options
from common.domain import MaskwatchError
from workers.annotate import annotate

if TYPE_CHECKING:
    from common.metrics import Role

__all__ = ["aggregator", "annotate", "erase", "purge", "summarize", "worker"]


@click.command()
@click.option("--processes", type=click.IntRange(1), help="Child processes (default: MASKWATCH_WORKER__PROCESSES, 1).")
@click.option("--threads", type=click.IntRange(1), help="Threads per model runtime (default: cores // processes).")
@runtime_options
@click.option("--name", default=None, help="A name for logs and for `jobs show` (default: the process id).")
def worker(processes: int | None, threads: int | None, name: str | None) -> None:
    """Run a worker that analyses pictures and videos, until SIGTERM.

    On SIGTERM it finishes the picture at hand, gives the others and a chunk of video back, and exits. Without the GPU
    it is told to use it does not start.

    \b
    Examples, on a machine with 8 cores, and on one with a GPU:
      maskwatch worker --processes 4
      maskwatch worker --device cuda:0
    """
    # Through the environment, because the children read their settings themselves.
    os.environ.setdefault("MASKWATCH_DATABASE__BY_KEY", "true")
    if processes:
        os.environ["MASKWATCH_WORKER__PROCESSES"] = str(processes)
    if threads:
        os.environ["MASKWATCH_WORKER__THREADS"] = str(threads)
    from common.machine import oversubscribed
    from common.metrics import Role
    from common.queues import Queue
    from common.settings import get_settings
    from workers.inference import runtime_of
    from workers.readiness import require_runtime

    settings = get_settings().worker

    # Before any job is claimed: a worker that can do none would take them and give them back for ever.
    require_runtime(runtime_of(get_settings()))
    if (warning := oversubscribed(settings.processes, settings.threads)) is not None:
        note(f"warning: {warning}")
    _serve(Queue.MEDIA, name or f"worker-{os.getpid()}", pool="prefork", role=Role.WORKER)


@click.command()
@click.option("--name", default=None, help="A name for logs (default: the process id).")
def aggregator(name: str | None) -> None:
    """Run a worker that only builds summaries, until SIGTERM. It loads no model and no decoder.

    \b
    Example:
      maskwatch aggregator
    """
    from common.metrics import Role
    from common.queues import Queue

    # solo: one task at a time, in this process; the database bounds its statements' time.
    _serve(Queue.AGGREGATION, name or f"aggregator-{os.getpid()}", pool="solo", role=Role.AGGREGATOR)


def _serve(queue: str, name: str, *, pool: str, role: Role) -> None:
    from common.deployment import deployment
    from common.metrics import serving

    # Metrics before anything of Celery: their folder must be known to the children.
    with deployment() as settings, serving(role, settings.metrics):
        from common.celery_app import serve
        from workers.lifecycle import prepare_drain

        prepare_drain()
        serve(queue, name, pool=pool, tasks="workers.tasks")


@click.command()
@json_option
def summarize(as_json: bool) -> None:
    """Bring the hourly summaries up to date now, without waiting for the schedule.

    \b
    Example:
      maskwatch summarize
    """
    from common.deployment import deployment
    from workers import aggregation

    with deployment():
        hours = aggregation.summarize()
    if as_json:
        print_json({"hours": hours})
    else:
        note(f"{hours} hour(s) summarized")


@click.command()
@click.option(
    "--before", required=True, type=click.DateTime(["%Y-%m-%d"]), help="All faces seen before this day began, in UTC."
)
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
def purge(before: datetime, yes: bool, as_json: bool) -> None:
    """Remove the faces seen before a date for good. The hourly summaries of that time stay, as they are; footage of it
    that arrives later is refused, with a reason. May be repeated, and goes on where it was interrupted.

    \b
    Example:
      maskwatch purge --before 2026-01-01
    """
    from common import audit
    from common.deployment import deployment
    from workers import purging

    if not yes:
        click.confirm(f"Remove every face seen before {before:%Y-%m-%d} for good?", abort=True, err=True)
    with deployment():
        done = purging.purge(before.replace(tzinfo=UTC), by=audit.operator(), on_step=note)
    if as_json:
        print_json({"before": done.before, "partitions": done.partitions, "faces": done.faces})
    else:
        note(
            f"purged before {done.before:%Y-%m-%d}: {len(done.partitions)} month(s) dropped, {done.faces} other face(s)"
        )


@click.command()
@click.argument("uri")
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
def erase(uri: str, yes: bool, as_json: bool) -> None:
    """Remove everything that came from an object, in all its versions: faces, counts, jobs, its name. The summaries
    follow. The object stays out of later backfills; the object itself is yours to delete.

    \b
    Example:
      maskwatch erase s3://footage/door/2026/03/02/12-00-00.jpg
    """
    from common import audit, ledger
    from common.database import session_scope
    from common.deployment import deployment
    from common.storage import named_object
    from workers import aggregation

    bucket, key = named_object(uri)
    if not yes:
        click.confirm(f"Remove everything that came from {bucket}/{key} for good?", abort=True, err=True)
    with deployment():
        with session_scope() as session:
            versions = ledger.erase(session, bucket, key, by=audit.operator())
            if not versions:
                raise MaskwatchError(f"nothing is known of {bucket}/{key}; nothing was changed")
        aggregation.summarize()
    if as_json:
        print_json({"object": f"{bucket}/{key}", "versions": versions})
    else:
        note(f"erased what came from {versions} version(s) of {bucket}/{key}")
