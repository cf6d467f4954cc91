"""`maskwatch evaluate scenes`: the whole pipeline on labelled scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.cli.parts import console
from common.cli.parts.console import print_line
from common.domain import PipelineSpec
from common.reporting.tables import percent
from common.settings import get_settings
from workers.analysis.load import load_analyzer
from workers.cli.evaluate_output import (
    chosen_spec,
    decimals,
    draw_grids,
    prepare_folder,
    print_calibration,
    write_metrics,
)
from workers.evaluation import plots
from workers.evaluation.calibration import reliability_bins
from workers.evaluation.faces import JUDGED_FROM_PX, confusion_rows
from workers.evaluation.scenes import SceneResults, evaluate_scenes
from workers.inference import runtime_of


def run(folder: Path, detector: str | None, classifier: str | None, out: Path | None, *, as_json: bool) -> None:
    """Evaluate, draw and print."""
    prepare_folder(out)
    settings = get_settings()
    spec = chosen_spec(settings, detector, classifier)
    analyzer = load_analyzer(spec, runtime_of(settings, processes=1))
    with console.bar("pictures") as bar:
        results = evaluate_scenes(
            folder, analyzer.analyze, settings.worker.max_image_pixels,
            on_image=bar.show,
        )  # fmt: skip
    console.note_unreadable(results.unreadable)
    summary = {"folder": str(folder), "pipeline": spec.as_dict(), **results.summary(spec.uncertain_below)}
    if out is not None:
        _draw_scenes(out, results, summary)
        write_metrics(out, summary)
    if as_json:
        console.print_json(summary)
    else:
        _print_scenes(folder, spec, summary)


def _draw_scenes(out: Path, results: SceneResults, summary: dict[str, Any]) -> None:
    faces_meant = f"found faces of {JUDGED_FROM_PX:.0f} px and more"
    plots.reliability(out / "reliability.png", reliability_bins(*results.judged()), faces_meant)
    plots.confusion(out / "confusion.png", summary["judged"]["confusion"], faces_meant)
    name = summary["pipeline"]["detector"]["name"]
    plots.precision_recall(
        out / "precision_recall.png", {name: results.detections.curve(summary["labelled_faces"])},
        {name: (summary["recall"], summary["precision"] or 0.0)}, "down to the pipeline's threshold",
    )  # fmt: skip
    draw_grids(
        out,
        {
            "mislabelled": ("Called the other class, the surest first", results.mislabelled),
            "missed": ("Labelled and not found, the largest first", results.missed),
            "unlabelled": ("Found and not labelled, the surest first", results.unlabelled),
        },
    )


def _print_scenes(folder: Path, spec: PipelineSpec, summary: dict[str, Any]) -> None:
    columns = (
        "size in px", "labelled", "found", "recall", "balanced accuracy", "calibration error", "uncertain",
        "without uncertain",
    )  # fmt: skip
    console.print_table(
        f"{summary['images']} pictures of {folder}: {spec.detector.name} at {spec.detector_threshold:g}, "
        f"{spec.classifier.name}",
        columns,
        [_size_row(name, row) for name, row in summary["sizes"].items()],
    )
    judged = summary["judged"]
    # Sentences stand above their tables: as titles they would be broken to the table's width.
    print_line(
        f"Found faces of {JUDGED_FROM_PX:.0f} px and more: balanced accuracy {percent(judged['balanced_accuracy'])}; "
        f"{percent(judged['uncertain_share'])} uncertain, else {percent(judged['certain_balanced_accuracy'])}"
    )
    console.print_table("", ("", "called with_mask", "called without_mask"), confusion_rows(judged))
    print_calibration("The same faces", summary)
    worn_wrongly = judged["worn_wrongly"]
    print_line(
        f"{summary['detections']} detections, precision {percent(summary['precision'])}, recall of all sizes "
        f"{percent(summary['recall'])}, average precision {percent(summary['average_precision'])} down to this "
        f"threshold; masks worn wrongly: {worn_wrongly['called_without_mask']} of {worn_wrongly['matched']} "
        "called without_mask"
    )


def _size_row(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        name, row["labelled"], row["matched"], percent(row["recall"]), percent(row["balanced_accuracy"]),
        decimals(row["expected_calibration_error"]), percent(row["uncertain_share"]),
        percent(row["certain_balanced_accuracy"]),
    )  # fmt: skip
