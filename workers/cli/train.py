"""`maskwatch train`: wiring between the command line, the data and the network.

TensorFlow and the models are imported when a command runs, so that --help is quick and a missing layer is named.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.cli.parts import console
from common.domain import MaskwatchError
from common.models.manifest import MODELS
from common.reporting import tables
from workers.training import pretrained, recipes
from workers.weights.files import read_model


@click.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results (default: trained/ARCH-RECIPE).",
)
@click.option(
    "--arch",
    default="efficientnet-lite0",
    show_default=True,
    type=click.Choice(["xception", "compact", "efficientnet-lite0"]),
    help="The network to train.",
)
@click.option(
    "--recipe",
    default="field",
    show_default=True,
    type=click.Choice(["notebook", "field"]),
    help="notebook: exactly as the reference of 2020; field: for faces as cameras see them.",
)
@click.option("--stages", help="Crop sizes in px and their epochs, e.g. 64:12,96:4 (default: the recipe's).")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs in all, divided over the recipe's stages.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of ImageNet weights to begin with; for xception, Keras's own file without top.",
)
@click.option("--scratch", is_flag=True, help="Begin with random weights, even if ImageNet weights are here.")
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "mixed_bfloat16", "mixed_float16"]),
    help="The number format that the network computes in.",
)
@click.option("--limit", type=click.IntRange(min=20), help="Use only this many faces, chosen at random: a quick try.")
@click.option(
    "--seed", default=42, show_default=True, type=click.IntRange(min=0), help="Seed of everything that is random."
)
@console.json_option
def train(
    data: tuple[Path, ...], out: Path | None, arch: str, recipe: str, stages: str | None, epochs: int | None,
    weights: Path | None, scratch: bool, precision: str, limit: int | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Fit and export a classifier of faces with and without mask.

    DATA, one or more: class folders (with_mask/, without_mask/, perhaps mask_weared_incorrect/), a CSV manifest
    (columns file and label), or scene folders (images/ with annotations/ in Pascal VOC, or labels/ in YOLO). A mask
    worn wrongly counts as without.

    Writes the network as ONNX and as Keras weights, metrics.json, a model card, and plots: curves, confusion
    matrix, reliability, samples and the worst mistakes. After a kill, the same command goes on where it was. Trains on
    TensorFlow, or on the backend that KERAS_BACKEND names (torch, jax).

    \b
    Examples:
      maskwatch train faces/ scenes/
      maskwatch train faces.csv --arch compact --out trained/small
      maskwatch train faces/ --recipe notebook --arch xception --limit 400
    """
    out = out or Path("trained") / f"{arch}-{recipe}"
    click.get_current_context().with_resource(_folder(out))
    _load_keras()
    # Imported here: --help needs none of what they load, and Keras reads its settings when it is imported.
    from workers.datasets import dataset
    from workers.training import fit, results

    settings = recipes.settings_for(recipes.Recipe(recipe), arch)
    settings = recipes.with_stages(settings, recipes.read_stages(stages) if stages else None, epochs)
    begin = _pretrained(arch, weights, scratch, recipe)
    settings = replace(settings, seed=seed, precision=precision, pretrained=begin is not None)
    faces = dataset.load(data)
    console.note_unreadable(faces.unreadable)
    if limit is not None:
        faces.samples = dataset.limited(faces.samples, limit, seed)
    divide = dataset.split_as_notebook if settings.recipe is recipes.Recipe.NOTEBOOK else dataset.split_by_group
    split = divide(faces.samples, seed)
    console.note(f"{len(split.training):,} faces to learn from, {len(split.held_out):,} held out")
    with console.bar("training") as bar:
        model, progress = fit.fit(
            split.training, split.validation, settings, out, prepare=begin or (lambda model: None),
            on_step=bar.show, on_epoch=partial(_tell_epoch, settings),
        )  # fmt: skip
    _go_on_with_tensorflow(out)
    with _native_chatter_off():
        values = results.leave(model, progress, faces, split, settings, out)
    fit.remove_checkpoints(out)
    if as_json:
        console.print_json(values)
    else:
        _print_training(out, values)


def _pretrained(arch: str, weights: Path | None, scratch: bool, recipe: str) -> Callable[[Any], None] | None:
    """A function that fills the fresh network with ImageNet's weights; None, with a note, if there are none here."""
    if scratch and weights:
        raise MaskwatchError("--scratch and --weights exclude each other")
    if scratch or arch == "compact":
        if weights:
            raise MaskwatchError("no ImageNet weights are published for compact: leave --weights out")
        return None
    if arch == "xception":
        path = weights or pretrained.xception_file()
        if path is None:
            console.note(
                f"no ImageNet weights found ({pretrained.XCEPTION_FILE} in Keras's cache, or --weights): "
                "the whole network learns from scratch"
            )
            return None
        console.note(f"begins with ImageNet's weights of {path}")
        return partial(pretrained.load_xception, path=path, freeze=recipe == "notebook")
    content = weights.read_bytes() if weights else read_model(MODELS["efficientnet-lite0-imagenet"].ref)
    return partial(pretrained.load_efficientnet_lite0, content=content)


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Makes the folder before any work is done, so that a missing right to write is not found only after an epoch;
    removes the folder at the end if it is new and empty."""
    if (out / "metrics.json").exists():
        raise MaskwatchError(f"{out} holds a finished training; choose another folder or remove it")
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"{out} can't be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise MaskwatchError(f"{out} can't be written to")
    try:
        yield
    finally:
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _load_keras() -> None:
    """Imports Keras and its backend (TensorFlow if none is named), and drops what they print meanwhile. The command
    line reports a missing package."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with _native_chatter_off():
        import keras  # noqa: F401
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")


@contextmanager
def _native_chatter_off() -> Iterator[None]:
    """Drops what TensorFlow's C++ code writes to standard error: build notes that no setting turns off."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _go_on_with_tensorflow(out: Path) -> None:
    """After a training in torch or JAX: run the same command again on TensorFlow, which can make ONNX files. It finds
    the training finished, and exports the network."""
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise MaskwatchError(
            f"the network is fitted, but TensorFlow, which makes the ONNX file, is not installed: copy {out} and the "
            "data to a machine that has it, and give the same command there without KERAS_BACKEND"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "KERAS_BACKEND": "tensorflow"})


def _tell_epoch(settings: recipes.FitSettings, figures: dict[str, float]) -> None:
    console.note(
        f"epoch {figures['epoch']:.0f} of {settings.epochs} at {figures['side']:.0f} px: "
        f"loss {figures['loss']:.4f}, validation loss {figures['validation_loss']:.4f}, "
        f"balanced accuracy {figures['validation_balanced_accuracy']:.3f}"
    )


def _print_training(out: Path, values: dict[str, Any]) -> None:
    console.print_table(
        "Held-out faces",
        ("view", "size in px", "faces", "balanced accuracy", "calibration error"),
        [
            (view, "all", figures["all"]["faces"], tables.percent(figures["all"]["balanced_accuracy"]),
             f"{figures['calibration']['expected_calibration_error']:.3f}")
            for view, figures in values["held_out"].items()
        ],
    )  # fmt: skip
    console.note(f"best epoch {values['best_epoch']}; the network, its figures, pictures and model card are in {out}")
