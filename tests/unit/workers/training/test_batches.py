from __future__ import annotations

import numpy as np
import pytest

from workers.datasets.augment import MaskPosition
from workers.datasets.dataset import FaceSample
from workers.training import batches, recipes
from workers.training.batches import FieldBatches, NotebookBatches

SIZE = 64


def samples(label: int, from_scene: bool, count: int, worn_wrongly: bool = False) -> list[FaceSample]:
    """Faces whose grey level says what they are."""
    grey = 40 + 120 * label + 40 * from_scene
    pixels = np.full((40, 40, 3), grey, np.uint8)
    return [
        FaceSample(pixels, (8, 8, 32, 32), label, 24, from_scene, "flat", f"{grey}/{n}", f"{grey}/{n}", worn_wrongly)
        for n in range(count)
    ]


UNBALANCED = [*samples(0, True, 50), *samples(1, True, 3), *samples(0, False, 5), *samples(1, False, 20)]


def test_batches_have_equal_classes_however_unequal_the_data():
    source = FieldBatches(UNBALANCED, SIZE, seed=1)
    for number in range(3):
        crops, labels = source.batch(number, 32)
        assert crops.shape == (SIZE, 32, 32, 3)
        assert crops.dtype == labels.dtype == np.float32
        assert labels.sum(axis=0).tolist() == [SIZE / 2, SIZE / 2]


def test_a_batch_depends_on_its_number_and_the_seed_only():
    first, again = (FieldBatches(UNBALANCED, SIZE, seed=1) for _ in range(2))
    first.batch(0, 32)
    assert np.array_equal(first.batch(7, 32)[0], again.batch(7, 32)[0])
    assert not np.array_equal(first.batch(7, 32)[0], first.batch(8, 32)[0])
    assert not np.array_equal(first.batch(7, 32)[0], FieldBatches(UNBALANCED, SIZE, seed=2).batch(7, 32)[0])


def test_scenes_get_their_share_of_each_class(monkeypatch):
    drawn: list[FaceSample] = []

    def remember(sample, rng, *, mask, surroundings):
        drawn.append(sample)
        return sample.pixels

    monkeypatch.setattr(batches.augment, "random_crop", remember)
    source = FieldBatches(UNBALANCED, SIZE, seed=3)
    for number in range(20):
        source.batch(number, 32)
    share = np.mean([sample.from_scene for sample in drawn])
    assert share == pytest.approx(batches.SCENE_SHARE, abs=0.04)


def test_masks_are_drawn_on_bare_faces_only_and_only_one_over_the_nose_makes_a_mask(monkeypatch):
    def mark(sample, rng, *, mask, surroundings):
        if mask is not None:
            assert (sample.label, sample.from_scene, sample.worn_wrongly) == (1, False, False)
        return np.full((32, 32, 3), 0 if mask is None else 1 + list(MaskPosition).index(mask), np.uint8)

    monkeypatch.setattr(batches.augment, "random_crop", mark)
    source = FieldBatches([*UNBALANCED, *samples(1, False, 2, worn_wrongly=True)], SIZE, seed=4)
    labels_of: dict[int, set[int]] = {}
    for number in range(10):
        for crop, label in zip(*source.batch(number, 32), strict=True):
            labels_of.setdefault(round((crop[0, 0, 0] + 1) * 127.5), set()).add(int(label.argmax()))
    assert labels_of == {0: {0, 1}, 1: {0}, 2: {1}, 3: {1}}


def test_masks_worn_wrongly_are_seen_more_often_than_they_are(monkeypatch):
    drawn: list[FaceSample] = []

    def remember(sample, rng, *, mask, surroundings):
        drawn.append(sample)
        return sample.pixels

    monkeypatch.setattr(batches.augment, "random_crop", remember)
    source = FieldBatches([*UNBALANCED, *samples(1, True, 1, worn_wrongly=True)], SIZE, seed=7)
    for number in range(20):
        source.batch(number, 32)
    share = np.mean([sample.worn_wrongly for sample in drawn if sample.label == 1])
    assert share == pytest.approx(batches.WORN_WRONGLY_SHARE, abs=0.03)


