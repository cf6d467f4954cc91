"""Draws one location's compliance over time, as SVG that goes straight into the report's page.

The figures come from `queries`; this module knows nothing of the database.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import matplotlib as mpl
import matplotlib.dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from common.reporting.queries import ComplianceRow, Period

dates: Any = mpl.dates  # without types of its own
#: ColorBrewer's Dark2, which colour-blind readers can distinguish, too. The page uses the same colours.
WITH_MASK, WITHOUT_MASK, UNCERTAIN = "#1b9e77", "#d95f02", "#8a8f98"
#: A placeholder for the page's text colour, so that the plot fits a light and a dark page.
_TEXT = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "svg.hashsalt": "maskwatch",  # the same figures give the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}
#: Labels of ticks at years, months, days, hours, minutes and seconds; and at the first of each.
_TICKS = ["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%H:%M:%S"]
_DAY_TICKS = ["", "%Y", "%d %b", "%d %b", "%H:%M", "%H:%M"]
#: Longer times are drawn by day.
HOURLY_UP_TO = timedelta(days=14)
LENGTH = {Period.HOUR: timedelta(hours=1), Period.DAY: timedelta(days=1), Period.WEEK: timedelta(days=7)}


def plot_period(first: datetime, last: datetime) -> Period:
    """By hour for up to two weeks, else by day. Takes the first and the last hour (aware datetimes)."""
    return Period.HOUR if last - first <= HOURLY_UP_TO else Period.DAY


def compliance_svg(rows: Sequence[ComplianceRow], by: Period) -> str:
    """The rate with its 95 % interval above, counts of faces below, as an `<svg>` element.

    `rows` are one location's, at least one, in order of time; the axis is the location's own clock.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        rates, counts = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        _draw_rates(rates, rows, by)
        _draw_counts(counts, rows, by)
        locator = dates.AutoDateLocator(tz=rows[0].start.tzinfo, minticks=4, maxticks=12)
        counts.xaxis.set_major_locator(locator)
        counts.xaxis.set_major_formatter(
            dates.ConciseDateFormatter(
                locator, tz=rows[0].start.tzinfo, formats=_TICKS, zero_formats=_DAY_TICKS, show_offset=False
            )
        )
        counts.set_xlabel(f"{rows[0].start:%d %b %Y} – {rows[-1].start:%d %b %Y}, local time")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue())


def _draw_rates(axes: Axes, rows: Sequence[ComplianceRow], by: Period) -> None:
    decided = [row for row in rows if row.figures.rate is not None]
    width = LENGTH[by] / timedelta(days=1)
    starts = [dates.date2num(row.start) for row in decided]
    lows = [row.figures.rate_low or 0.0 for row in decided]
    highs = [row.figures.rate_high or 0.0 for row in decided]
    # A box per hour, tall if few faces were seen; no line, which would suggest figures for hours without footage.
    heights = [high - low for low, high in zip(lows, highs, strict=True)]
    axes.bar(starts, heights, width, bottom=lows, align="edge", color=WITH_MASK, alpha=0.25)
    values = [row.figures.rate or 0.0 for row in decided]
    axes.hlines(values, starts, [start + width for start in starts], color=WITH_MASK, linewidth=2.4)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("compliance rate")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)


def _draw_counts(axes: Axes, rows: Sequence[ComplianceRow], by: Period) -> None:
    width = LENGTH[by] / timedelta(days=1)
    starts = [dates.date2num(row.start) for row in rows]
    below = [0] * len(rows)
    for name, colour in (("with_mask", WITH_MASK), ("without_mask", WITHOUT_MASK), ("uncertain", UNCERTAIN)):
        counts = [getattr(row.figures, name) for row in rows]
        axes.bar(starts, counts, width * 0.94, bottom=below, align="edge", color=colour)
        below = [low + count for low, count in zip(below, counts, strict=True)]
    axes.set_ylabel("faces")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _for_page(svg: str) -> str:
    """The `<svg>` element alone, sized by the page and in its text colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    return svg.replace(_TEXT, "currentColor")
