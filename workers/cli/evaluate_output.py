"""What the commands of `maskwatch evaluate` share: choosing the pipeline, writing files, printing tables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli.parts import console
from common.cli.parts.console import print_line
from common.domain import MaskwatchError, PipelineSpec
from common.models.pipeline import spec_of
from common.reporting.tables import percent
from common.settings import Settings
from workers.evaluation import plots
from workers.evaluation.faces import Mistake


def chosen_spec(settings: Settings, detector: str | None, classifier: str | None) -> PipelineSpec:
    """The configured pipeline, with other models if they are named; another detector brings its own threshold."""
    changed: dict[str, Any] = {}
    if detector is not None:
        changed |= {"detector": detector, "detector_threshold": None}
    if classifier is not None:
        changed["classifier"] = classifier
    return spec_of(settings.pipeline.model_copy(update=changed), settings.models_dir)


def prepare_folder(out: Path | None) -> None:
    """Makes the folder before any work is done, so that a missing right to write is not found only at the end."""
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"{out} can't be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise MaskwatchError(f"{out} can't be written to")


def write_metrics(out: Path, values: dict[str, Any]) -> None:
    """Write metrics.json. Call it after the plots: a folder with metrics.json is complete."""
    (out / "metrics.json").write_text(console.as_json(values) + "\n", encoding="utf-8")
    console.note(f"metrics.json and plots are in {out}")


def draw_grids(out: Path, grids: dict[str, tuple[str, Sequence[Mistake]]]) -> None:
    """Write an image for every kind of mistake that occurred, and remove those of an earlier run."""
    for name, (title, mistakes) in grids.items():
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)
        if mistakes:
            plots.grid(path, [entry.crop for entry in mistakes], [entry.words for entry in mistakes], title)


def print_calibration(title: str, values: dict[str, Any]) -> None:
    """Print the calibration, and the share of uncertain faces by threshold."""
    calibration = values["calibration"]
    print_line(
        f"{title}: calibration error {decimals(calibration['expected_calibration_error'])}, "
        f"Brier score {decimals(calibration['brier_score'])}, "
        f"log loss {decimals(calibration['negative_log_likelihood'])}"
    )
    console.print_table(
        "",
        ("confidence", "faces", "mean", "right", "too sure by"),
        [
            (
                f"{row['low']:.2f}–{row['high']:.2f}", row["count"], decimals(row["confidence"]),
                decimals(row["accuracy"]), f"{row['gap']:+.3f}",
            )
            for row in calibration["bins"]
        ],
    )  # fmt: skip
    console.print_table(
        "Uncertain faces, by the probability below which a face is uncertain",
        ("uncertain below", "uncertain", "the rest right", "balanced accuracy of the rest"),
        [
            (
                f"{row['below']:g}{' (configured)' if row['configured'] else ''}", percent(row["uncertain_share"]),
                percent(row["accuracy"]), percent(row["balanced_accuracy"]),
            )
            for row in values["uncertain"]
        ],
    )  # fmt: skip


def decimals(value: float | None) -> str:
    """Three decimals; a dash for None."""
    return "–" if value is None else f"{value:.3f}"
