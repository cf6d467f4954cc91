"""`maskwatch purge` and `maskwatch erase`: remove data for good."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from common import ledger
from common.cli.parts.console import json_option, note, print_json
from common.cli.parts.deployment import deployment
from common.database.sessions import session_scope
from common.domain import MaskwatchError
from common.ledger import audit
from common.storage.store import named_object
from workers.summaries import aggregation, purging


@click.command()
@click.option(
    "--before",
    required=True,
    type=click.DateTime(["%Y-%m-%d"]),
    help="Remove all faces seen before this day began, in UTC.",
)
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
def purge(before: datetime, yes: bool, as_json: bool) -> None:
    """Remove the faces seen before a date for good. The hourly summaries of that time stay as they are; footage of that
    time that arrives later is quarantined. If it was interrupted, run it again: it goes on where it was.

    \b
    Example:
      maskwatch purge --before 2026-01-01
    """
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
    """Remove everything that came from an object, in all its versions: faces, counts, jobs, its name, and update the
    summaries. Later backfills leave the object out. The object itself is not deleted: do that in the bucket.

    \b
    Example:
      maskwatch erase s3://footage/door/2026/03/02/12-00-00.jpg
    """
    bucket, key = named_object(uri)
    if not yes:
        click.confirm(f"Remove everything that came from {bucket}/{key} for good?", abort=True, err=True)
    with deployment():
        with session_scope() as session:
            versions = ledger.erase(session, bucket, key, by=audit.operator())
            if not versions:
                raise MaskwatchError(f"{bucket}/{key} is unknown; nothing was changed")
        aggregation.summarize()
    if as_json:
        print_json({"object": f"{bucket}/{key}", "versions": versions})
    else:
        note(f"erased what came from {versions} version(s) of {bucket}/{key}")
