"""The commands that read: `maskwatch summary`, `maskwatch coverage` and `maskwatch report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from common.cli.console import json_option, note, percent, print_json, print_table
from common.domain import MaskwatchError
from common.reporting.coverage import CoverageHour
from common.reporting.queries import ComplianceRow, Period


@click.command()
@click.option("--location", metavar="NAME", help="Only this location (default: all).")
@click.option(
    "--by", type=click.Choice([period.value for period in Period]), default=Period.DAY.value, show_default=True,
    help="How long a row is; weeks begin on Monday.",
)  # fmt: skip
@click.option("--since", metavar="TIME", help="Only hours from this time on (ISO 8601; the location's own clock).")
@click.option("--until", metavar="TIME", help="Only hours before this time (ISO 8601; the location's own clock).")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
def summary(location: str | None, by: str, since: str | None, until: str | None, as_json: bool, as_csv: bool) -> None:
    """Compliance per location by hour, day or week.

    The rate is with mask / (with mask + without mask), beside its 95 % interval; uncertain faces are in
    neither. Hours, days and weeks are those of the location's own time zone.

    \b
    Examples:
      maskwatch summary
      maskwatch summary --location lobby --by hour --since 2026-03-28 --until 2026-03-29
      maskwatch summary --by week --csv > weeks.csv
    """
    from common.database import session_scope
    from common.deployment import deployment
    from common.reporting import tables
    from common.reporting.queries import compliance, hours_to_summarize

    if as_json and as_csv:
        raise MaskwatchError("--json and --csv exclude each other: give one of them")
    period, bounds = Period(by), parse_bounds(since, until)
    with deployment(), session_scope() as session:
        rows = compliance(session, location, period, *bounds)
        lagging = hours_to_summarize(session)
    if as_json:
        print_json({"by": period, "rows": [tables.as_dict(row) for row in rows]})
    elif as_csv:
        click.echo(tables.as_csv(rows), nl=False)
    elif rows:
        print_compliance(rows, period)
    else:
        note(
            "no figures"
            + (" in this range" if since or until else " yet")
            + "; maskwatch status shows what is under way"
        )
        note("to analyse pictures: maskwatch run photos/ --location lobby")
    if lagging:
        note(f"{lagging} hours have newer results that are not in these figures yet: maskwatch summarize")


@click.command()
@click.option("--location", required=True, help="Where the camera hangs.")
@click.option("--camera", required=True, help="Its name.")
@click.option("--since", metavar="TIME", help="Only hours from this time on (ISO 8601; the location's own clock).")
@click.option("--until", metavar="TIME", help="Only hours before this time (the same).")
@click.option("--holes", is_flag=True, help="Only hours that lack something.")
@json_option
def coverage(location: str, camera: str, since: str | None, until: str | None, holes: bool, as_json: bool) -> None:
    """What was looked at of a camera, hour by hour: footage that is there, analysed, failed, and missing.

    What it should have delivered is said by `cameras change --expects`, how much a picture stands for by
    `--picture-every`. `maskwatch backfill --gaps` does what is left of the holes.

    \b
    Examples:
      maskwatch coverage --location lobby --camera gate --since 2026-03-28
      maskwatch coverage --location lobby --camera gate --holes
    """
    from common import catalog
    from common.database import session_scope
    from common.deployment import deployment
    from common.reporting.coverage import coverage as hours_of

    bounds = parse_bounds(since, until)
    with deployment(), session_scope() as session:
        rows = hours_of(session, catalog.get_camera(session, catalog.get_location(session, location), camera), *bounds)
    shown = [row for row in rows if row.is_hole or not holes]
    if as_json:
        print_json([{**asdict(row), "hole": row.is_hole} for row in shown])
        return
    columns = ["hour", "expected", "present", "analysed", "waiting", "failed", "missing", "coverage", ""]
    print_table(f"{camera} at {location}, in minutes", columns, [_coverage_row(row) for row in shown])
    count = sum(row.is_hole for row in rows)
    note(
        f"{count} of {len(rows)} hours lack something"
        + ("; maskwatch backfill --gaps does what can be done" * bool(count))
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


def print_compliance(rows: Sequence[ComplianceRow], by: str, *, to_stderr: bool = False) -> None:
    """The table for people; to standard error where standard output is kept for machines."""
    from common.reporting.tables import as_text

    click.echo(as_text(rows, Period(by)), err=to_stderr)


def parse_bounds(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """Both bounds, naive (each location's own clock) or aware. Raises `MaskwatchError`."""

    def parse(name: str, value: str | None) -> datetime | None:
        try:
            return None if value is None else datetime.fromisoformat(value)
        except ValueError as error:
            raise MaskwatchError(
                f"--{name} {value!r} is no time; expected e.g. 2026-03-28 or 2026-03-28T08:00+01:00"
            ) from error

    return parse("since", since), parse("until", until)


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("report.html"), show_default=True,
    help="Where to write it.",
)  # fmt: skip
@click.option(
    "--picture", "pictures", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
    help="An example picture to put in (from `maskwatch annotate`); may be repeated.",
)  # fmt: skip
def report(out: Path, pictures: tuple[Path, ...]) -> None:
    """Write a report of all locations: one HTML file that loads nothing from anywhere.

    \b
    Examples:
      maskwatch report --out report.html
      maskwatch report --picture annotated/09-15-00.jpg --picture annotated/09-40-00.jpg
    """
    from common.database import session_scope
    from common.deployment import deployment
    from common.reporting.report import write_report

    with deployment(), session_scope() as session:
        write_report(session, out, pictures=pictures)
    note(f"wrote {out}")
