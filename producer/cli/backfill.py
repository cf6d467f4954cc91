"""The commands of the producer's side: enqueue footage, run the dispatcher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from common.cli.console import json_option, note, print_json, print_table, progress
from common.cli.options import source_options

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from common.settings import Settings
    from producer.estimate import Estimate
    from producer.submit import BackfillReport, Restore

#: How quickly S3 brings back what lies in an archive; what is quicker costs more.
TIERS = ("Bulk", "Standard", "Expedited")


def listing_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that lists a backfill's source."""
    for option in reversed(
        [
            click.option(
                "--restore",
                "restore_tier",
                type=click.Choice([tier.lower() for tier in TIERS]),
                help="Have S3 bring back what lies in Glacier or Deep Archive (AWS bills it; bulk is the cheapest and "
                "takes up to 48 h). It is analysed when it is back. Without it: counted and left.",
            ),
            click.option(
                "--restore-days",
                type=click.IntRange(1, 365),
                default=7,
                show_default=True,
                help="How long S3 keeps what it brought back.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(1, 16),
                default=4,
                show_default=True,
                help="Folders of a bucket, or data files of an inventory, that are listed at once.",
            ),
        ]
    ):
        command = option(command)
    return command


@click.command()
@source_options(source_required=False)
@listing_options
@click.option(
    "--inventory",
    metavar="MANIFEST",
    help="Read this S3 Inventory instead of listing: the manifest.json of a delivery, in CSV or Parquet, with Size, "
    "LastModifiedDate and ETag (and StorageClass, where things lie in an archive). For tens of millions of objects.",
)
@click.option("--wait", is_flag=True, help="Wait until everything of it is analysed and summarized.")
@click.option("--gaps", is_flag=True, help="Of a camera's own source: only what its hours lack (maskwatch coverage).")
@click.option("--dry-run", is_flag=True, help="Only say what it would find, make, take and cost. Nothing is written.")
@click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Worker processes, for a dry run's time."
)
@click.option(
    "--price-per-hour", type=click.FloatRange(0), metavar="PRICE", help="Of a worker process, for a dry run's cost."
)
@json_option
def backfill(
    source: str | None,
    location: str,
    camera: str | None,
    time_pattern: str | None,
    since: str | None,
    until: str | None,
    restore_tier: str | None,
    restore_days: int,
    threads: int,
    inventory: str | None,
    wait: bool,
    gaps: bool,
    dry_run: bool,
    workers: int,
    price_per_hour: float | None,
    as_json: bool,
) -> None:
    """Enqueue every picture and video below SOURCE: s3://bucket/prefix, or a folder.

    Doing it again adds nothing: what is known is skipped, what was replaced is analysed anew. If it was stopped while
    it listed, it goes on where it was. Objects of other kinds are counted and named.

    \b
    Examples:
      maskwatch backfill s3://footage/2026/ --location lobby --wait
      maskwatch backfill s3://footage/door/ --location lobby --camera door \\
          --time-pattern 'door/%Y/%m/%d/%H-%M-%S.jpg' --since 2026-03-01
      maskwatch backfill s3://footage/gate/ --location gate --sample-fps 2
      maskwatch backfill s3://footage/ --location lobby --dry-run --workers 16 --price-per-hour 0.05
      maskwatch backfill s3://footage/2026/ --location lobby \\
          --inventory s3://inventories/footage/daily/2026-11-01T01-00Z/manifest.json
    """
    from common.cli.summary import parse_bounds
    from common.deployment import deployment
    from producer.estimate import estimate
    from producer.submit import submit

    bounds = parse_bounds(since, until)
    if gaps:
        if source is not None or camera is None or dry_run or inventory is not None:
            raise click.UsageError(
                "--gaps goes with --location and --camera, and with none of a SOURCE, --inventory and --dry-run"
            )
        _fill_gaps(location, camera, bounds, wait=wait, as_json=as_json)
        return
    if source is None:
        raise click.UsageError("name a SOURCE: s3://bucket/prefix, or a folder")
    with deployment() as settings:
        if dry_run:
            with progress() as bar:
                task = bar.add_task("listing", total=None)
                result = estimate(
                    settings,
                    source,
                    location_name=location,
                    time_pattern=time_pattern,
                    bounds=bounds,
                    inventory_uri=inventory,
                    restore_tier=restore_tier.capitalize() if restore_tier else None,
                    workers=workers,
                    price_per_hour=price_per_hour,
                    on_page=lambda listed: bar.update(task, completed=listed),
                )
            if as_json:
                print_json(result.as_dict())
            else:
                _print_estimate(result)
            return
        with listing_bar() as on_page:
            report = submit(
                settings,
                source,
                location_name=location,
                camera_name=camera,
                time_pattern=time_pattern,
                bounds=bounds,
                inventory_uri=inventory,
                restore=_restore(restore_tier, restore_days),
                threads=threads,
                on_page=on_page,
            )
        conclude(settings, report, wait=wait, as_json=as_json)


