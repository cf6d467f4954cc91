"""The commands that read: `maskwatch summary` and `maskwatch report`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import click

from common.console import json_option, note, print_json
from common.domain import MaskwatchError
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
