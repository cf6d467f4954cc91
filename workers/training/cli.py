"""`maskwatch train` and `maskwatch evaluate`: wiring between the command line, the data and the network.

TensorFlow and the models are imported when a command runs, so that --help is quick and a missing layer is named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from common import console
from common.domain import MaskwatchError


@click.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Where the results go.")
@click.option("--epochs", default=45, show_default=True, type=click.IntRange(min=1))
@click.option("--side", default=64, show_default=True, type=click.IntRange(16, 256), help="Input pixels a side.")
@click.option("--seed", default=42, show_default=True, type=click.IntRange(min=0))
@console.json_option
def train(data: tuple[Path, ...], out: Path, epochs: int, side: int, seed: int, as_json: bool) -> None:
    """Fit and export a classifier of faces with and without mask.

    DATA are class folders (with_mask/, without_mask/, perhaps mask_weared_incorrect/) or scene folders (images/ and
    annotations/ in Pascal VOC), as many as you like. A mask worn wrongly counts as without. Leaves compact.onnx,
    compact.weights.h5, metrics.json and the model card compact.md. Killed, the same command goes on where it was.

    \b
    Example:
      maskwatch train faces/ scenes_train/ --out trained/
    """
    _prepare_folder(out)
    _load_tensorflow()
    from workers.training import dataset, export, fit
    from workers.training.network import mirrored

    settings = fit.FitSettings(epochs=epochs, side=side, seed=seed)
    faces = dataset.load(data)
    _note_unreadable(faces.unreadable)
    training, validation = dataset.split(faces.samples, fit.FOLDS, seed)
    console.note(f"{len(training):,} faces to learn from, {len(validation):,} held out")
    model, progress = _fit(training, validation, settings, out)

    views = fit.validation_views(validation, side)
    onnx_path = out / "compact.onnx"
    model.save_weights(out / "compact.weights.h5")
    shipped = mirrored(model)
    with _native_chatter_off():
        difference = export.export_onnx(shipped, side, onnx_path, views[0].crops)
    values = export.metrics(shipped, faces, training, views, settings, progress)
    values["onnx_difference"] = difference
    values["crops_per_second_one_thread"] = export.crops_per_second(onnx_path, side)
    (out / "compact.md").write_text(export.model_card(onnx_path, values), encoding="utf-8")
    # Last: where metrics.json lies, a training is finished.
    export.write_metrics(out / "metrics.json", values)
    fit.remove_checkpoints(out)
    if as_json:
        console.print_json(values)
    else:
        _print_training(out, values)


def _prepare_folder(out: Path) -> None:
    """Makes the folder before any work is done, for a missing right to write should not show after an epoch."""
    if (out / "metrics.json").exists():
        raise MaskwatchError(f"{out} holds a finished training; choose another folder or remove it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"{out} can't be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise MaskwatchError(f"{out} can't be written to")


def _load_tensorflow() -> None:
    """Imports TensorFlow, without its chatter on the way; a missing one is reported by the command line itself."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with _native_chatter_off():
        import tensorflow as tf

    tf.get_logger().setLevel("ERROR")


@contextmanager
def _native_chatter_off() -> Iterator[None]:
    """Drops what TensorFlow's C++ code writes to standard error: notes on how it was built, which no setting ends."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _fit(training: Any, validation: Any, settings: Any, out: Path) -> tuple[Any, Any]:
    from workers.training import fit

    def tell(figures: dict[str, float]) -> None:
        console.note(
            f"epoch {figures['epoch']:.0f} of {settings.epochs}: loss {figures['loss']:.4f}, "
            f"validation loss {figures['validation_loss']:.4f}, "
            f"balanced accuracy {figures['validation_balanced_accuracy']:.3f}"
        )

    with console.progress() as bar:
        task = bar.add_task("training", total=None)
        return fit.fit(
            training, validation, settings, out,
            on_step=lambda done, total: bar.update(task, completed=done, total=total), on_epoch=tell,
        )  # fmt: skip


def _note_unreadable(unreadable: list[tuple[str, str]]) -> None:
    if unreadable:
        console.note(f"{len(unreadable)} files could not be read and were left out:")
    for name, reason in unreadable:
        console.note(f"  {name}: {reason}")


def _print_training(out: Path, values: dict[str, Any]) -> None:
    console.print_table(
        "Held-out faces",
        ("view", "size in px", "faces", "balanced accuracy"),
        [
            (view, size, row["faces"], _percent(row["balanced_accuracy"]))
            for view, rows in values["validation"].items()
            for size, row in rows.items()
        ],
    )
    console.note(f"best epoch {values['best_epoch']}; {out / 'compact.onnx'}, metrics.json and compact.md are there")


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
    _note_unreadable(results.unreadable)
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
    _note_unreadable(read.unreadable)
    figures = evaluate_faces(read.samples, load_classifier(spec, runtime_of(settings, processes=1)).classify)
    report = figures.pop("report_text")
    if as_json:
        unreadable = [{"file": name, "reason": reason} for name, reason in read.unreadable]
        console.print_json({"folder": str(folder), "pipeline": spec.as_dict(), "unreadable": unreadable, **figures})
        return
    click.echo(report)
    console.print_table(
        f"Balanced accuracy {_percent(figures['all']['balanced_accuracy'])}",
        ("size in px", "faces", "balanced accuracy"),
        [(name, row["faces"], _percent(row["balanced_accuracy"])) for name, row in figures["sizes"].items()],
    )


def _print_scenes(folder: Path, summary: dict[str, Any]) -> None:
    from workers.training.evaluate import JUDGED_FROM_PX, confusion_rows

    columns = ("size in px", "labelled", "found", "recall", "balanced accuracy", "uncertain", "without uncertain")
    rows = [_size_row(name, row) for name, row in summary["sizes"].items()]
    judged = summary["judged"]
    console.print_table(f"{summary['images']} pictures of {folder}", columns, rows)
    console.print_table(
        f"Found faces of {JUDGED_FROM_PX:.0f} px and more: balanced accuracy {_percent(judged['balanced_accuracy'])}; "
        f"{_percent(judged['uncertain_share'])} uncertain, else {_percent(judged['certain_balanced_accuracy'])}",
        ("", "called with_mask", "called without_mask"),
        confusion_rows(judged),
    )
    worn_wrongly = judged["worn_wrongly"]
    console.out.print(
        f"{summary['detections']} detections, precision {_percent(summary['precision'])}, recall of all sizes "
        f"{_percent(summary['recall'])}; masks worn wrongly: {worn_wrongly['called_without_mask']} of "
        f"{worn_wrongly['matched']} called without_mask",
        highlight=False,
    )


def _size_row(name: str, row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        name, row["labelled"], row["matched"], _percent(row["recall"]), _percent(row["balanced_accuracy"]),
        _percent(row["uncertain_share"]), _percent(row["certain_balanced_accuracy"]),
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
