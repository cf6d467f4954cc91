"""`maskwatch sources`: buckets and folders, and which of them the circuit breaker has paused."""

from __future__ import annotations

import click
from sqlalchemy.orm import Session

from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.sessions import Say, with_session
from common.ledger import audit
from common.ledger import circuit_breaker as pauses
from common.storage.store import split_uri


@click.group()
def sources() -> None:
    """Buckets and folders that footage comes from. A source that refuses every request is paused automatically."""


@sources.command("list")
@json_option
@with_session
def list_sources(session: Session, as_json: bool) -> Say:
    """List the sources, which are paused, why, and when each is tried again.

    \b
    Example:
      maskwatch sources list
    """
    rows = [
        {
            "source": row.bucket,
            "paused_at": row.paused_at,
            "next_trial_at": row.next_trial_at,
            "refusals": row.refusals,
            "reason": row.reason,
            "detail": row.detail,
        }
        for row in pauses.list_all(session)
    ]
    if as_json:
        return lambda: print_json(rows)
    columns = ["source", "paused_at", "next_trial_at", "reason", "detail"]
    return lambda: print_table("Sources", columns, [[row[column] for column in columns] for row in rows])


@sources.command("resume")
@click.argument("source")
@with_session
def resume_source(session: Session, source: str) -> Say:
    """End the pause of a source at once, when the cause of its refusals has been put right.

    \b
    Example:
      maskwatch sources resume s3://footage
    """
    bucket, _ = split_uri(source)
    pauses.resume(session, bucket)
    audit.record(session, "resume", audit.operator(), detail=bucket)
    return lambda: note(f"{bucket} is resumed")
