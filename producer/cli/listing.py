"""What `backfill` and `backfills resume` share: the options of a listing, and what is said of it."""

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


def restore_of(tier: str | None, days: int) -> Restore | None:
    """What `--restore` and `--restore-days` ask for; None for nothing."""
    return Restore(tier.capitalize(), days) if tier else None


def conclude(settings: Settings, report: BackfillReport, *, wait: bool, as_json: bool) -> None:
    """Say what was found, have it sent, and wait for it if asked to."""
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


def nudge() -> None:
    """Have the dispatcher look now instead of at its next tick; without it, the tick does."""
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
