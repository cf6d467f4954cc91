from __future__ import annotations

import numpy as np
import pytest

from common.domain import MaskwatchError
from workers.training import fit
from workers.training.augment import MaskPosition
from workers.training.dataset import FaceSample


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
    source = fit.BatchSource(UNBALANCED, 32, seed=1)
    for number in range(3):
        crops, labels = source.batch(number)
        assert crops.shape == (fit.BATCH, 32, 32, 3)
        assert crops.dtype == labels.dtype == np.float32
        assert labels.sum(axis=0).tolist() == [fit.BATCH / 2, fit.BATCH / 2]


def test_a_batch_depends_on_its_number_and_the_seed_only():
    first, again = (fit.BatchSource(UNBALANCED, 32, seed=1) for _ in range(2))
    first.batch(0)
    assert np.array_equal(first.batch(7)[0], again.batch(7)[0])
    assert not np.array_equal(first.batch(7)[0], first.batch(8)[0])
    assert not np.array_equal(first.batch(7)[0], fit.BatchSource(UNBALANCED, 32, seed=2).batch(7)[0])


def test_scenes_get_their_share_of_each_class(monkeypatch):
    drawn: list[FaceSample] = []

    def remember(sample, rng, *, mask, surroundings):
        drawn.append(sample)
        return sample.pixels

    monkeypatch.setattr(fit.augment, "random_crop", remember)
    source = fit.BatchSource(UNBALANCED, 32, seed=3)
    for number in range(20):
        source.batch(number)
    share = np.mean([sample.from_scene for sample in drawn])
    assert share == pytest.approx(fit.SCENE_SHARE, abs=0.04)


def test_masks_are_drawn_on_bare_faces_only_and_only_one_over_the_nose_makes_a_mask(monkeypatch):
    def mark(sample, rng, *, mask, surroundings):
        if mask is not None:
            assert (sample.label, sample.from_scene, sample.worn_wrongly) == (1, False, False)
        return np.full((32, 32, 3), 0 if mask is None else 1 + list(MaskPosition).index(mask), np.uint8)

    monkeypatch.setattr(fit.augment, "random_crop", mark)
    source = fit.BatchSource([*UNBALANCED, *samples(1, False, 2, worn_wrongly=True)], 32, seed=4)
    labels_of: dict[int, set[int]] = {}
    for number in range(10):
        for crop, label in zip(*source.batch(number), strict=True):
            labels_of.setdefault(round((crop[0, 0, 0] + 1) * 127.5), set()).add(int(label.argmax()))
    assert labels_of == {0: {0, 1}, 1: {0}, 2: {1}, 3: {1}}


def test_masks_worn_wrongly_are_seen_more_often_than_they_are(monkeypatch):
    drawn: list[FaceSample] = []

    def remember(sample, rng, *, mask, surroundings):
        drawn.append(sample)
        return sample.pixels

    monkeypatch.setattr(fit.augment, "random_crop", remember)
    source = fit.BatchSource([*UNBALANCED, *samples(1, True, 1, worn_wrongly=True)], 32, seed=7)
    for number in range(20):
        source.batch(number)
    share = np.mean([sample.worn_wrongly for sample in drawn if sample.label == 1])
    assert share == pytest.approx(fit.WORN_WRONGLY_SHARE, abs=0.03)


def test_faces_of_both_classes_get_the_surroundings_of_any_scene(monkeypatch):
    pairs: list[tuple[int, bool, int | None]] = []

    def remember(sample, rng, *, mask, surroundings):
        pairs.append((sample.label, sample.from_scene, None if surroundings is None else surroundings.label))
        return sample.pixels

    monkeypatch.setattr(fit.augment, "random_crop", remember)
    source = fit.BatchSource(UNBALANCED, 32, seed=6)
    for number in range(20):
        source.batch(number)
    for from_scene, share in ((True, fit.SCENE_PLACED_SHARE), (False, fit.FOLDER_PLACED_SHARE)):
        placed = [other is not None for _, scene, other in pairs if scene == from_scene]
        assert np.mean(placed) == pytest.approx(share, abs=0.05)
    # A with_mask face amid what was around an unmasked one, and the other way round.
    assert {(label, other) for label, _, other in pairs if other is not None} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_one_kind_of_data_is_enough():
    source = fit.BatchSource([*samples(0, True, 4), *samples(1, True, 4)], 32, seed=5)
    assert source.batch(0)[1].sum() == fit.BATCH


def view(name: str, labels: list[int]) -> fit.ValidationView:
    return fit.ValidationView(name, np.zeros((len(labels), 4, 4, 3), np.float32), np.array(labels), [])


def test_validation_counts_classes_alike():
    views = [view("folders", [0] * 9 + [1])]
    # Always says with_mask, at 0.8: all of the nine right, the one wrong.
    loss, accuracy = fit.validation_loss(views, lambda crops: np.tile(np.float32([0.8, 0.2]), (len(crops), 1)))
    assert accuracy == pytest.approx(0.5)
    assert loss == pytest.approx(-(np.log(0.8) + np.log(0.2)) / 2, rel=1e-5)


def test_validation_counts_scenes_as_much_as_all_folder_views_together():
    views = [view("scenes", [0, 1, 1]), view("folders", [0, 1]), view("folders at 20 px", [0, 1])]

    def right_on_scenes(crops):
        right = len(crops) == 3
        return np.float32([[1, 0], [0, 1], [0, 1]] if right else [[0, 1], [1, 0]])

    assert fit.validation_loss(views, right_on_scenes)[1] == pytest.approx(0.5)


def test_a_folder_with_another_training_is_refused(tmp_path):
    (tmp_path / "progress.json").write_text('{"fingerprint": "of something else"}')
    with pytest.raises(MaskwatchError, match="holds a training with other data or settings"):
        fit.fit(UNBALANCED, UNBALANCED, fit.FitSettings(epochs=1), tmp_path)
