"""Turns compliance rows into words for people and values for machines: the same columns everywhere."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.console import percent
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
    """When a row's period was, on the location's clock; with its offset where the clock shows the hour twice."""
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


def compliance_table(rows: Sequence[ComplianceRow], by: Period) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names and rows of text, for `console.print_table` or any other table."""
    columns = ("location", by.value, *COLUMNS)
    return columns, [(row.location, period_name(row, by), *cells(row.figures)) for row in rows]


def as_text(rows: Sequence[ComplianceRow], by: Period) -> str:
    """The same table as plain text: a block per location, numbers to the right, within 80 columns, nothing cut off."""
    columns, table = compliance_table(rows, by)
    widths = [max(len(line[index]) for line in (columns, *table)) for index in range(len(columns))]
    blocks: dict[str, list[str]] = {}
    for row, line in zip(rows, table, strict=True):
        heading = f"{row.location} ({row.start.tzinfo})"
        block = blocks.setdefault(heading, [heading, _aligned(columns, widths)])
        block.append(_aligned(line, widths))
    return "\n\n".join("\n".join(block) for block in blocks.values())


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))
    return "  ".join(("", line[1].ljust(widths[1]), *numbers))


def as_dict(row: ComplianceRow) -> dict[str, Any]:
    """A row for JSON and CSV: rates in [0, 1], `start` aware and local."""
    return {"location": row.location, "start": row.start, **asdict(row.figures)}


def as_csv(rows: Sequence[ComplianceRow]) -> str:
    """Comma-separated values with a header, `\\n` between lines; no rate is an empty field."""
    buffer = io.StringIO()
    names = ("location", "start", *Figures.__slots__)
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**as_dict(row), "start": row.start.isoformat()})
    return buffer.getvalue()
