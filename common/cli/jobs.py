"""`maskwatch jobs`: list and show jobs, and what an operator may do to them."""

from __future__ import annotations

from typing import Any

import click
from sqlalchemy.orm import Session

from common import ledger
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.sessions import Say, with_session
from common.domain import JobState, MaskwatchError
from common.ledger import audit
from common.reporting import jobs as queries

#: Valid ids of jobs.
JOB_ID = click.IntRange(1, 2**63 - 1)


@click.group()
def jobs() -> None:
    """Jobs, the units of work, and why some did not succeed."""


@jobs.command("list")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many jobs to list.")
@json_option
@with_session
def list_jobs(session: Session, state: str | None, limit: int, as_json: bool) -> Say:
    """List jobs, the latest first.

    \b
    Example:
      maskwatch jobs list --state quarantined
    """
    rows = queries.list_jobs(session, JobState(state) if state else None, limit)
    if as_json:
        return lambda: print_json(rows)
    columns = ["id", "kind", "range", "state", "attempt", "uri", "reason"]
    return lambda: print_table("Jobs", columns, [[row[column] for column in columns] for row in rows])


@jobs.command("show")
@click.argument("job_id", type=JOB_ID)
@json_option
@with_session
def show_job(session: Session, job_id: int, as_json: bool) -> Say:
    """Show one job: its object, its state, and every attempt.

    \b
    Example:
      maskwatch jobs show 17
    """
    shown = queries.show_job(session, job_id)
    return lambda: print_json(shown) if as_json else _print_job(shown)


def _print_job(shown: dict[str, Any]) -> None:
    single = [(name, value) for name, value in shown.items() if not isinstance(value, list) and value is not None]
    print_table(f"Job {shown['id']}", ["", ""], single)
    columns = ["attempt", "outcome", "worker", "started_at", "ended_at", "reason"]
    print_table("Attempts", columns, [[row[column] for column in columns] for row in shown["attempts"]])
    if shown["actions"]:
        columns = ["action", "by", "at"]
        print_table("Actions", columns, [[row[column] for column in columns] for row in shown["actions"]])


@jobs.command("retry")
@click.argument("job_ids", type=JOB_ID, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All jobs in quarantine.")
@json_option
def retry_jobs(job_ids: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Try jobs in quarantine again, once the cause has been put right; also cancelled jobs, if given by number.

    \b
    Examples:
      maskwatch jobs retry 17 18
      maskwatch jobs retry --all
    """
    if bool(job_ids) == everything:
        raise MaskwatchError("name the jobs to retry, or give --all")
    _retry(job_ids, everything=everything, as_json=as_json)


@with_session
def _retry(session: Session, job_ids: tuple[int, ...], *, everything: bool, as_json: bool) -> Say:
    moved = ledger.retry(session, None if everything else job_ids, by=audit.operator())
    return lambda: _tell_retried(moved, job_ids, as_json)


def _tell_retried(moved: list[int], job_ids: tuple[int, ...], as_json: bool) -> None:
    skipped = sorted(set(job_ids) - set(moved))
    if as_json:
        print_json({"retried": moved, "not_in_quarantine": skipped})
    else:
        note(f"{len(moved)} job(s) will be tried again")
    if skipped:
        raise MaskwatchError(
            f"not retried, because they are not in quarantine, were seen in purged time, or need a time pattern "
            f"that fits (maskwatch backfill --time-pattern): {', '.join(map(str, skipped))}"
        )


@jobs.command("cancel")
@click.argument("job_ids", type=JOB_ID, nargs=-1, required=True)
@json_option
@with_session
def cancel_jobs(session: Session, job_ids: tuple[int, ...], as_json: bool) -> Say:
    """Cancel jobs that have not ended. A worker that is running one of them can no longer store its result.

    Results that are stored stay. `jobs retry` with its number starts a cancelled job again. To cancel a whole backfill:
    `maskwatch backfills cancel`.

    \b
    Example:
      maskwatch jobs cancel 17 18
    """
    moved = ledger.cancel(session, job_ids, by=audit.operator())
    return lambda: _tell_moved("cancelled", moved, job_ids, "because they have ended or don't exist", as_json)


@jobs.command("rerun")
@click.argument("job_ids", type=JOB_ID, nargs=-1, required=True)
@json_option
@with_session
def rerun_jobs(session: Session, job_ids: tuple[int, ...], as_json: bool) -> Say:
    """Analyse pictures and chunks of video again that had succeeded. Removes their faces and updates the summaries.

    \b
    Example:
      maskwatch jobs rerun 17
    """
    moved = ledger.rerun(session, job_ids, by=audit.operator())
    why = "because they have not succeeded, are probes, or counted in purged time"
    return lambda: _tell_moved("to be analysed again", moved, job_ids, why, as_json)


def _tell_moved(what: str, moved: list[int], asked: tuple[int, ...], why: str, as_json: bool) -> None:
    """Print which jobs an action changed. Raises `MaskwatchError` for those that it could not change."""
    skipped = sorted(set(asked) - set(moved))
    if as_json:
        print_json({"changed": moved, "left": skipped})
    else:
        note(f"{len(moved)} job(s) {what}")
    if skipped:
        raise MaskwatchError(f"not changed, {why}: {', '.join(map(str, skipped))}")
