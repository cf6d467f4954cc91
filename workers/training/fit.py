"""Fits a network by a recipe: runs the epochs, writes checkpoints, and returns the best epoch's weights.

A killed training goes on in the same folder: after every epoch the whole state is saved in a checkpoint, and each
batch is drawn from its own seed, so the rest of the run sees the same batches. Exporting the weights is left to
`export`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, first_line
from common.files import write_atomically
from workers.classification import _ops, networks
from workers.datasets import augment
from workers.datasets.dataset import FaceSample
from workers.training.batches import batches_for, epoch_batches
from workers.training.recipes import FitSettings, Recipe, compile_model

#: Smaller faces of scenes are left out when epochs are compared: their labels are guesses.
JUDGED_FROM_PX = 16.0

Crops = NDArray[np.float32]


@dataclass(slots=True)
class Progress:
    """The progress of a training; written beside the checkpoint after every epoch."""

    fingerprint: str
    epochs_done: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)

    def stopped_early(self, settings: FitSettings) -> bool:
        """Whether the epochs since the best one used up the recipe's patience. Never before the last crop size."""
        if settings.patience is None or settings.side_in(self.epochs_done) != settings.side:
            return False
        return self.epochs_done - self.best_epoch >= settings.patience


@dataclass(frozen=True, slots=True)
class ValidationView:
    """One view of the validation faces: crops, their labels, and the samples that the crops are of."""

    name: str
    crops: Crops
    labels: NDArray[np.int64]
    samples: list[FaceSample]


def validation_views(samples: Sequence[FaceSample], side: int) -> list[ValidationView]:
    """Validation faces of scenes at their own size, and of class folders at their own and at small sizes."""
    views = []
    scene = [sample for sample in samples if sample.from_scene and sample.size_px >= JUDGED_FROM_PX]
    if scene:
        views.append(_view("scenes", scene, None, side))
    folder = [sample for sample in samples if not sample.from_scene]
    if folder:
        views.append(_view("folders", folder, None, side))
        views += [_view(f"folders at {size:.0f} px", folder, size, side) for size in augment.VALIDATION_SIZES_PX]
    return views


def _view(name: str, samples: list[FaceSample], face_px: float | None, side: int) -> ValidationView:
    crops = np.stack([_ops.prepare_crop(augment.fixed_crop(sample, face_px), side) for sample in samples])
    return ValidationView(name, crops, np.array([sample.label for sample in samples]), samples)


def validation_loss(views: Sequence[ValidationView], predict: Callable[[Crops], Crops]) -> tuple[float, float]:
    """(cross-entropy, balanced accuracy). Classes have equal weight, scenes as much as all views of class folders."""
    totals = np.zeros(2)
    weights = 0.0
    folder_views = sum(view.name != "scenes" for view in views)
    for view in views:
        weight = 1.0 if view.name == "scenes" else 1.0 / folder_views
        probabilities = predict(view.crops)
        right = probabilities[np.arange(len(view.labels)), view.labels]
        per_class = [
            (-np.log(np.maximum(right[view.labels == label], 1e-7)).mean(), (right[view.labels == label] > 0.5).mean())
            for label in np.unique(view.labels)
        ]
        totals += weight * np.mean(per_class, axis=0)
        weights += weight
    loss, accuracy = totals / weights
    return float(loss), float(accuracy)


