"""What `locations correct` and `cameras correct` share."""

from __future__ import annotations

import click

from common.catalog.corrections import Correction
from common.cli.parts.console import note, print_json

dry_run_option = click.option("--dry-run", is_flag=True, help="Only print what would move; change nothing.")


def tell_correction(done: Correction, *, dry_run: bool, as_json: bool, to_location: str | None = None) -> None:
    """Print what has moved or would move; `to_location` is the camera's new location."""
    if as_json:
        print_json({**done.as_dict(), "dry_run": dry_run})
        return
    note(f"{done.objects} objects: {done.moved} {'would move' if dry_run else 'moved'}")
    for count, what in (
        (done.placed, "had no time, and have one now"),
        (done.unplaced, "have no time by the new pattern, and are quarantined"),
        (done.frozen, "were counted in purged hours, which stay as they are"),
    ):
        if count:
            note(f"  {count} {what}")
    if done.jobs_again:
        note(f"  {done.jobs_again} jobs are done again, because their counts can't be moved")
    if not done.shown:
        note(
            f"  {to_location} shows the figures of another pipeline; to show this one's: "
            f"maskwatch pipelines promote --location {to_location}"
        )
    note("nothing was changed" if dry_run else "the aggregator will update the summaries")
