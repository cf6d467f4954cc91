"""`maskwatch cameras`: cameras, and when a producer polls them for new footage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import click
from sqlalchemy.orm import Session

from common.catalog import corrections, places
from common.cli.corrections import dry_run_option, tell_correction
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.options import renamed_option
from common.cli.parts.sessions import Say, with_session
from common.database.tables import Camera
from common.domain import MaskwatchError
from common.ledger import audit
from common.settings import get_settings


@click.group()
def cameras() -> None:
    """Cameras of the locations, and when they are polled for new footage."""


def _camera_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `cameras add` and `cameras change` share."""
    for option in reversed(
        [
            click.option(
                "--source", metavar="SOURCE", help="Where its footage arrives: s3://bucket/prefix/, or a folder."
            ),
            click.option(
                "--time-pattern", metavar="PATTERN", help="How its keys tell the time; see `backfill --help`."
            ),
            click.option("--every", metavar="TIME", help="How often to look for new footage: 30s, 5m, 2h, 1d."),
            click.option(
                "--cron",
                metavar="EXPRESSION",
                help="When to look for new footage, in cron syntax, on the location's clock.",
            ),
            click.option(
                "--look-back", metavar="TIME", help="How late footage may arrive for a poll to find it (default: 2h)."
            ),
            click.option(
                "--full-scan", metavar="TIME", help="How often to list everything, to find later footage (default: 1d)."
            ),
            click.option("--picture-every", metavar="TIME", help="How much time each of its pictures covers, e.g. 5m."),
            click.option("--expects", metavar="TIME", help="How much footage it should deliver per hour, e.g. 20m."),
        ]
    ):
        command = option(command)
    return renamed_option("--sweep", "--full-scan")(command)


@cameras.command("add")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@_camera_options
@with_session
def add_camera(session: Session, /, name: str, location: str, **options: str | None) -> Say:
    """Register a camera of a location. With --source, and --every or --cron, a producer polls it for new footage.

    Where the keys sort by time (--time-pattern), a poll lists only what can be new; once per --full-scan it
    lists everything.

    \b
    Examples:
      maskwatch cameras add door --location lobby
      maskwatch cameras add gate --location lobby --source s3://footage/gate/ --every 5m \\
          --time-pattern 'gate/%Y/%m/%d/%H-%M-%S.mp4' --expects 1h
    """
    camera = places.add_camera(session, places.get_location(session, location), name)
    if any(value is not None for value in options.values()):
        places.configure_camera(session, camera, get_settings(), options)
    return lambda: note(f"camera {name} of {location} is registered{_polled(camera)}")


def _polled(camera: Camera) -> str:
    if camera.source is None or camera.scheduled_since is None:
        return ""
    how = f"every {camera.every_seconds:g} s" if camera.every_seconds else f"at {camera.cron!r}"
    return f"; {camera.source} is polled {how}"


@cameras.command("change")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@_camera_options
def change_camera(name: str, location: str, **options: str | None) -> None:
    """Change where and when a camera is polled for footage, or how much it should deliver. What was found stays.

    \b
    Example:
      maskwatch cameras change gate --location lobby --every 1m
    """
    if all(value is None for value in options.values()):
        raise MaskwatchError("nothing to change was given; the options are shown by: maskwatch cameras change --help")
    _change(name, location, options)


@with_session
def _change(session: Session, name: str, location: str, options: Mapping[str, str | None]) -> Say:
    camera = places.get_camera(session, places.get_location(session, location), name)
    places.configure_camera(session, camera, get_settings(), options)
    changed = ", ".join(sorted(name for name, value in options.items() if value is not None))
    audit.record(session, "change camera", audit.operator(), detail=f"{location}/{name}: {changed}")
    return lambda: note(f"camera {name} of {location} is changed{_polled(camera)}")


@cameras.command("correct")
@click.argument("name")
@click.option("--location", required=True, help="The location that the camera is registered at.")
@click.option("--to-location", metavar="NAME", help="The right location, where it has hung all along.")
@click.option("--time-zone", metavar="ZONE", help="The right time zone of its location; corrects all its cameras.")
@click.option("--time-pattern", metavar="PATTERN", help="The right pattern to read times from its keys.")
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
    """Correct a camera that was registered wrongly: its objects move to the right location or times, with faces and
    summaries, in one recorded step. (If the place or pattern changes only from now on, add another camera.)

    The time zone belongs to the location, so all cameras of it are corrected. Chunks of videos whose hours would be
    split are analysed again. Nothing can be registered meanwhile. Where the database has roles, run this as the owner
    of the tables.

    \b
    Examples:
      maskwatch cameras correct gate --location lobby --to-location yard
      maskwatch cameras correct gate --location lobby --time-zone Europe/Berlin --dry-run
      maskwatch cameras correct gate --location lobby --time-pattern 'gate/%Y-%d-%m/%H%M%S.jpg'
    """
    if time_zone is not None and (to_location is not None or time_pattern is not None):
        raise click.UsageError(
            "--time-zone goes without --to-location and --time-pattern: it changes all cameras there"
        )
    if to_location is None and time_zone is None and time_pattern is None:
        raise click.UsageError("give the right value: --to-location, --time-zone or --time-pattern")
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
    """Stop polling a camera, for now. What was found stays, and is analysed.

    \b
    Example:
      maskwatch cameras disable gate --location lobby
    """
    _switch_camera(session, name, location, "disable")
    return lambda: note(
        f"camera {name} of {location} is disabled; to poll it again: maskwatch cameras enable {name} "
        f"--location {location}"
    )


@cameras.command("enable")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@with_session
def enable_camera(session: Session, name: str, location: str) -> Say:
    """Poll a camera again; footage that arrived meanwhile is found.

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
    """Retire a camera: it is no longer polled, and no footage is expected. Its footage, faces and figures stay.

    \b
    Example:
      maskwatch cameras remove gate --location lobby
    """
    _switch_camera(session, name, location, "remove")
    return lambda: note(f"camera {name} of {location} is removed; its footage, faces and figures stay")


@cameras.command("list")
@json_option
@with_session
def list_cameras(session: Session, as_json: bool) -> Say:
    """List the cameras: location, source, schedule, last poll, and the problem if it failed.

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