def fit(
    training: Sequence[FaceSample],
    validation: Sequence[FaceSample],
    settings: FitSettings,
    out: Path,
    *,
    prepare: Callable[[Any], None] = lambda model: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_epoch: Callable[[dict[str, float]], None] = lambda figures: None,
) -> tuple[Any, Progress]:
    """The network with the weights of its best epoch, for crops of any size, and the progress of the training.

    The best epoch has the lowest validation loss, or with the notebook's recipe the lowest training loss.
    `prepare` may fill the fresh network, for example with ImageNet's weights. Goes on where a killed training of the
    same data and settings stopped in `out`; raises `MaskwatchError` if `out` holds another training. `on_step` is
    called with steps done and all steps, `on_epoch` with an epoch's figures.
    """
    progress = _progress_in(out, _fingerprint(training, validation, settings))
    import keras

    steps = len(training) // settings.batch
    if steps == 0:
        raise MaskwatchError(f"{len(training)} training faces are too few: a batch takes {settings.batch}; add data")
    keras.utils.set_random_seed(settings.seed + progress.epochs_done)
    keras.config.set_dtype_policy(settings.precision)
    model = None
    batches = batches_for(training, settings)
    views: list[ValidationView] = []
    while progress.epochs_done < settings.epochs and not progress.stopped_early(settings):
        epoch = progress.epochs_done
        side = settings.side_in(epoch)
        if model is None:
            model = _model_to_go_on_with(out, progress, settings, steps, prepare)
        if not views or views[0].crops.shape[1] != side:
            views = validation_views(validation, side)
        report = partial(_report_step, on_step, epoch * steps, settings.epochs * steps)
        fitted = model.fit(
            epoch_batches(batches, epoch, steps, settings), shuffle=False, verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=report)],
        )  # fmt: skip
        loss, accuracy = validation_loss(views, partial(model.predict, batch_size=128, verbose=0))
        figures = {
            "epoch": epoch + 1,
            "side": side,
            "loss": float(fitted.history["loss"][0]),
            "validation_loss": loss,
            "validation_balanced_accuracy": accuracy,
        }
        judged = figures["loss"] if settings.recipe is Recipe.NOTEBOOK else loss
        # The first epoch with larger crops isn't compared with epochs of smaller crops.
        if judged < progress.best_loss or (epoch > 0 and side != settings.side_in(epoch - 1)):
            progress.best_loss, progress.best_epoch = judged, epoch + 1
        progress.epochs_done = epoch + 1
        progress.history.append(figures)
        _save(out, model, progress)
        on_epoch(figures)
    return _best_model(out, progress, settings), progress


def _report_step(on_step: Callable[[int, int], None], before: int, total: int, step: int, logs: Any = None) -> None:
    on_step(before + step + 1, total)


def _fingerprint(training: Sequence[FaceSample], validation: Sequence[FaceSample], settings: FitSettings) -> str:
    """Identifies a training: a checkpoint with other settings or faces has another fingerprint."""
    names = [[f"{sample.source}/{sample.name}" for sample in side] for side in (training, validation)]
    return hashlib.sha256(json.dumps([settings.as_dict(), names]).encode()).hexdigest()


def _progress_in(out: Path, fingerprint: str) -> Progress:
    path = out / "progress.json"
    if not path.is_file():
        return Progress(fingerprint)
    try:
        progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MaskwatchError(f"{path} is not a record of a training ({error}); remove {out} to begin again") from error
    if progress.fingerprint != fingerprint:
        raise MaskwatchError(f"{out} holds a training with other data or settings; choose another folder or remove it")
    return progress


def _checkpoint(out: Path, epoch: int) -> Path:
    return out / f"checkpoint-{epoch}.keras"


def _best_weights(out: Path, progress: Progress) -> Path:
    return out / f"best-{progress.best_epoch}.weights.h5"


def _model_to_go_on_with(
    out: Path, progress: Progress, settings: FitSettings, steps: int, prepare: Callable[[Any], None]
) -> Any:
    import keras

    if progress.epochs_done > 0:
        checkpoint = _checkpoint(out, progress.epochs_done)
        try:
            return keras.models.load_model(checkpoint)
        except (OSError, ValueError) as error:
            raise MaskwatchError(
                f"{checkpoint} can't be read ({first_line(error)}); remove {out} to begin again"
            ) from error
    # Without a fixed size: crops grow from stage to stage.
    model = networks.build(settings.arch, side=None)
    prepare(model)
    compile_model(model, settings, steps)
    return model


def _best_model(out: Path, progress: Progress, settings: FitSettings) -> Any:
    """The network of the best epoch, in full precision."""
    import keras

    keras.config.set_dtype_policy("float32")
    model = networks.build(settings.arch, side=None)
    model.load_weights(_best_weights(out, progress))
    return model


def _save(out: Path, model: Any, progress: Progress) -> None:
    """Write the checkpoint, then the progress that names it, then remove old files: a kill in between loses nothing."""
    model.save(_checkpoint(out, progress.epochs_done))
    if progress.best_epoch == progress.epochs_done:
        model.save_weights(_best_weights(out, progress))
    write_atomically(out / "progress.json", json.dumps(asdict(progress), indent=1))
    keep = {_checkpoint(out, progress.epochs_done), _best_weights(out, progress)}
    for old in [*out.glob("checkpoint-*.keras"), *out.glob("best-*.weights.h5")]:
        if old not in keep:
            old.unlink()


def remove_checkpoints(out: Path) -> None:
    """Remove the files that were needed only to continue the training."""
    for path in [*out.glob("checkpoint-*.keras"), *out.glob("best-*.weights.h5"), out / "progress.json"]:
        path.unlink(missing_ok=True)
