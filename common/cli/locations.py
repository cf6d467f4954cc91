"""`maskwatch locations`: locations, and their time zones."""

from __future__ import annotations

import click
from sqlalchemy.orm import Session

from common.catalog import corrections, places
from common.cli.corrections import dry_run_option, tell_correction
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.sessions import Say, with_session
from common.ledger import audit


@click.group()
def locations() -> None:
    """Locations that compliance is reported for."""


@locations.command("add")
@click.argument("name")
@click.option("--time-zone", required=True, metavar="ZONE", help="IANA name, e.g. Europe/Berlin.")
@with_session
def add_location(session: Session, name: str, time_zone: str) -> Say:
    """Register a location; its time zone decides when an hour and a day begin.

    \b
    Example:
      maskwatch locations add lobby --time-zone Europe/Berlin
    """
    places.add_location(session, name, time_zone)
    return lambda: note(f"location {name} is registered in the time zone {time_zone}")


@locations.command("correct")
@click.argument("name")
@click.option("--time-zone", required=True, metavar="ZONE", help="The right time zone, IANA name.")
@dry_run_option
@json_option
@with_session
def correct_location(session: Session, name: str, time_zone: str, dry_run: bool, as_json: bool) -> Say:
    """Correct a location's time zone that was registered wrongly: times that were read from keys and pictures move,
    with faces and summaries, in one recorded step. Chunks of videos whose hours would be split are analysed again.

    Nothing can be registered meanwhile. Where the database has roles, run this as the owner of the tables.

    \b
    Example:
      maskwatch locations correct lobby --time-zone Europe/Berlin --dry-run
    """
    place = places.get_location(session, name)
    done = corrections.correct_zone(session, place, time_zone, by=audit.operator())
    if dry_run:
        session.rollback()
    return lambda: tell_correction(done, dry_run=dry_run, as_json=as_json)


@locations.command("list")
@json_option
@with_session
def list_locations(session: Session, as_json: bool) -> Say:
    """List the locations.

    \b
    Example:
      maskwatch locations list
    """
    rows = places.list_locations(session)
    if as_json:
        return lambda: print_json(rows)
    return lambda: print_table("Locations", ["location", "time zone", "pipeline"], [list(row.values()) for row in rows])
