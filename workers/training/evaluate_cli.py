"""`maskwatch evaluate`: wiring between the command line, labelled data and the figures.

Models are imported when a command runs, so that --help is quick and a missing layer is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from common import console
from common.console import percent
from common.domain import MaskwatchError


@click.group()
def evaluate() -> None:
    """Measure detection and classification on labelled data."""


@evaluate.command()
@click.argument("folder", type=click.Path(path_type=Path))
@console.json_option
def scenes(folder: Path, as_json: bool) -> None:
    """Run the whole pipeline on labelled scenes: recall per face size, precision, balanced accuracy.

    FOLDER holds images/ and annotations/ (Pascal VOC). Found means: overlapping a labelled box by half (IoU 0.5). The
    pipeline is the one the settings describe; sizes are the longer side of the labelled box.

    \b
    Example:
      maskwatch evaluate scenes test-scenes/ --json
    """
    from common.settings import get_settings
    from workers.inference import runtime_of
    from workers.pipeline import load_analyzer
    from workers.training.evaluate import evaluate_scenes

    settings = get_settings()
    spec = settings.pipeline.spec()
    analyzer = load_analyzer(spec, runtime_of(settings, processes=1))
    with console.progress() as bar:
        task = bar.add_task("pictures", total=None)
        results = evaluate_scenes(
            folder, analyzer.analyze, settings.worker.max_image_pixels,
            on_image=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    console.note_unreadable(results.unreadable)
    if results.images == 0:
        raise MaskwatchError(f"none of the {len(results.unreadable)} pictures in {folder} could be read")
    summary = results.summary()
    if as_json:
        console.print_json({"folder": str(folder), "pipeline": spec.as_dict(), **summary})
    else:
        _print_scenes(folder, summary)


@evaluate.command()
@click.argument("folder", type=click.Path(path_type=Path))
@console.json_option
def faces(folder: Path, as_json: bool) -> None:
    """Run the classifier alone on labelled faces: precision, recall, F1, balanced accuracy per face size.

    FOLDER holds class folders (with_mask/, without_mask/, perhaps mask_weared_incorrect/), or images/ and annotations/,
    whose faces are then cut by their labels.

    \b
    Example:
      maskwatch evaluate faces test-faces/ --json
    """
    from common.settings import get_settings
    from workers.classification.registry import load_classifier
    from workers.inference import runtime_of
    from workers.training import dataset
    from workers.training.evaluate import evaluate_faces

    settings = get_settings()
    spec = settings.pipeline.spec()
    read = dataset.load([folder])
    console.note_unreadable(read.unreadable)
    figures = evaluate_faces(read.samples, load_classifier(spec, runtime_of(settings, processes=1)).classify)
    report = figures.pop("report_text")
    if as_json:
        unreadable = [{"file": name, "reason": reason} for name, reason in read.unreadable]
        console.print_json({"folder": str(folder), "pipeline": spec.as_dict(), "unreadable": unreadable, **figures})
        return
    click.echo(report)
    console.print_table(
        f"Balanced accuracy {percent(figures['all']['balanced_accuracy'])}",
        ("size in px", "faces", "balanced accuracy"),
        [(name, row["faces"], percent(row["balanced_accuracy"])) for name, row in figures["sizes"].items()],
    )


def _print_scenes(folder: Path, summary: dict[str, Any]) -> None:
    from workers.training.evaluate import JUDGED_FROM_PX, confusion_rows

    columns = ("size in px", "labelled", "found", "recall", "balanced accuracy", "uncertain", "without uncertain")
    rows = [_size_row(name, row) for name, row in summary["sizes"].items()]
    judged = summary["judged"]
    console.print_table(f"{summary['images']} pictures of {folder}", columns, rows)
    console.print_table(
        f"Found faces of {JUDGED_FROM_PX:.0f} px and more: balanced accuracy {percent(judged['balanced_accuracy'])}; "
        f"{percent(judged['uncertain_share'])} uncertain, else {percent(judged['certain_balanced_accuracy'])}",
        ("", "called with_mask", "called without_mask"),
        confusion_rows(judged),
    )
    worn_wrongly = judged["worn_wrongly"]
    console.out.print(
        f"{summary['detections']} detections, precision {percent(summary['precision'])}, recall of all sizes "
        f"{percent(summary['recall'])}; masks worn wrongly: {worn_wrongly['called_without_mask']} of "
        f"{worn_wrongly['matched']} called without_mask",
        highlight=False,
    )


def _size_row(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        name, row["labelled"], row["matched"], percent(row["recall"]), percent(row["balanced_accuracy"]),
        percent(row["uncertain_share"]), percent(row["certain_balanced_accuracy"]),
    )  # fmt: skip
