"""`maskwatch report`: a page with a plot per location."""

from __future__ import annotations

from pathlib import Path

import click
from sqlalchemy.orm import Session

from common.cli.parts.console import note
from common.cli.parts.sessions import Say, with_session
from common.reporting.report import write_report


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True,
    help="The HTML file to write.",
)  # fmt: skip
@click.option(
    "--picture", "images", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
    help="An example picture to include (from `maskwatch annotate`); may be repeated.",
)  # fmt: skip
@with_session
def report(session: Session, out: Path, images: tuple[Path, ...]) -> Say:
    """Write a report of all locations: one HTML file that needs no other file and no network.

    \b
    Examples:
      maskwatch report --out report.html
      maskwatch report --picture annotated/09-15-00.jpg --picture annotated/09-40-00.jpg
    """
    write_report(session, out, images=images)
    return lambda: note(f"wrote {out}")