def _fill_gaps(
    location: str, camera: str, bounds: tuple[datetime | None, datetime | None], *, wait: bool, as_json: bool
) -> None:
    from common.cli.waiting import wait_for
    from common.deployment import deployment
    from producer.submit import fill_gaps

    with deployment() as settings:
        with progress() as bar:
            task = bar.add_task("listing", total=None)
            hours, new, again = fill_gaps(
                settings,
                location_name=location,
                camera_name=camera,
                bounds=bounds,
                on_page=lambda listed: bar.update(task, completed=listed),
            )
        nudge()
        if wait:
            wait_for(settings, location)
    if as_json:
        print_json({"hours": hours, "new": new, "again": again})
    else:
        note(f"{hours} hours lacked something: {new} objects are new, {again} jobs are tried again")


def _print_estimate(result: Estimate) -> None:
    found, rates = result.found, result.throughput

    def known(value: float | None, form: str) -> str:
        return "unknown until some of it is analysed" if value is None else form.format(value)

    rows = [
        ("pictures", f"{found.images:,} ({found.image_bytes / 2**30:,.2f} GiB)"),
        ("videos", f"{found.videos:,} ({found.video_bytes / 2**30:,.2f} GiB)"),
        ("footage of videos", known(result.footage_hours, "{:,.2f} hours")),
        ("jobs", known(result.jobs, "{:,}")),
        ("face rows", known(result.face_rows, "about {:,}")),
        ("worker-hours", known(result.worker_hours, "{:,.2f}")),
        (f"time with {result.workers} worker process(es)", known(result.hours, "{:,.2f} hours")),
    ]
    if result.cost is not None:
        rows.append(("cost", f"{result.cost:,.2f}"))
    if found.archived:
        rows += [
            (f"in {name}", f"{count:,} ({found.archived_bytes[name] / 2**30:,.2f} GiB)")
            for name, count in sorted(found.archived.items())
        ]
        rows.append(("restoring these, at list prices", known(result.restore_cost, "{:,.2f} US dollars")))
    print_table(f"Dry run: {result.source} for {result.location}", ["", ""], rows)
    if result.inventory:
        note(f"  by the inventory {result.inventory}")
    left = [
        (found.known, "known already"),
        (found.unplaced, "whose key has no time by this pattern, and would be quarantined"),
        (found.outside_range, "outside --since/--until"),
        (found.others, "neither pictures nor videos"),
    ]
    for count, what in left:
        if count:
            note(f"  {count:,} {what}")
    note(
        f"  a picture takes {rates.seconds_per_image.value:.3f} s ({rates.seconds_per_image.origin}), a second of "
        f"video {rates.seconds_per_footage_second.value:.3f} s ({rates.seconds_per_footage_second.origin})"
    )


def _restore(tier: str | None, days: int) -> Restore | None:
    from producer.submit import Restore

    return Restore(tier.capitalize(), days) if tier else None


@contextmanager
def listing_bar() -> Iterator[Callable[[BackfillReport], None]]:
    """A bar of what has been listed, to be moved by reports."""
    with progress() as bar:
        task = bar.add_task("listing", total=None)
        yield lambda so_far: bar.update(task, completed=so_far.listed)


def conclude(settings: Settings, report: BackfillReport, *, wait: bool, as_json: bool) -> None:
    """Say what was found, have it sent, and wait for it if asked to."""
    from common import ledger
    from common.cli.waiting import wait_for
    from common.database import session_scope

    nudge()
    if not as_json:
        describe(report)
    if wait:
        # What an earlier call had enqueued is not this one's, and is waited for, too.
        wait_for(settings, report.location, backfill_id=None if report.known else report.id)
    if as_json:
        with session_scope() as session:
            states = ledger.counts_by_state(session, report.id)
        print_json({**report.as_dict(), "jobs": {state.value: count for state, count in states.items() if count}})
    elif not wait:
        note(f"enqueued as backfill {report.id}; see how it goes: maskwatch backfills list")


@click.group()
def backfills() -> None:
    """Backfills: how far they are; pause, resume or cancel one."""


@backfills.command("list")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The newest so many.")
@json_option
def list_backfills(limit: int, as_json: bool) -> None:
    """List backfills, the newest first, with how many of their jobs stand where.

    \b
    Example:
      maskwatch backfills list
    """
    from common import backfills as rows
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        found = rows.list_all(session, limit=limit)
    if as_json:
        print_json([asdict(row) for row in found])
        return
    columns = ["backfill", "source", "location", "camera", "begun", "state", "jobs"]
    print_table(
        "Backfills",
        columns,
        [
            [
                row.id,
                row.source,
                row.location,
                row.camera,
                f"{row.started_at:%Y-%m-%d %H:%M}",
                row.state,
                ", ".join(f"{count} {state}" for state, count in row.jobs.items()),
            ]
            for row in found
        ],
    )


