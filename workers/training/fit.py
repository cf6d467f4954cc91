"""Fits the compact network: balanced random batches, a warm-up and a cosine, the best epoch by validation loss.

A killed training goes on in the same folder: after every epoch the whole state lies in a checkpoint, and each
batch is drawn from its own seed, so the rest of the run sees what it would have seen. What becomes of the
weights afterwards is the business of `export`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from workers.classification import _ops
from workers.training import augment
from workers.training.augment import MaskPosition
from workers.training.dataset import CLASS_NAMES, FaceSample

#: One part in this many is held out.
FOLDS = 7

BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WARM_UP_EPOCHS = 2
WEIGHT_DECAY = 2e-3
#: Labels of faces of a few pixels are sometimes wrong; a network that is never quite sure bears that better.
LABEL_SMOOTHING = 0.05

#: Shares of a class: faces of scenes, faces of any kind whose mask is worn wrongly (rare, and the hardest), and
#: unmasked faces of class folders with a mask drawn on. The rest are faces of class folders as they are.
SCENE_SHARE = 0.35
DRAWN_SHARE = 0.12
WORN_WRONGLY_SHARE = 0.08
DRAWN_WRONGLY_SHARE = 0.1

#: Shares of faces that are set into the surroundings of a random face of a scene, whatever its class.
FOLDER_PLACED_SHARE = 0.5
SCENE_PLACED_SHARE = 0.2

#: Faces of scenes below this don't judge epochs: their labels are guesses.
JUDGED_FROM_PX = 16.0

Crops = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What a person chooses. side: pixels of the network's input."""

    epochs: int = 60
    side: int = 64
    seed: int = 42


@dataclass(slots=True)
class Progress:
    """How far a training is; written beside the checkpoint after every epoch."""

    fingerprint: str
    epochs_done: int = 0
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ValidationView:
    """The held-out faces seen in one way: crops, their labels, and the samples they are of."""

    name: str
    crops: Crops
    labels: Labels
    samples: list[FaceSample]


@dataclass(frozen=True, slots=True)
class _Pool:
    """Faces of one kind: their share of their class, their indices, and the masks that may be drawn on them."""

    share: float
    members: list[int]
    masks: tuple[MaskPosition, ...] = ()


class BatchSource:
    """Random batches with equal classes; batch number n is the same in every run with the same seed."""

    def __init__(self, samples: Sequence[FaceSample], side: int, seed: int) -> None:
        self._samples = samples
        self._side = side
        self._seed = seed
        self._surroundings = [sample for sample in samples if sample.from_scene]

        def members(label: int, *, from_scene: bool, worn_wrongly: bool = False) -> list[int]:
            wanted = (label, from_scene, worn_wrongly)
            return [at for at, s in enumerate(samples) if (s.label, s.from_scene, s.worn_wrongly) == wanted]

        bare = members(1, from_scene=False)
        worn_wrongly = [at for at, sample in enumerate(samples) if sample.worn_wrongly]
        self._pools = (
            _normalised(
                _Pool(SCENE_SHARE, members(0, from_scene=True)),
                _Pool(DRAWN_SHARE, bare, (MaskPosition.OVER_NOSE,)),
                _Pool(1 - SCENE_SHARE - DRAWN_SHARE, members(0, from_scene=False)),
            ),
            _normalised(
                _Pool(SCENE_SHARE, members(1, from_scene=True)),
                _Pool(WORN_WRONGLY_SHARE, worn_wrongly),
                _Pool(DRAWN_WRONGLY_SHARE, bare, (MaskPosition.UNDER_NOSE, MaskPosition.AT_CHIN)),
                _Pool(1 - SCENE_SHARE - WORN_WRONGLY_SHARE - DRAWN_WRONGLY_SHARE, bare),
            ),
        )

    def batch(self, number: int) -> tuple[Crops, NDArray[np.float32]]:
        """Crops float32 (BATCH, side, side, 3) in [-1, 1] and one-hot labels float32 (BATCH, 2)."""
        rng = np.random.default_rng((self._seed, number))
        labels = rng.permutation(np.arange(BATCH) % len(CLASS_NAMES))
        crops = np.stack([self._crop(int(label), rng) for label in labels])
        return crops, np.eye(len(CLASS_NAMES), dtype=np.float32)[labels]

    def _crop(self, label: int, rng: np.random.Generator) -> Crops:
        pools = self._pools[label]
        pool = pools[int(rng.choice(len(pools), p=[pool.share for pool in pools]))]
        sample = self._samples[pool.members[int(rng.integers(len(pool.members)))]]
        mask = pool.masks[int(rng.integers(len(pool.masks)))] if pool.masks else None
        crop = augment.random_crop(sample, rng, mask=mask, surroundings=self._random_surroundings(sample, rng))
        return _ops.prepare_crop(crop, self._side)

    def _random_surroundings(self, sample: FaceSample, rng: np.random.Generator) -> FaceSample | None:
        share = SCENE_PLACED_SHARE if sample.from_scene else FOLDER_PLACED_SHARE
        if not self._surroundings or rng.random() >= share:
            return None
        return self._surroundings[int(rng.integers(len(self._surroundings)))]


def _normalised(*pools: _Pool) -> list[_Pool]:
    """The pools that have members, with shares that sum to 1."""
    filled = [pool for pool in pools if pool.members]
    total = sum(pool.share for pool in filled)
    return [replace(pool, share=pool.share / total) for pool in filled]


