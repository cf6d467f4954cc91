"""`maskwatch run`: from footage to a compliance table with one command, on this machine.

It starts the processes, runs `maskwatch backfill`, and stops the processes.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
from sqlalchemy import select

from common.catalog import places
from common.cli.parts.console import json_option, note, print_json
from common.cli.parts.deployment import deployment, uses_embedded_stack
from common.cli.parts.options import parse_bounds, runtime_options, source_options
from common.cli.processes import maskwatch, work_processes
from common.cli.summary import print_compliance
from common.database.sessions import session_scope
from common.database.tables import Location
from common.domain import MaskwatchError
from common.reporting import queries
from common.reporting.tables import as_dict
from common.settings import get_settings
from common.storage.opening import open_source
from common.timestamps import TimePattern
from workers.jobs.preflight import require_ready


@click.command()
@source_options(source_required=True)
@click.option("--time-zone", default="UTC", show_default=True, metavar="ZONE", help="IANA name, for a new location.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
@click.option(
    "--by", type=click.Choice(["hour", "day", "week"]), default="day", show_default=True,
    help="The period of a row of the table.",
)  # fmt: skip
@runtime_options
@json_option
def run(
    source: str,
    location: str,
    time_zone: str,
    camera: str | None,
    time_pattern: str | None,
    since: str | None,
    until: str | None,
    workers: int,
    by: str,
    as_json: bool,
) -> None:
    """Analyse the pictures and videos below SOURCE (a folder or s3://bucket/prefix), and print a compliance table.

    Adds the location and the camera if they are new. Starts a producer, an aggregator and workers, waits until
    everything is analysed and summarized, and stops them. Results stay in the database; running it again adds nothing.

    \b
    Example:
      maskwatch run footage/ --location lobby --time-zone Europe/Berlin
      maskwatch run videos/ --location street --sample-fps 2
    """
    # Checked before anything is written: wrong options leave no location behind, and without a working runtime the
    # command would wait for ever.
    require_ready(get_settings())
    parse_bounds(since, until)
    TimePattern(time_pattern or "%Y%m%d")
    state_dir = get_settings().state_dir if uses_embedded_stack(get_settings()) else None
    with deployment() as settings:
        open_source(source, settings)
        _register(location, time_zone, camera)
        options = {"--location": location, "--camera": camera, "--time-pattern": time_pattern}
        options |= {"--since": since, "--until": until}
        with work_processes(workers, state_dir=state_dir):
            report = _backfill(source, options)
        with session_scope() as session:
            rows = queries.compliance(session, location, by)
            failed = queries.quarantined(session, 1000, location)
    if as_json:
        result = {
            **report,
            "analysed": report["jobs"].get("succeeded", 0),
            "summary": [as_dict(row) for row in rows],
            "quarantined_objects": [asdict(entry) for entry in failed],
        }
        print_json(result)
    else:
        _print_run(report, rows, by, failed)


def _backfill(source: str, options: Mapping[str, str | None]) -> dict[str, Any]:
    """Run `maskwatch backfill --wait` on the source; returns its JSON report."""
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    # "--", because a source may begin with a dash.
    command = maskwatch("backfill", *given, "--wait", "--json", "--", source)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        # The backfill has printed why.
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _print_run(
    report: Mapping[str, Any],
    rows: Sequence[queries.ComplianceRow],
    by: str,
    failed: Sequence[queries.Quarantined],
) -> None:
    note(f"{report['listed']} objects: {report['new']} new, {report['known']} known already")
    if report["others"]:
        note(
            f"{report['others']} are neither pictures nor videos and were left out: {', '.join(report['others_named'])}"
        )
    print_compliance(rows, by)
    for entry in failed:
        note(f"quarantined: {entry.detail} ({entry.reason})")


def _register(location: str, time_zone: str, camera: str | None) -> None:
    with session_scope() as session:
        place = session.scalars(select(Location).where(Location.name == location)).one_or_none()
        if place is None:
            place = places.add_location(session, location, time_zone)
            note(f"added the location {location} in the time zone {time_zone}")
        elif time_zone not in ("UTC", place.time_zone):
            raise MaskwatchError(f"location {location!r} is already registered in the time zone {place.time_zone}")
        if camera is not None:
            places.add_camera(session, place, camera)
