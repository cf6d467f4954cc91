"""`maskwatch summarize`: bring the summaries up to date."""

from __future__ import annotations

import click

from common.cli.parts.console import json_option, note, print_json
from common.cli.parts.deployment import deployment
from workers.summaries import aggregation


@click.command()
@json_option
def summarize(as_json: bool) -> None:
    """Bring the hourly summaries up to date now, without waiting for the schedule.

    \b
    Example:
      maskwatch summarize
    """
    with deployment():
        hours = aggregation.summarize()
    if as_json:
        print_json({"hours": hours})
    else:
        note(f"{hours} hour(s) summarized")
