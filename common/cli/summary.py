"""`maskwatch summary`: compliance per location."""

from __future__ import annotations

from collections.abc import Sequence

import click

from common.cli.parts.console import json_option, note, print_blocks, print_json
from common.cli.parts.deployment import deployment
from common.cli.parts.options import parse_bounds
from common.database.sessions import session_scope
from common.domain import MaskwatchError
from common.reporting import tables
from common.reporting.queries import ComplianceRow, Period, compliance, hours_to_summarize


@click.command()
@click.option("--location", metavar="NAME", help="Only this location (default: all).")
@click.option(
    "--by", type=click.Choice([period.value for period in Period]), default=Period.DAY.value, show_default=True,
    help="The period of a row; weeks begin on Monday.",
)  # fmt: skip
@click.option("--since", metavar="TIME", help="Only hours from this time on (ISO 8601; the location's own clock).")
@click.option("--until", metavar="TIME", help="Only hours before this time (ISO 8601; the location's own clock).")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
def summary(location: str | None, by: str, since: str | None, until: str | None, as_json: bool, as_csv: bool) -> None:
    """Print compliance per location by hour, day or week.

    The rate is with mask / (with mask + without mask), with its 95 % interval; uncertain faces count in neither
    term. Hours, days and weeks are in the location's time zone.

    \b
    Examples:
      maskwatch summary
      maskwatch summary --location lobby --by hour --since 2026-03-28 --until 2026-03-29
      maskwatch summary --by week --csv > weeks.csv
    """
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
        note("no figures" + (" in this range" if since or until else " yet") + "; to see the jobs: maskwatch status")
        note("to analyse pictures: maskwatch run photos/ --location lobby")
    if lagging:
        note(f"{lagging} hours have newer results that these figures lack; to add them now: maskwatch summarize")


def print_compliance(rows: Sequence[ComplianceRow], by: str) -> None:
    """Print compliance as a table for people."""
    period = Period(by)
    print_blocks((period.value, *tables.COLUMNS), tables.by_location(rows, period))
