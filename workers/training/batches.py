"""Chooses the faces of each batch: balanced and degraded for `field`, shuffled and plain for `notebook`.

Batch number n is the same in every run with the same faces and seed, so that a training that is continued after a kill
sees the same batches. Augmenting a single face is left to `augment`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.classification import _ops
from workers.datasets import augment
from workers.datasets.annotations import CLASS_NAMES
from workers.datasets.augment import MaskPosition
from workers.datasets.dataset import FaceSample
from workers.training.recipes import FitSettings, Recipe

#: Shares of a class: faces of scenes; unmasked faces of class folders with a mask drawn on; faces of any kind whose
#: mask is worn wrongly (rare, and the hardest), and such masks drawn on. The rest are other faces of class folders.
SCENE_SHARE = 0.35
DRAWN_SHARE = 0.12
WORN_WRONGLY_SHARE = 0.08
DRAWN_WRONGLY_SHARE = 0.1

#: Shares of faces that are put into the surroundings of a random face of a scene, of any class.
FOLDER_PLACED_SHARE = 0.5
SCENE_PLACED_SHARE = 0.2

#: The notebook's shuffle buffer, in faces.
SHUFFLE_BUFFER = 100

Crops = NDArray[np.float32]


class Batches(Protocol):
    """Batches by number."""

    def batch(self, number: int, side: int) -> tuple[Crops, NDArray[Any]]:
        """Crops float32 (batch, side, side, 3) in [-1, 1], and labels as the recipe's loss wants them."""
        ...


@dataclass(frozen=True, slots=True)
class _Pool:
    """Faces of one kind: their share of their class, their indices, and the masks that may be drawn on them."""

    share: float
    members: list[int]
    masks: tuple[MaskPosition, ...] = ()


class FieldBatches:
    """Random, degraded faces with equal classes; labels one-hot float32 (batch, 2)."""

    def __init__(self, samples: Sequence[FaceSample], size: int, seed: int) -> None:
        self._samples = samples
        self._size = size
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

    def batch(self, number: int, side: int) -> tuple[Crops, NDArray[np.float32]]:
        rng = np.random.default_rng((self._seed, number))
        labels = rng.permutation(np.arange(self._size) % len(CLASS_NAMES))
        crops = np.stack([_ops.prepare_crop(self._crop(int(label), rng), side) for label in labels])
        return crops, np.eye(len(CLASS_NAMES), dtype=np.float32)[labels]

    def _crop(self, label: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        pools = self._pools[label]
        pool = pools[int(rng.choice(len(pools), p=[pool.share for pool in pools]))]
        sample = self._samples[pool.members[int(rng.integers(len(pool.members)))]]
        mask = pool.masks[int(rng.integers(len(pool.masks)))] if pool.masks else None
        return augment.random_crop(sample, rng, mask=mask, surroundings=self._random_surroundings(sample, rng))

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


class NotebookBatches:
    """Every face once per round, as in the notebook: through a shuffle buffer of 100, resized bilinearly.

    Labels are class indices int32 (batch,). A batch may span two rounds, as with `repeat` before `batch`.
    """

    def __init__(self, samples: Sequence[FaceSample], size: int, seed: int) -> None:
        self._samples = samples
        self._size = size
        self._seed = seed

    def batch(self, number: int, side: int) -> tuple[Crops, NDArray[np.int32]]:
        places = range(number * self._size, (number + 1) * self._size)
        rounds = {place // len(self._samples) for place in places}
        orders = {which: shuffled(len(self._samples), (self._seed, which)) for which in rounds}
        chosen = [self._samples[orders[place // len(self._samples)][place % len(self._samples)]] for place in places]
        crops = np.stack([notebook_crop(sample, side) for sample in chosen])
        return crops, np.array([sample.label for sample in chosen], np.int32)


def shuffled(count: int, seed: Sequence[int]) -> NDArray[np.intp]:
    """The numbers below `count` in the order of a shuffle buffer of `SHUFFLE_BUFFER`: it gives a random one of those it
    holds, and the next number takes that one's place."""
    rng = np.random.default_rng(list(seed))
    buffer = list(range(min(SHUFFLE_BUFFER, count)))
    order = []
    for following in range(len(buffer), count + len(buffer)):
        at = int(rng.integers(len(buffer)))
        order.append(buffer[at])
        if following < count:
            buffer[at] = following
        else:
            buffer.pop(at)
    return np.array(order, np.intp)


def notebook_crop(sample: FaceSample, side: int) -> Crops:
    """A face as the notebook reads it: the whole image of a class folder, or the labelled box of a scene; resized
    bilinearly, without keeping its aspect, in [-1, 1]."""
    pixels = sample.pixels
    if sample.from_scene:
        height, width = pixels.shape[:2]
        left, top, right, bottom = _ops.pixel_box(sample.box, width, height)
        pixels = pixels[top:bottom, left:right]
    # In floats, as TensorFlow resizes, without rounding in between.
    resized = cv2.resize(pixels.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized / np.float32(127.5) - np.float32(1.0))


def batches_for(samples: Sequence[FaceSample], settings: FitSettings) -> Batches:
    """The batches of the recipe."""
    source = NotebookBatches if settings.recipe is Recipe.NOTEBOOK else FieldBatches
    return source(samples, settings.batch, settings.seed)


def epoch_batches(source: Batches, epoch: int, steps: int, settings: FitSettings) -> Any:
    """The batches of one epoch as Keras's `fit` takes them, prefetched in parallel: through tf.data if TensorFlow is
    installed, whichever backend trains; else through Keras's own threads."""
    side = settings.side_in(epoch)
    first = epoch * steps
    if importlib.util.find_spec("tensorflow") is None:
        return _through_keras(source, first, steps, side)
    import tensorflow as tf

    labels_type = tf.int32 if settings.recipe is Recipe.NOTEBOOK else tf.float32
    labels_shape = (settings.batch,) if settings.recipe is Recipe.NOTEBOOK else (settings.batch, len(CLASS_NAMES))

    def make(number: Any) -> Any:
        crops, labels = tf.numpy_function(partial(source.batch, side=side), [number], (tf.float32, labels_type))
        crops.set_shape((settings.batch, side, side, 3))
        labels.set_shape(labels_shape)
        return crops, labels

    numbers = tf.data.Dataset.range(first, first + steps)
    return numbers.map(make, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _through_keras(source: Batches, first: int, steps: int, side: int) -> Any:
    import keras

    class Numbered(keras.utils.PyDataset):  # type: ignore[misc]  # Keras carries no types
        def __len__(self) -> int:
            return steps

        def __getitem__(self, at: int) -> tuple[Crops, NDArray[Any]]:
            return source.batch(first + at, side)

    # Threads are enough: OpenCV and numpy release Python's lock during the work.
    return Numbered(workers=2, max_queue_size=4)
