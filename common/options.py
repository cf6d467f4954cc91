"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable

import click


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what a source's pictures are; shared by `backfill` and `run`."""
    for option in reversed(
        [
            click.argument("source"),
            click.option("--location", required=True, help="Where it was taken."),
            click.option("--camera", help="The camera that took it."),
            click.option(
                "--time-pattern",
                metavar="PATTERN",
                help="How keys tell when a picture was taken, in the location's time zone: text, strptime "
                "directives and * for any text, e.g. 'cam1/%Y/%m/%d/%H-%M-%S.jpg'. Without it: EXIF, "
                "then LastModified.",
            ),
            click.option(
                "--since",
                metavar="TIME",
                help="Only pictures from this time on (ISO 8601; local if it names no offset).",
            ),
            click.option("--until", metavar="TIME", help="Only pictures before this time (the same)."),
        ]
    ):
        command = option(command)
    return command