BACKFILL_ID = click.IntRange(1, 2**63 - 1)


@backfills.command("pause")
@click.argument("backfill_id", type=BACKFILL_ID)
def pause_backfill(backfill_id: int) -> None:
    """Send nothing more of a backfill, and stop its listing. What workers have in hand is ended.

    \b
    Example:
      maskwatch backfills pause 3
    """
    from common import audit
    from common import backfills as rows
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        rows.pause(session, backfill_id, by=audit.operator())
    note(f"backfill {backfill_id} is paused; go on: maskwatch backfills resume {backfill_id}")


@backfills.command("resume")
@click.argument("backfill_id", type=BACKFILL_ID)
@listing_options
@click.option("--wait", is_flag=True, help="Wait until everything of it is analysed and summarized.")
@json_option
def resume_backfill(
    backfill_id: int, restore_tier: str | None, restore_days: int, threads: int, wait: bool, as_json: bool
) -> None:
    """Go on with a backfill that was paused, or whose listing was stopped.

    \b
    Example:
      maskwatch backfills resume 3
    """
    from common import audit
    from common import backfills as rows
    from common.database import session_scope
    from common.deployment import deployment
    from producer.submit import take_up

    with deployment() as settings:
        with session_scope() as session:
            row = rows.get(session, backfill_id)
            # A listing that was killed is not paused, and is taken up all the same.
            if row.paused_at is not None or row.finished_at is not None or row.cancelled_at is not None:
                rows.resume(session, backfill_id, by=audit.operator())
        with listing_bar() as on_page:
            report = take_up(
                settings,
                backfill_id,
                restore=_restore(restore_tier, restore_days),
                threads=threads,
                on_page=on_page,
            )
        conclude(settings, report, wait=wait, as_json=as_json)


@backfills.command("cancel")
@click.argument("backfill_id", type=BACKFILL_ID)
def cancel_backfill(backfill_id: int) -> None:
    """Cancel what is left of a backfill, for good. What was analysed stays.

    \b
    Example:
      maskwatch backfills cancel 3
    """
    from common.deployment import deployment
    from producer.submit import cancel

    with deployment(), progress() as bar:
        task = bar.add_task("cancelling", total=None)
        count = cancel(backfill_id, lambda some: bar.update(task, advance=some))
    note(f"backfill {backfill_id} is cancelled, with {count} job(s) that had not ended")


def nudge() -> None:
    """Have the dispatcher look now instead of at its next tick; without it, the tick does."""
    from common.queues import BrokerDownError, TaskName, send

    try:
        send(TaskName.DISPATCH, (), expires=60)
    except BrokerDownError as error:
        note(f"warning: {error}; the jobs are in the ledger and will be sent when it is back")


def describe(report: BackfillReport) -> None:
    """Say in words what a backfill found."""
    if report.resumed:
        note(f"backfill {report.id} was begun earlier, and gone on with")
    read = f" in the inventory {report.inventory}" if report.inventory else ""
    note(f"{report.listed} objects below {report.source}{read}: {report.new} new, {report.known} known already")
    if report.superseded:
        note(f"  {report.superseded} replaced an older version, whose results were withdrawn")
    if report.quarantined - report.archived > 0:
        note(
            f"  {report.quarantined - report.archived} can't be placed in time, or were seen in purged time: "
            "maskwatch jobs list --state quarantined"
        )
    if report.archived:
        asked = f"{report.restoring} were asked for" if report.restoring else "--restore asks for them"
        note(f"  {report.archived} lie in an archive of S3; {asked}")
    if report.first_not_restored:
        note(f"  not all could be asked for: {report.first_not_restored}")
    if report.same_bytes:
        note(f"  {report.same_bytes} hold the same bytes as another one, under another key; each is counted")
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


def _gauges() -> Iterable[Collector]:
    # Imported here: Prometheus's library is needed only where metrics are served.
    from producer.gauges import LedgerGauges

    return [LedgerGauges()]


@click.command()
def producer() -> None:
    """Run the dispatcher and the reconciler, until SIGTERM: they move jobs from the ledger to Redis and
    recover what got lost. Ticks the aggregator, too. Two of them do no harm.

    \b
    Example:
      maskwatch producer
    """
    from common.deployment import deployment
    from common.metrics import Role, serving

    with deployment() as settings, serving(Role.PRODUCER, settings.metrics, _gauges):
        from celery.beat import EmbeddedService, Scheduler

        from common.celery_app import app, serve
        from common.queues import Queue
        from producer.tasks import schedule

        schedule()
        # In memory: what is due follows from the ledger, so a restarted beat needs to remember nothing.
        EmbeddedService(app, thread=True, scheduler_cls=Scheduler).start()
        # solo: one task at a time, in this process; the database bounds its statements' time.
        serve(Queue.PRODUCER, f"producer-{os.getpid()}", pool="solo", tasks="producer.tasks")
