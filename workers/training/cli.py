"""`maskwatch train`: wiring between the command line, the data and the network.

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
    console.note_unreadable(faces.unreadable)
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


def _print_training(out: Path, values: dict[str, Any]) -> None:
    console.print_table(
        "Held-out faces",
        ("view", "size in px", "faces", "balanced accuracy"),
        [
            (view, size, row["faces"], console.percent(row["balanced_accuracy"]))
            for view, rows in values["validation"].items()
            for size, row in rows.items()
        ],
    )
    console.note(f"best epoch {values['best_epoch']}; {out / 'compact.onnx'}, metrics.json and compact.md are there")
