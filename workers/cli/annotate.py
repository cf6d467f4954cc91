"""`maskwatch annotate`: writes images and videos with their faces drawn. Defines and parses the command's options."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from common.cli.parts.console import json_option
from common.cli.parts.options import runtime_options
from workers.cli.annotate_request import Asked

#: Valid values of `faces.id`.
FACE_ID = click.IntRange(1, 2**63 - 1)


class _Time(click.ParamType[Fraction]):
    """A time in a video, exact: HH:MM:SS, MM:SS or seconds, each with decimals."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        if isinstance(value, Fraction):
            return value
        parts = re.fullmatch(r"(?:(?:(\d{1,4}):)?(\d{1,2}):)?(\d{1,7}(?:\.\d{1,9})?)", str(value), re.ASCII)
        if parts is None:
            self.fail(f"{value!r} is not a time in a video; expected 00:01:30.5, 01:30.5 or 90.5", param, ctx)
        hours, minutes, seconds = (Fraction(part or 0) for part in parts.groups())
        return 3600 * hours + 60 * minutes + seconds


@click.command()
@click.argument("source", required=False)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder for annotated pictures; NAME.mp4 for a video; NAME.png for one frame or face.",
)
@click.option("--at", type=_Time(), help="Write one frame of a video: the one shown at this time, e.g. 00:01:30.5.")
@click.option("--face", "face_id", type=FACE_ID, help="Write the picture or frame of a stored face, by its face_id.")
@click.option("--blur", is_flag=True, help="Make the found faces unrecognisable.")
@click.option(
    "--sample-fps",
    type=click.FloatRange(0, 240, min_open=True),
    help="How many frames per second of a video to analyse; boxes stay until the next one (default: all frames).",
)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many pictures.")
@runtime_options
@json_option
def annotate(as_json: bool, **options: Any) -> None:
    """Draw the faces of pictures or a video: green with mask, red without, amber uncertain.

    SOURCE is a picture, a video, a folder or an s3:// prefix; --out decides what is written, and nothing else is
    stored. A video is written as H.264, each frame at its own time, with its sound.

    With --face, the footage is looked up in the database, and its stored faces are drawn; nothing is analysed again.

    --blur hides only faces that the detector finds: check the result before you pass it on. Voices stay.

    \b
    Examples:
      maskwatch annotate s3://footage/2026/05/ --out annotated --limit 20     # pictures
      maskwatch annotate gate.mp4 --out gate-annotated.mp4                    # a video
      maskwatch annotate gate.mp4 --out gate-anonymous.mp4 --blur
      maskwatch annotate long.mp4 --out quick.mp4 --sample-fps 2              # fewer frames analysed
      maskwatch annotate gate.mp4 --at 00:01:30 --out at.png                  # one frame of it
      maskwatch annotate --face 4711 --out face.png                           # face_id, from face_results
    """
    asked = Asked(**options)
    # Imported here: --help needs neither models nor decoders, which take seconds to load and may not be installed.
    from workers.cli.annotate_outputs import write

    write(asked, as_json=as_json)
