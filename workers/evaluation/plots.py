"""Plots of a model's figures, as PNG: learning curves, confusion, reliability, precision against recall, and faces.

Draws figures that other modules computed. Doesn't use pyplot, whose open figures are shared by the whole process.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from workers.datasets.annotations import CLASS_NAMES
from workers.evaluation.calibration import ReliabilityBin, calibration_error

#: ColorBrewer's Dark2, which colour-blind readers can tell apart; the first two are those of the report.
COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")
GREEN, ORANGE, GREY = COLOURS[0], COLOURS[1], "#8a8f98"
#: If there are more lines than colours, the next ones are dashed.
LINES = ("-", "--")
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
DOTS_PER_INCH = 130

#: Faces across a grid, and the side of each in inches.
GRID_COLUMNS = 8
GRID_CELL = 1.35


def curves(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """The curves of a training over its epochs: losses on the left, accuracies on the right.

    history: one mapping per epoch with `epoch`; keys with `loss` or `accuracy` in their names are drawn.
    """
    names = [name for name in (history[0] if history else ()) if name != "epoch"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for number, name in enumerate(name for name in names if kind in name):
                epochs = [row["epoch"] for row in history if name in row]
                values = [row[name] for row in history if name in row]
                axes.plot(epochs, values, color=_colour(number), marker="o", markersize=2.5, label=_words(name))
            axes.set_title(kind)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _light_grid(axes)
            if axes.lines:
                axes.legend()
        _write(figure, path)


def confusion(path: Path, matrix: Sequence[Sequence[int]], title: str = "", names: Sequence[str] = CLASS_NAMES) -> None:
    """A confusion matrix; rows are the true classes. Each cell shows its count and its share of the row."""
    counts = np.array(matrix)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
        for row, column in np.ndindex(*counts.shape):
            words = f"{counts[row, column]:,}\n{100 * shares[row, column]:.1f} %"
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, words, ha="center", va="center", color=colour)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names, rotation=90, va="center")
        axes.set_xlabel("said")
        axes.set_ylabel("is")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _title(axes, title)
        _write(figure, path)


def reliability(path: Path, bins: Sequence[ReliabilityBin], title: str = "") -> None:
    """How often a classifier is right when it is how sure, above; how often it is that sure, below.

    Bars on the diagonal are calibrated; below it the classifier is surer than it is right.
    """
    filled = [entry for entry in bins if entry.accuracy is not None and entry.confidence is not None]
    error = calibration_error(bins)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 5.0), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
        lows, widths = [entry.low for entry in filled], [entry.high - entry.low for entry in filled]
        accuracies = [entry.accuracy or 0.0 for entry in filled]
        above.bar(lows, accuracies, widths, align="edge", color=GREEN, edgecolor="white", label="right")
        above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="as sure as right")
        above.plot(
            [entry.confidence for entry in filled], accuracies,
            linestyle="", marker="o", markersize=4, color=ORANGE, label="mean confidence of the bin",
        )  # fmt: skip
        above.set_ylim(0, 1.03)
        above.set_ylabel("share that is right")
        above.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none")
        below.bar(lows, [entry.count for entry in filled], widths, align="edge", color=GREY, edgecolor="white")
        below.set_xlim(min([0.5, *lows]), 1)
        below.set_xlabel("confidence")
        below.set_ylabel("faces")
        below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axes in (above, below):
            _light_grid(axes)
        words = "no face" if error is None else f"calibration error {error:.3f}"
        _title(above, f"{title}: {words}" if title else words)
        _write(figure, path)


def precision_recall(
    path: Path,
    drawn: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    chosen: Mapping[str, tuple[float, float]],
    title: str = "",
) -> None:
    """Precision against recall, one line per name: (recalls, precisions) in the order of falling score.

    chosen: (recall, precision) at the threshold that is used, drawn as a dot.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.subplots()
        for number, (name, (recalls, precisions)) in enumerate(drawn.items()):
            line = LINES[number // len(COLOURS) % len(LINES)]
            axes.plot(recalls, precisions, color=_colour(number), linestyle=line, linewidth=1.4, label=name)
            if name in chosen:
                axes.plot(*chosen[name], marker="o", markersize=5, color=_colour(number))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        _light_grid(axes)
        if drawn:
            axes.legend(loc="lower left")
        _title(axes, title)
        _write(figure, path)


def grid(path: Path, crops: Sequence[NDArray[np.uint8]], titles: Sequence[str], title: str = "") -> None:
    """Faces side by side, RGB uint8 of any size, each under its own words. At least one."""
    if not crops:
        raise ValueError("a grid needs at least one face")
    columns = min(GRID_COLUMNS, len(crops))
    rows = -(-len(crops) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(columns * GRID_CELL, rows * (GRID_CELL + 0.42) + 0.3), layout="constrained")
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in cells:
            axes.set_axis_off()
        for axes, (crop, words) in zip(cells, zip(crops, titles, strict=True), strict=False):
            # Without interpolation, so that a face of twelve pixels shows its twelve pixels.
            axes.imshow(crop, interpolation="nearest")
            # Titles contain file names, in which a $ must not begin a formula.
            axes.set_title("\n".join(textwrap.wrap(words, 21)), fontsize=6.5, parse_math=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", parse_math=False)
        _write(figure, path)


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, parse_math=False)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _light_grid(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.5)


def _write(figure: Figure, path: Path) -> None:
    """Write the whole PNG at once. The same figures give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    path.write_bytes(buffer.getvalue())