def validation_views(samples: Sequence[FaceSample], side: int) -> list[ValidationView]:
    """Held-out faces of scenes as they are, those of class folders at their own and at small sizes."""
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
    """(cross-entropy, balanced accuracy). Classes count alike, and scenes as much as all views of class folders."""
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
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_epoch: Callable[[dict[str, float]], None] = lambda figures: None,
) -> tuple[Any, Progress]:
    """The network with the weights of its best epoch, and how the training went.

    Goes on where a killed training of the same data and settings stopped in `out`. Raises `MaskwatchError` if
    another training lies there. `on_step` is called with steps done and all steps, `on_epoch` with an epoch's figures.
    """
    progress = _progress_in(out, _fingerprint(training, validation, settings))
    import keras

    steps = max(1, len(training) // BATCH)
    keras.utils.set_random_seed(settings.seed + progress.epochs_done)
    model = _model_to_go_on_with(out, progress, settings, steps)
    views = validation_views(validation, settings.side)
    source = BatchSource(training, settings.side, settings.seed)
    report = keras.callbacks.LambdaCallback
    for epoch in range(progress.epochs_done, settings.epochs):
        count = report(on_train_batch_end=partial(_report_step, on_step, epoch * steps, settings.epochs * steps))
        fitted = model.fit(
            _epoch_batches(source, epoch, steps, settings.side), shuffle=False, verbose=0, callbacks=[count]
        )
        loss, accuracy = validation_loss(views, partial(model.predict, batch_size=256, verbose=0))
        figures = {
            "epoch": epoch + 1,
            "loss": float(fitted.history["loss"][0]),
            "validation_loss": loss,
            "validation_balanced_accuracy": accuracy,
        }
        progress.epochs_done = epoch + 1
        progress.history.append(figures)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = loss, epoch + 1
        _save(out, model, progress)
        on_epoch(figures)
    model.load_weights(_best_weights(out, progress))
    return model, progress


def _report_step(on_step: Callable[[int, int], None], before: int, total: int, step: int, logs: Any = None) -> None:
    on_step(before + step + 1, total)


def _epoch_batches(source: BatchSource, epoch: int, steps: int, side: int) -> Any:
    """A tf.data set of one epoch, made ahead in parallel."""
    import tensorflow as tf

    def make(number: Any) -> Any:
        crops, labels = tf.numpy_function(source.batch, [number], (tf.float32, tf.float32))
        crops.set_shape((BATCH, side, side, 3))
        labels.set_shape((BATCH, len(CLASS_NAMES)))
        return crops, labels

    numbers = tf.data.Dataset.range(epoch * steps, (epoch + 1) * steps)
    return numbers.map(make, num_parallel_calls=tf.data.AUTOTUNE).prefetch(4)


def _compiled(settings: FitSettings, steps: int) -> Any:
    import keras

    from workers.training.network import build_compact

    model = build_compact(settings.side)
    warm_up = min(WARM_UP_EPOCHS * steps, settings.epochs * steps // 2)
    schedule = keras.optimizers.schedules.CosineDecay(
        PEAK_LEARNING_RATE / 20, settings.epochs * steps - warm_up, alpha=0.002,
        warmup_target=PEAK_LEARNING_RATE, warmup_steps=warm_up,
    )  # fmt: skip
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY),
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING),
        # XLA compiles for longer than it saves on a CPU.
        jit_compile=False,
    )
    return model


def _fingerprint(training: Sequence[FaceSample], validation: Sequence[FaceSample], settings: FitSettings) -> str:
    """What a checkpoint must share with a training to go on with it: the settings and the faces of both sides."""
    names = [[f"{sample.source}/{sample.name}" for sample in side] for side in (training, validation)]
    return hashlib.sha256(json.dumps([asdict(settings), names]).encode()).hexdigest()


def _progress_in(out: Path, fingerprint: str) -> Progress:
    path = out / "progress.json"
    if not path.is_file():
        return Progress(fingerprint)
    progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
    if progress.fingerprint != fingerprint:
        raise MaskwatchError(f"{out} holds a training with other data or settings; choose another folder or remove it")
    return progress


def _checkpoint(out: Path, epoch: int) -> Path:
    return out / f"checkpoint-{epoch}.keras"


def _best_weights(out: Path, progress: Progress) -> Path:
    return out / f"best-{progress.best_epoch}.weights.h5"


def _model_to_go_on_with(out: Path, progress: Progress, settings: FitSettings, steps: int) -> Any:
    import keras

    if progress.epochs_done == 0:
        return _compiled(settings, steps)
    return keras.models.load_model(_checkpoint(out, progress.epochs_done))


def _save(out: Path, model: Any, progress: Progress) -> None:
    """Checkpoint first, then the progress that names it, then the old files: a kill in between loses nothing."""
    model.save(_checkpoint(out, progress.epochs_done))
    if progress.best_epoch == progress.epochs_done:
        model.save_weights(_best_weights(out, progress))
    written = out / "progress.json.part"
    written.write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
    written.replace(out / "progress.json")
    keep = {_checkpoint(out, progress.epochs_done), _best_weights(out, progress)}
    for old in [*out.glob("checkpoint-*.keras"), *out.glob("best-*.weights.h5")]:
        if old not in keep:
            old.unlink()


def remove_checkpoints(out: Path) -> None:
    """Leaves what a training is for and drops what only going on with it needed."""
    for path in [*out.glob("checkpoint-*.keras"), *out.glob("best-*.weights.h5"), out / "progress.json"]:
        path.unlink(missing_ok=True)
