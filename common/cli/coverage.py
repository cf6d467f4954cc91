"""`maskwatch coverage`: which footage of a camera was analysed, and what is missing."""

from __future__ import annotations

from dataclasses import asdict

import click

from common.catalog import places
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.deployment import deployment
from common.cli.parts.options import parse_bounds
from common.database.sessions import session_scope
from common.reporting.coverage import CoverageHour
from common.reporting.coverage import coverage as hours_of
from common.reporting.tables import percent


@click.command()
@click.option("--location", required=True, help="Where the camera hangs.")
@click.option("--camera", required=True, help="The camera's name.")
@click.option("--since", metavar="TIME", help="Only hours from this time on (ISO 8601; the location's own clock).")
@click.option("--until", metavar="TIME", help="Only hours before this time (in the same form).")
@click.option("--holes", is_flag=True, help="Only hours that lack something.")
@json_option
def coverage(location: str, camera: str, since: str | None, until: str | None, holes: bool, as_json: bool) -> None:
    """Show a camera's footage hour by hour: how much is there, analysed, failed, and missing.

    `cameras change` sets how much footage is expected per hour (--expects) and how much time a picture covers
    (--picture-every). `maskwatch backfill --gaps` enqueues what is left of the holes.

    \b
    Examples:
      maskwatch coverage --location lobby --camera gate --since 2026-03-28
      maskwatch coverage --location lobby --camera gate --holes
    """
    bounds = parse_bounds(since, until)
    with deployment(), session_scope() as session:
        rows = hours_of(session, places.get_camera(session, places.get_location(session, location), camera), *bounds)
    shown = [row for row in rows if row.is_hole or not holes]
    if as_json:
        print_json([{**asdict(row), "hole": row.is_hole} for row in shown])
        return
    columns = ["hour", "expected", "present", "analysed", "waiting", "failed", "missing", "coverage", ""]
    print_table(f"{camera} at {location}, in minutes", columns, [_coverage_row(row) for row in shown])
    count = sum(row.is_hole for row in rows)
    note(
        f"{count} of {len(rows)} hours lack something"
        + ("; to fill them as far as possible: maskwatch backfill --gaps" * bool(count))
    )


def _coverage_row(row: CoverageHour) -> list[str]:
    lengths = (
        row.expected_seconds,
        row.present_seconds,
        row.analysed_seconds,
        row.waiting_seconds,
        row.failed_seconds,
        row.missing_seconds,
    )
    failed = f"{row.failed_pieces} of {row.pieces} failed" if row.failed_pieces else ""
    return [
        f"{row.local_hour:%Y-%m-%d %H:%M}",
        *("–" if length is None else f"{length / 60:.1f}" for length in lengths),
        percent(row.coverage),
        failed or ("hole" if row.is_hole else ""),
    ]
