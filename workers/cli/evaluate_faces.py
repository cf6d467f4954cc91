"""`maskwatch evaluate faces`: the classifier alone on labelled faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common.cli.parts import console
from common.cli.parts.console import print_line
from common.domain import PipelineSpec
from common.models.figures import Confusion
from common.models.figures import keep_confusion as store_confusion
from common.reporting.tables import percent
from common.settings import get_settings
from workers.classification.registry import load_classifier
from workers.cli.evaluate_output import chosen_spec, draw_grids, prepare_folder, print_calibration, write_metrics
from workers.datasets import dataset
from workers.evaluation import plots
from workers.evaluation.calibration import reliability_bins
from workers.evaluation.faces import FaceResults, confusion_rows, evaluate_faces
from workers.inference import limit_opencv_threads, runtime_of

#: The faces that were held out when the shipped classifiers were fitted.
HELD_OUT = Path(__file__).parents[1] / "classification" / "weights" / "held_out.txt"


def run(
    folder: Path,
    classifier: str | None,
    *,
    held_out: bool,
    only: Path | None,
    at_px: int | None,
    keep_confusion: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Evaluate, store the confusion matrix if asked for, draw and print."""
    prepare_folder(out)
    settings = get_settings()
    spec = chosen_spec(settings, None, classifier)
    runtime = runtime_of(settings, processes=1)
    limit_opencv_threads(runtime.threads)
    loaded = load_classifier(spec, runtime)
    read = dataset.load([folder])
    console.note_unreadable(read.unreadable)
    named = HELD_OUT if held_out else only
    if named is not None:
        read.samples = dataset.named_in(read.samples, named)
    with console.bar("faces", len(read.samples)) as bar:
        results = evaluate_faces(read.samples, loaded.classify, at_px, on_faces=bar.show)
    figures = results.summary(spec.uncertain_below)
    report = figures.pop("report_text")
    values = {
        "folder": str(folder),
        "held_out": held_out,
        "only": None if only is None else str(only),
        "at_px": at_px,
        "pipeline": spec.as_dict(),
        "unreadable": [{"file": name, "reason": reason} for name, reason in read.unreadable],
        **figures,
    }
    if keep_confusion is not None:
        data = f"{len(read.samples)} faces of {folder.name}{', held out' if held_out else ''}"
        store_confusion(keep_confusion, _confusion_to_keep(spec, values, data))
    if out is not None:
        _draw_faces(out, results, values)
        write_metrics(out, values)
    if as_json:
        console.print_json(values)
    else:
        click.echo(report)
        _print_faces(values)


def _confusion_to_keep(spec: PipelineSpec, values: dict[str, Any], data: str) -> Confusion:
    (configured,) = (row for row in values["uncertain"] if row["configured"])
    called = [
        (*decided, sum(every) - sum(decided))
        for decided, every in zip(configured["confusion"], values["all"]["confusion"], strict=True)
    ]
    return Confusion(
        classifier=spec.classifier.name, sha256=spec.classifier.sha256,
        with_mask=called[0], without_mask=called[1], uncertain_below=spec.uncertain_below, data=data,
    )  # fmt: skip


def _draw_faces(out: Path, results: FaceResults, values: dict[str, Any]) -> None:
    plots.reliability(out / "reliability.png", reliability_bins(results.probabilities, results.labels))
    plots.confusion(out / "confusion.png", values["all"]["confusion"])
    draw_grids(out, {"mislabelled": ("Called the other class, the surest first", results.mislabelled())})


def _print_faces(values: dict[str, Any]) -> None:
    seen = "" if values["at_px"] is None else f", larger ones seen at {values['at_px']} px"
    console.print_table(
        f"Balanced accuracy {percent(values['all']['balanced_accuracy'])}{seen}",
        ("size in px", "faces", "balanced accuracy"),
        [(name, row["faces"], percent(row["balanced_accuracy"])) for name, row in values["sizes"].items()],
    )
    console.print_table("", ("", "called with_mask", "called without_mask"), confusion_rows(values["all"]))
    print_calibration("All faces", values)
    worn_wrongly = values["worn_wrongly"]
    print_line(
        f"masks worn wrongly: {worn_wrongly['called_without_mask']} of {worn_wrongly['faces']} called without_mask"
    )
