"""What `backfill` and `backfills resume` share: the options of a listing, and its report."""

from __future__ import annotations

from collections.abc import Callable

import click

from common import ledger
from common.cli.parts.console import note, print_json
from common.cli.parts.waiting import wait_for
from common.database.sessions import session_scope
from common.messaging.queues import BrokerDownError, TaskName, send
from common.settings import Settings
from producer.submit import BackfillReport, Restore

#: How quickly S3 restores archived objects; a quicker tier costs more.
TIERS = ("Bulk", "Standard", "Expedited")


def listing_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that lists a backfill's source."""
    for option in reversed(
        [
            click.option(
                "--restore",
                "restore_tier",
                type=click.Choice([tier.lower() for tier in TIERS]),
                help="Have S3 restore objects from Glacier or Deep Archive (AWS bills it; bulk is the cheapest and "
                "takes up to 48 h). They are analysed when they are restored. Without it, they are only counted.",
            ),
            click.option(
                "--restore-days",
                type=click.IntRange(1, 365),
                default=7,
                show_default=True,
                help="How many days S3 keeps the restored objects.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(1, 16),
                default=4,
                show_default=True,
                help="How many folders of a bucket, or data files of an inventory, are read at once.",
            ),
        ]
    ):
        command = option(command)
    return command


def restore_of(tier: str | None, days: int) -> Restore | None:
    """What `--restore` and `--restore-days` ask for; None without `--restore`."""
    return Restore(tier.capitalize(), days) if tier else None


def conclude(settings: Settings, report: BackfillReport, *, wait: bool, as_json: bool) -> None:
    """Print what was found, ask the dispatcher to send it, and wait for the jobs if asked to."""
    nudge()
    if not as_json:
        describe(report)
    if wait:
        # Objects that were known already may belong to other backfills: then the whole location is waited for.
        wait_for(settings, report.location, backfill_id=None if report.known else report.id)
    if as_json:
        with session_scope() as session:
            states = ledger.counts_by_state(session, report.id)
        print_json({**report.as_dict(), "jobs": {state.value: count for state, count in states.items() if count}})
    elif not wait:
        note(f"enqueued as backfill {report.id}; to see its progress: maskwatch backfills list")


def nudge() -> None:
    """Ask the dispatcher to tick now. If the broker is down, its next tick sends the jobs."""
    try:
        send(TaskName.DISPATCH, (), expires=60)
    except BrokerDownError as error:
        note(f"warning: {error}; the jobs are in the ledger and will be sent when the broker is back")


def describe(report: BackfillReport) -> None:
    """Print what a backfill found."""
    if report.resumed:
        note(f"backfill {report.id} was begun earlier, and went on where it was")
    read = f" in the inventory {report.inventory}" if report.inventory else ""
    note(f"{report.listed} objects below {report.source}{read}: {report.new} new, {report.known} known already")
    if report.superseded:
        note(f"  {report.superseded} replaced an older version, whose results were removed")
    if report.quarantined - report.archived > 0:
        note(
            f"  {report.quarantined - report.archived} have no time, or were seen in purged time: "
            "maskwatch jobs list --state quarantined"
        )
    if report.archived:
        asked = f"{report.restoring} are being restored" if report.restoring else "to restore them: --restore"
        note(f"  {report.archived} are archived in S3; {asked}")
    if report.first_not_restored:
        note(f"  some could not be restored: {report.first_not_restored}")
    if report.same_bytes:
        note(f"  {report.same_bytes} hold the same bytes as another object, under another key; each is counted")
    if report.erased:
        note(f"  {report.erased} were erased (maskwatch erase) and are not enqueued")
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
