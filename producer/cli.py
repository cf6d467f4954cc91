"""The commands of the producer's side: enqueue footage, run the dispatcher."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from common.console import json_option, note, print_json, progress
from common.options import source_options

if TYPE_CHECKING:
    from producer.submit import BackfillReport


@click.command()
@source_options
@click.option("--wait", is_flag=True, help="Wait until everything of this location is analysed and summarized.")
@json_option
def backfill(
    source: str,
    location: str,
    camera: str | None,
    time_pattern: str | None,
    since: str | None,
    until: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Enqueue every picture and video below SOURCE: s3://bucket/prefix, or a folder.

    Doing it again adds nothing: what is known is skipped, what was replaced is analysed anew. Objects of
    other kinds are counted and named.

    \b
    Examples:
      maskwatch backfill s3://footage/2026/ --location lobby --wait
      maskwatch backfill s3://footage/door/ --location lobby --camera door \\
          --time-pattern 'door/%Y/%m/%d/%H-%M-%S.jpg' --since 2026-03-01
      maskwatch backfill s3://footage/gate/ --location gate --sample-fps 2
    """
    from common import ledger
    from common.database import session_scope
    from common.deployment import deployment
    from common.reporting.cli import parse_bounds
    from common.waiting import wait_for
    from producer.submit import submit

    bounds = parse_bounds(since, until)
    with deployment() as settings:
        with progress() as bar:
            listing = bar.add_task("listing", total=None)
            report = submit(
                settings,
                source,
                location_name=location,
                camera_name=camera,
                time_pattern=time_pattern,
                bounds=bounds,
                on_page=lambda so_far: bar.update(listing, completed=so_far.listed),
            )
        nudge()
        if not as_json:
            describe(report)
        if wait:
            wait_for(settings, location)
        if as_json:
            with session_scope() as session:
                states = ledger.counts_by_state(session, report.id)
            print_json({**report.as_dict(), "jobs": {state.value: count for state, count in states.items() if count}})
        elif not wait:
            note("enqueued; see how it goes: maskwatch status")


def nudge() -> None:
    """Have the dispatcher look now instead of at its next tick; without it, the tick does."""
    from common.queues import BrokerDownError, TaskName, send

    try:
        send(TaskName.DISPATCH, (), expires=60)
    except BrokerDownError as error:
        note(f"warning: {error}; the jobs are in the ledger and will be sent when it is back")


def describe(report: BackfillReport) -> None:
    """Say in words what a backfill found."""
    note(f"{report.listed} objects below {report.source}: {report.new} new, {report.known} known already")
    if report.superseded:
        note(f"  {report.superseded} replaced an older version, whose results were withdrawn")
    if report.quarantined:
        note(
            f"  {report.quarantined} can't be placed in time, or were seen in purged time: "
            "maskwatch jobs list --state quarantined"
        )
    if report.erased:
        note(f"  {report.erased} were erased and stay out")
    if report.outside_range:
        note(f"  {report.outside_range} outside --since/--until")
    if report.others:
        named = ", ".join(report.others_named)
        named += " ..." if report.others > len(report.others_named) else ""
        note(f"  {report.others} are neither pictures nor videos and were left out: {named}")
    if report.elsewhere:
        note(f"  {report.elsewhere} belong to another location or camera and stay there: {report.first_elsewhere}")
    if not report.shown:
        note(
            f"  {report.location} shows the figures of another pipeline; to show this one's: "
            f"maskwatch pipelines promote --location {report.location}"
        )


@click.command()
def producer() -> None:
    """Run the dispatcher and the reconciler, until SIGTERM: they move jobs from the ledger to Redis and
    recover what got lost. Ticks the aggregator, too. Two of them do no harm.

    \b
    Example:
      maskwatch producer
    """
    from common.deployment import deployment

    with deployment():
        from celery.beat import EmbeddedService, Scheduler

        from common.celery_app import app, serve
        from common.queues import Queue
        from producer.tasks import schedule

        schedule()
        # In memory: what is due follows from the ledger, so a restarted beat needs to remember nothing.
        EmbeddedService(app, thread=True, scheduler_cls=Scheduler).start()
        # solo: one task at a time, in this process; the database bounds its statements' time.
        serve(Queue.PRODUCER, f"producer-{os.getpid()}", pool="solo", tasks="producer.tasks")
