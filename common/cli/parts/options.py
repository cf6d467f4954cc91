"""Options that several commands share."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from common.cli.parts.console import note
from common.domain import MaskwatchError, SampleMode
from common.settings import get_settings


def put_setting(setting: str, value: str) -> None:
    """Override a setting by an option's value, in the environment: child processes read their settings from it."""
    os.environ[setting] = value
    get_settings.cache_clear()


def renamed_option(earlier: str, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Accept an option under its earlier spelling, too, with a warning: for one version more, and without a line in the
    command's help. It stands above the option itself."""
    old, new = (spelling.removeprefix("--").replace("-", "_") for spelling in (earlier, name))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option(earlier, old, hidden=True)
        @functools.wraps(command)
        def run(*args: Any, **options: Any) -> Any:
            if (value := options.pop(old)) is not None:
                note(f"warning: {earlier} is now {name}; the next version does not know {earlier}")
                if options[new] is None:
                    options[new] = value
            return command(*args, **options)

        return run

    return decorate


def _put_sampling(_context: click.Context, parameter: click.Parameter, value: str | float | None) -> None:
    if value is not None:
        put_setting(f"MASKWATCH_PIPELINE__{(parameter.name or '').upper()}", str(value))


def source_options(*, source_required: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that describe a source's pictures and videos; shared by `backfill` and `run`."""
    options = list(
        reversed(
            [
                click.argument("source", required=source_required),
                click.option("--location", required=True, help="The location where the footage was taken."),
                click.option("--camera", help="The camera that took the footage."),
                click.option(
                    "--time-pattern",
                    metavar="PATTERN",
                    help="How keys tell when a picture was taken or a video began, in the location's time zone: text, "
                    "strptime directives and * for any text, e.g. 'cam1/%Y/%m/%d/%H-%M-%S.jpg'. "
                    "Without it: EXIF or a video's creation time, then LastModified.",
                ),
                click.option(
                    "--since",
                    metavar="TIME",
                    help="Only footage taken from this time on (ISO 8601; the location's clock if it has no offset).",
                ),
                click.option("--until", metavar="TIME", help="Only footage taken before this time (in the same form)."),
                click.option(
                    "--sample-fps",
                    type=click.FloatRange(0, 240, min_open=True),
                    expose_value=False,
                    callback=_put_sampling,
                    help="Frames analysed per second of a video (default: MASKWATCH_PIPELINE__SAMPLE_FPS, 1). Another "
                    "rate makes another pipeline, with figures of its own.",
                ),
                click.option(
                    "--sample",
                    type=click.Choice([mode.value for mode in SampleMode]),
                    expose_value=False,
                    callback=_put_sampling,
                    help="Which frame of each 1/fps seconds is analysed: the first one, or the first keyframe, if "
                    "there is one, several times cheaper to decode (default: MASKWATCH_PIPELINE__SAMPLE, frames).",
                ),
            ]
        )
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in options:
            command = option(command)
        return command

    return decorate


def parse_bounds(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """Both bounds, naive (each location's own clock) or aware. Raises `MaskwatchError`."""

    def parse(name: str, value: str | None) -> datetime | None:
        try:
            return None if value is None else datetime.fromisoformat(value)
        except ValueError as error:
            raise MaskwatchError(
                f"--{name} {value!r} is not a time; expected e.g. 2026-03-28 or 2026-03-28T08:00+01:00"
            ) from error

    return parse("since", since), parse("until", until)


def _put_device(_context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    if re.fullmatch(r"cpu|cuda(:[0-9]+)?", value) is None:
        raise click.BadParameter(f"{value!r} is not a device; valid: cpu, cuda, cuda:0, cuda:1, ...")
    put_setting("MASKWATCH_WORKER__DEVICE", value)


def _put_runtime(_context: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        put_setting("MASKWATCH_WORKER__RUNTIME", value)


def runtime_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what runs models, and where, for every command that runs some. They override the settings,
    so the command itself receives nothing."""
    device = click.option(
        "--device",
        metavar="DEVICE",
        expose_value=False,
        callback=_put_device,
        help="The device that models run on: cpu, cuda or cuda:N (default: MASKWATCH_WORKER__DEVICE, cpu).",
    )
    runtime = click.option(
        "--runtime",
        type=click.Choice(["onnx", "native"]),
        expose_value=False,
        callback=_put_runtime,
        help="What runs the models: ONNX Runtime, or torch and TensorFlow (default: MASKWATCH_WORKER__RUNTIME, onnx).",
    )
    return device(runtime(command))
