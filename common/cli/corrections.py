"""What `locations correct` and `cameras correct` share."""

from __future__ import annotations

import click

from common.catalog.corrections import Correction
from common.cli.parts.console import note, print_json

dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would move; nothing is changed.")


def tell_correction(done: Correction, *, dry_run: bool, as_json: bool, to_location: str | None = None) -> None:
    """Say what has moved, or would; `to_location` is where a camera has gone."""
    if as_json:
        print_json({**done.as_dict(), "dry_run": dry_run})
        return
    note(f"{done.objects} objects: {done.moved} {'would move' if dry_run else 'moved'}")
    for count, what in (
        (done.placed, "had no time, and have one now"),
        (done.unplaced, "have no time by this, and are quarantined"),
        (done.frozen, "count in purged hours, which stay as they are"),
    ):
        if count:
            note(f"  {count} {what}")
    if done.jobs_again:
        note(f"  {done.jobs_again} jobs are to be done again, because their counts can't be moved")
    if not done.shown:
        note(
            f"  {to_location} shows the figures of another pipeline; to show this one's: "
            f"maskwatch pipelines promote --location {to_location}"
        )
    note("nothing was changed" if dry_run else "the summaries follow as the aggregator comes to them")
