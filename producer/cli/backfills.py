"""`maskwatch backfills`: show the progress of backfills; pause, resume or cancel one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from sqlalchemy.orm import Session

from common.catalog import backfills as backfill_rows
from common.cli.parts.console import bar, json_option, note, print_json, print_table
from common.cli.parts.deployment import deployment
from common.cli.parts.sessions import Say, with_session
from common.database.sessions import session_scope
from common.ledger import audit
from producer.cli.listing import conclude, listing_options, restore_of
from producer.submit import cancel, take_up

#: Valid values of `backfills.id`.
BACKFILL_ID = click.IntRange(1, 2**63 - 1)


@click.group()
def backfills() -> None:
    """Show the progress of backfills; pause, resume or cancel one."""


@backfills.command("list")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many backfills to list.")
@json_option
@with_session
def list_backfills(session: Session, limit: int, as_json: bool) -> Say:
    """List backfills, the newest first, with their jobs by state.

    \b
    Example:
      maskwatch backfills list
    """
    found = backfill_rows.list_all(session, limit=limit)
    if as_json:
        return lambda: print_json([asdict(row) for row in found])
    columns = ["backfill", "source", "location", "camera", "begun", "state", "jobs"]
    return lambda: print_table("Backfills", columns, [_backfill_row(row) for row in found])


def _backfill_row(row: backfill_rows.BackfillState) -> list[Any]:
    return [
        row.id,
        row.source,
        row.location,
        row.camera,
        f"{row.started_at:%Y-%m-%d %H:%M}",
        row.state,
        ", ".join(f"{count} {state}" for state, count in row.jobs.items()),
    ]


@backfills.command("pause")
@click.argument("backfill_id", type=BACKFILL_ID)
@with_session
def pause_backfill(session: Session, backfill_id: int) -> Say:
    """Pause a backfill: no more of its jobs are sent, and its listing stops. Jobs that are running go on to their end.

    \b
    Example:
      maskwatch backfills pause 3
    """
    backfill_rows.pause(session, backfill_id, by=audit.operator())
    return lambda: note(f"backfill {backfill_id} is paused; to go on: maskwatch backfills resume {backfill_id}")


@backfills.command("resume")
@click.argument("backfill_id", type=BACKFILL_ID)
@listing_options
@click.option("--wait", is_flag=True, help="Wait until everything in the backfill is analysed and summarized.")
@json_option
def resume_backfill(
    backfill_id: int, restore_tier: str | None, restore_days: int, threads: int, wait: bool, as_json: bool
) -> None:
    """Resume a backfill that was paused, or whose listing was stopped.

    \b
    Example:
      maskwatch backfills resume 3
    """
    with deployment() as settings:
        with session_scope() as session:
            row = backfill_rows.get(session, backfill_id)
            # A backfill whose listing was killed is not paused; its listing goes on all the same.
            if row.paused_at is not None or row.finished_at is not None or row.cancelled_at is not None:
                backfill_rows.resume(session, backfill_id, by=audit.operator())
        with bar("listing") as shown:
            report = take_up(
                settings,
                backfill_id,
                restore=restore_of(restore_tier, restore_days),
                threads=threads,
                on_page=lambda so_far: shown.show(so_far.listed),
            )
        conclude(settings, report, wait=wait, as_json=as_json)


@backfills.command("cancel")
@click.argument("backfill_id", type=BACKFILL_ID)
def cancel_backfill(backfill_id: int) -> None:
    """Cancel the rest of a backfill, for good. Results that are stored stay.

    \b
    Example:
      maskwatch backfills cancel 3
    """
    with deployment(), bar("cancelling") as shown:
        count = cancel(backfill_id, shown.show)
    note(f"backfill {backfill_id} is cancelled, with {count} job(s) that had not ended")
