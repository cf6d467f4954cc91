"""`maskwatch cameras`: cameras, and when a producer looks for their footage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import click
from sqlalchemy.orm import Session

from common.catalog import corrections, places
from common.cli.corrections import dry_run_option, tell_correction
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.sessions import Say, with_session
from common.database.tables import Camera
from common.domain import MaskwatchError
from common.ledger import audit
from common.settings import get_settings


@click.group()
def cameras() -> None:
    """Cameras of the locations, and when their footage is looked for."""


def _camera_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `cameras add` and `cameras change` can say of a camera."""
    for option in reversed(
        [
            click.option(
                "--source", metavar="SOURCE", help="Where its footage arrives: s3://bucket/prefix/, or a folder."
            ),
            click.option("--time-pattern", metavar="PATTERN", help="As of `maskwatch backfill`."),
            click.option("--every", metavar="TIME", help="Look for new footage so often: 30s, 5m, 2h, 1d."),
            click.option("--cron", metavar="EXPRESSION", help="Look when it says, on the location's clock."),
            click.option("--look-back", metavar="TIME", help="How late footage may come and be found at once (2h)."),
            click.option("--sweep", metavar="TIME", help="List everything so often, for what came later still (1d)."),
            click.option("--picture-every", metavar="TIME", help="Its pictures stand for so long each, in coverage."),
            click.option("--expects", metavar="TIME", help="Footage that it should deliver per hour, e.g. 1h or 20m."),
        ]
    ):
        command = option(command)
    return command


@cameras.command("add")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@_camera_options
@with_session
def add_camera(session: Session, /, name: str, location: str, **options: str | None) -> Say:
    """Register a camera of a location. With a source and --every or --cron a producer looks for its footage.

    Where the keys sort by time (--time-pattern), only what can be new is listed, and everything once per --sweep.

    \b
    Examples:
      maskwatch cameras add door --location lobby
      maskwatch cameras add gate --location lobby --source s3://footage/gate/ --every 5m \\
          --time-pattern 'gate/%Y/%m/%d/%H-%M-%S.mp4' --expects 1h
    """
    camera = places.add_camera(session, places.get_location(session, location), name)
    if any(value is not None for value in options.values()):
        places.configure_camera(session, camera, get_settings(), options)
    return lambda: note(f"camera {name} of {location} is registered{_looked_at(camera)}")


def _looked_at(camera: Camera) -> str:
    if camera.source is None or camera.scheduled_since is None:
        return ""
    how = f"every {camera.every_seconds:g} s" if camera.every_seconds else f"at {camera.cron!r}"
    return f"; {camera.source} is looked at {how}"


@cameras.command("change")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@_camera_options
def change_camera(name: str, location: str, **options: str | None) -> None:
    """Change where and when a camera's footage is looked for, or what it should deliver. What was found stays.

    \b
    Example:
      maskwatch cameras change gate --location lobby --every 1m
    """
    if all(value is None for value in options.values()):
        raise MaskwatchError("say what to change: maskwatch cameras change --help")
    _change(name, location, options)


@with_session
def _change(session: Session, name: str, location: str, options: Mapping[str, str | None]) -> Say:
    camera = places.get_camera(session, places.get_location(session, location), name)
    places.configure_camera(session, camera, get_settings(), options)
    changed = ", ".join(sorted(name for name, value in options.items() if value is not None))
    audit.record(session, "change camera", audit.operator(), detail=f"{location}/{name}: {changed}")
    return lambda: note(f"camera {name} of {location} is changed{_looked_at(camera)}")


