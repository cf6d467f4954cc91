"""Turns compliance rows into text for people and values for machines: the same columns everywhere."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.reporting.queries import ComplianceRow, Figures, Period

#: Shown where there is no figure.
NONE = "–"

COLUMNS = ("frames", "faces", "with mask", "without", "uncertain", "rate", "interval")


def interval(figures: Figures) -> str:
    """The rate's interval as `64–78 %`."""
    if figures.rate_low is None or figures.rate_high is None:
        return NONE
    return f"{figures.rate_low * 100:.0f}–{figures.rate_high * 100:.0f} %"


def period_name(row: ComplianceRow, by: Period) -> str:
    """A row's period on the location's clock; with the offset from UTC if the clock shows the hour twice."""
    if by is Period.HOUR:
        twice = row.start.replace(fold=0).utcoffset() != row.start.replace(fold=1).utcoffset()
        return f"{row.start:%Y-%m-%d %H:%M}" + (row.start.isoformat()[-6:] if twice else "")
    if by is Period.DAY:
        return f"{row.start:%Y-%m-%d %a}"
    year, week, _ = row.start.isocalendar()
    return f"{year}-W{week:02} ({row.start:%d %b})"


def cells(figures: Figures) -> tuple[str, ...]:
    """One row of `COLUMNS`."""
    counts = (figures.frames, figures.faces, figures.with_mask, figures.without_mask, figures.uncertain)
    return (*(f"{count:,}" for count in counts), percent(figures.rate), interval(figures))


def by_location(rows: Sequence[ComplianceRow], by: Period) -> dict[str, list[tuple[str, ...]]]:
    """The rows of each location as text, below its name and time zone: the period, then `COLUMNS`."""
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        block = blocks.setdefault(f"{row.location} ({row.start.tzinfo})", [])
        block.append((period_name(row, by), *cells(row.figures)))
    return blocks


def as_dict(row: ComplianceRow) -> dict[str, Any]:
    """A row for JSON and CSV: rates in [0, 1], `start` aware and local."""
    return {"location": row.location, "start": row.start, **asdict(row.figures)}


def as_csv(rows: Sequence[ComplianceRow]) -> str:
    """Comma-separated values with a header, `\\n` between lines; an empty field if there is no rate."""
    buffer = io.StringIO()
    names = ("location", "start", *Figures.__slots__)
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**as_dict(row), "start": row.start.isoformat()})
    return buffer.getvalue()


def percent(value: float | None) -> str:
    """A share in [0, 1] for people, as `71.4 %`; a dash if there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"
