"""Writes report.html: one file with everything a reader needs, which loads no other file.

The page is common/reporting/report.html.j2; names, keys and reasons are data and are escaped there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError
from sqlalchemy.orm import Session

from common import __version__
from common.domain import MaskwatchError, first_line
from common.files import write_atomically
from common.reporting import tables
from common.reporting.plots import compliance_svg, plot_period
from common.reporting.queries import (
    ComplianceRow,
    Coverage,
    LocationTotals,
    Period,
    Quarantined,
    compliance,
    coverage,
    hours_to_summarize,
    quarantined,
    totals,
)
from common.reporting.tables import percent

#: A page with more images than this is slow to open and to send.
MAX_IMAGES = 12
IMAGE_WIDTH_PX = 900
MAX_QUARANTINED = 200
#: Per location; `maskwatch summary` shows the rest.
MAX_DAYS = 62


@dataclass(frozen=True, slots=True)
class LocationSection:
    """The page's section about one location; `plot` is SVG, or None if nothing was analysed."""

    totals: LocationTotals
    coverage: Coverage | None
    plot: Markup | None
    plot_by: str
    days: list[ComplianceRow]
    days_left_out: int
    quarantined: list[Quarantined]


@dataclass(frozen=True, slots=True)
class ExampleImage:
    """An example image as a data URI."""

    name: str
    data_uri: str


def write_report(session: Session, path: Path, *, images: Sequence[Path] = ()) -> None:
    """Write the report of all locations to `path`, with at most 12 of `images` (annotated examples), evenly picked.

    The file is replaced whole or not at all. Raises `MaskwatchError` for a path that can't be written and
    for an image that can't be read.
    """
    step = max(1.0, len(images) / MAX_IMAGES)
    chosen = [images[int(index * step)] for index in range(min(len(images), MAX_IMAGES))]
    page = render(session, [_example(image) for image in chosen])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An image's file name may hold bytes that are no text.
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise MaskwatchError(f"can't write the report to {path}: {first_line(error)}") from error


def render(session: Session, images: Sequence[ExampleImage]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("common.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["interval"] = tables.interval
    return environment.get_template("report.html.j2").render(
        sections=_sections(session),
        images=images,
        hours_to_summarize=hours_to_summarize(session),
        max_quarantined=MAX_QUARANTINED,
        made_at=datetime.now(UTC),
        version=__version__,
    )


def _sections(session: Session) -> list[LocationSection]:
    covered = coverage(session)
    broken = quarantined(session, MAX_QUARANTINED)
    # Locations without figures come last: a reader looks for figures first.
    locations = sorted(totals(session), key=lambda location: location.first_hour is None)
    return [
        _section(session, place, covered.get(place.name), [job for job in broken if job.location == place.name])
        for place in locations
    ]


def _section(
    session: Session, location: LocationTotals, covered: Coverage | None, broken: list[Quarantined]
) -> LocationSection:
    if location.first_hour is None or location.last_hour is None:
        return LocationSection(location, covered, None, "", [], 0, broken)
    by = plot_period(location.first_hour, location.last_hour)
    # Safe as markup: our own code draws it from figures, without any name.
    plot = Markup(compliance_svg(compliance(session, location.name, by), by))
    days = compliance(session, location.name, Period.DAY)
    return LocationSection(location, covered, plot, by.value, days[-MAX_DAYS:], max(0, len(days) - MAX_DAYS), broken)


def _example(path: Path) -> ExampleImage:
    """An image scaled down to the page's width, as JPEG."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise MaskwatchError(f"can't read the picture {path} for the report: {error}") from error
    image.thumbnail((IMAGE_WIDTH_PX, IMAGE_WIDTH_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return ExampleImage(path.name, f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