def test_faces_of_both_classes_get_the_surroundings_of_any_scene(monkeypatch):
    pairs: list[tuple[int, bool, int | None]] = []

    def remember(sample, rng, *, mask, surroundings):
        pairs.append((sample.label, sample.from_scene, None if surroundings is None else surroundings.label))
        return sample.pixels

    monkeypatch.setattr(batches.augment, "random_crop", remember)
    source = FieldBatches(UNBALANCED, SIZE, seed=6)
    for number in range(20):
        source.batch(number, 32)
    for from_scene, share in ((True, batches.SCENE_PLACED_SHARE), (False, batches.FOLDER_PLACED_SHARE)):
        placed = [other is not None for _, scene, other in pairs if scene == from_scene]
        assert np.mean(placed) == pytest.approx(share, abs=0.05)
    # A with_mask face amid what was around an unmasked one, and the other way round.
    assert {(label, other) for label, _, other in pairs if other is not None} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_one_kind_of_data_is_enough():
    source = FieldBatches([*samples(0, True, 4), *samples(1, True, 4)], SIZE, seed=5)
    assert source.batch(0, 32)[1].sum() == SIZE


def numbered(count: int) -> list[FaceSample]:
    """Faces of class folders whose grey level is their number."""
    return [
        FaceSample(np.full((4, 4, 3), at, np.uint8), (0, 0, 4, 4), at % 2, 4, False, "flat", f"{at}", f"{at}")
        for at in range(count)
    ]


def seen(source: NotebookBatches, number: int) -> list[int]:
    crops, _ = source.batch(number, 8)
    return np.rint((crops[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_the_notebook_shows_every_face_once_per_round_and_rounds_without_a_seam():
    source = NotebookBatches(numbered(200), 32, seed=1)
    shown = [number for batch in range(25) for number in seen(source, batch)]  # 800 faces: four rounds
    for start in range(0, 800, 200):
        assert sorted(shown[start : start + 200]) == list(range(200))
    assert shown[:200] != shown[200:400]
    assert seen(source, 3) == seen(NotebookBatches(numbered(200), 32, seed=1), 3)


def test_the_notebooks_shuffle_reaches_no_further_than_its_buffer():
    order = batches.shuffled(1000, (1, 0)).tolist()
    assert sorted(order) == list(range(1000))
    assert all(number - place < batches.SHUFFLE_BUFFER for place, number in enumerate(order))
    assert order[:50] != sorted(order[:50])


def test_the_notebooks_labels_are_class_indices_and_its_crops_bilinear():
    gradient = np.tile(np.arange(0, 160, dtype=np.uint8)[None, :, None], (160, 1, 3))
    sample = FaceSample(gradient, (0, 0, 160, 160), 1, 160, False, "flat", "g", "g")
    crops, labels = NotebookBatches([sample], 2, seed=1).batch(0, 128)
    assert labels.dtype == np.int32
    assert labels.tolist() == [1, 1]
    # Pixel i of 128 lies at (i + 0.5) · 160 / 128 - 0.5 of the picture.
    places = (np.arange(128) + 0.5) * 160 / 128 - 0.5
    assert crops[0, 64, :, 0] == pytest.approx(places / 127.5 - 1, abs=1e-4)


def test_a_scene_face_is_its_box_for_the_notebook():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:20, 10:20] = 255
    sample = FaceSample(pixels, (10, 10, 20, 20), 0, 10, True, "flat", "s", "s")
    assert (batches.notebook_crop(sample, 16) == 1).all()


def test_both_ways_of_feeding_give_the_same_batches(monkeypatch):
    """tf.data where TensorFlow is, Keras's own threads elsewhere."""
    pytest.importorskip("tensorflow", reason="the `train` layer is not installed")
    settings = recipes.settings_for(recipes.Recipe.FIELD, "compact")
    source = FieldBatches(UNBALANCED, settings.batch, seed=1)
    through_tf = [labels.numpy() for _, labels in batches.epoch_batches(source, 1, 3, settings)]
    monkeypatch.setattr(batches.importlib.util, "find_spec", lambda name: None)
    through_keras = batches.epoch_batches(source, 1, 3, settings)
    assert len(through_keras) == 3
    for at in range(3):
        assert np.array_equal(through_keras[at][1], through_tf[at])
        assert np.array_equal(through_keras[at][1], source.batch(3 + at, 64)[1])