@cameras.command("correct")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera was said to hang.")
@click.option("--to-location", metavar="NAME", help="Where it has hung all along.")
@click.option("--time-zone", metavar="ZONE", help="The zone of its location, with all that was seen there.")
@click.option("--time-pattern", metavar="PATTERN", help="How its keys are to be read.")
@dry_run_option
@json_option
def correct_camera(
    name: str,
    location: str,
    to_location: str | None,
    time_zone: str | None,
    time_pattern: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put right what was said wrongly of a camera, after the fact: what it has seen moves to the other place or times,
    with faces and summaries, in one recorded step. (For a new place or pattern from now on, add another camera.)

    A time zone is its location's: all of its cameras move. Chunks of videos whose hours would be torn are analysed
    again. Nothing can be registered meanwhile. On a deployment with roles, the owner of the tables does this.

    \b
    Examples:
      maskwatch cameras correct gate --location lobby --to-location yard
      maskwatch cameras correct gate --location lobby --time-zone Europe/Berlin --dry-run
      maskwatch cameras correct gate --location lobby --time-pattern 'gate/%Y-%d-%m/%H%M%S.jpg'
    """
    if time_zone is not None and (to_location is not None or time_pattern is not None):
        raise click.UsageError("correct the time zone by itself: it is the location's, and not only this camera's")
    if to_location is None and time_zone is None and time_pattern is None:
        raise click.UsageError("say what was wrong: --to-location, --time-zone or --time-pattern")
    _correct(name, location, to_location, time_zone, time_pattern, dry_run=dry_run, as_json=as_json)


@with_session
def _correct(
    session: Session,
    name: str,
    location: str,
    to_location: str | None,
    time_zone: str | None,
    time_pattern: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> Say:
    place = places.get_location(session, location)
    camera = places.get_camera(session, place, name)
    if time_zone is not None:
        done = corrections.correct_zone(session, place, time_zone, by=audit.operator())
    else:
        to = places.get_location(session, to_location) if to_location is not None else None
        done = corrections.correct_camera(session, camera, to=to, time_pattern=time_pattern, by=audit.operator())
    if dry_run:
        session.rollback()
    return lambda: tell_correction(done, dry_run=dry_run, as_json=as_json, to_location=to_location)


def _switch_camera(session: Session, name: str, location: str, action: str) -> None:
    camera = places.get_camera(session, places.get_location(session, location), name)
    places.switch_camera(session, camera, action)
    audit.record(session, f"{action} camera", audit.operator(), detail=f"{location}/{name}")


@cameras.command("disable")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@with_session
def disable_camera(session: Session, name: str, location: str) -> Say:
    """Look for no more footage of a camera, for now. What was found stays, and is analysed.

    \b
    Example:
      maskwatch cameras disable gate --location lobby
    """
    _switch_camera(session, name, location, "disable")
    return lambda: note(
        f"camera {name} of {location} is disabled; again: maskwatch cameras enable {name} --location {location}"
    )


@cameras.command("enable")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@with_session
def enable_camera(session: Session, name: str, location: str) -> Say:
    """Look for footage of a camera again; what came meanwhile is found.

    \b
    Example:
      maskwatch cameras enable gate --location lobby
    """
    _switch_camera(session, name, location, "enable")
    return lambda: note(f"camera {name} of {location} is enabled")


@cameras.command("remove")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hung.")
@with_session
def remove_camera(session: Session, name: str, location: str) -> Say:
    """Retire a camera: no more is looked for or expected of it. Its footage, faces and figures stay.

    \b
    Example:
      maskwatch cameras remove gate --location lobby
    """
    _switch_camera(session, name, location, "remove")
    return lambda: note(f"camera {name} of {location} is removed; what it has seen stays")


@cameras.command("list")
@json_option
@with_session
def list_cameras(session: Session, as_json: bool) -> Say:
    """List the cameras: where they hang, when they are looked at, when they were last, and what went wrong.

    \b
    Example:
      maskwatch cameras list
    """
    rows = places.list_cameras(session)
    if as_json:
        return lambda: print_json(rows)
    columns = ["name", "location", "state", "source", "schedule", "last_look", "problem"]
    table = [[row[column] for column in columns] for row in rows]
    return lambda: print_table("Cameras", ["camera", *columns[1:]], table)
