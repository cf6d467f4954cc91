from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.domain import MaskwatchError
from workers.datasets.dataset import FaceSample
from workers.training import fit, recipes

FIELD = recipes.settings_for(recipes.Recipe.FIELD, "compact")


def faces(count: int) -> list[FaceSample]:
    pixels = np.zeros((40, 40, 3), np.uint8)
    return [FaceSample(pixels, (8, 8, 32, 32), at % 2, 24, False, "flat", f"{at}", f"{at}") for at in range(count)]


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
        fit.fit(faces(64), faces(4), FIELD, tmp_path)


def test_too_few_faces_for_a_batch_are_an_error(tmp_path):
    with pytest.raises(MaskwatchError, match="10 training faces are too few: a batch takes 64"):
        fit.fit(faces(10), faces(4), FIELD, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_patience_ends_a_training_that_no_longer_improves():
    progress = fit.Progress("any", epochs_done=30, best_epoch=12)
    assert not fit.Progress("any", epochs_done=30, best_epoch=20).stopped_early(FIELD)
    assert not progress.stopped_early(recipes.settings_for(recipes.Recipe.NOTEBOOK, "xception"))
    assert fit.Progress("any", epochs_done=30, best_epoch=30 - (FIELD.patience or 0)).stopped_early(FIELD)


def test_patience_waits_for_the_last_size():
    staged = replace(recipes.with_stages(FIELD, recipes.read_stages("64:30,96:10"), None), patience=8)
    assert not fit.Progress("any", epochs_done=20, best_epoch=1).stopped_early(staged)
    assert fit.Progress("any", epochs_done=39, best_epoch=31).stopped_early(staged)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(MaskwatchError, match="is not a record of a training"):
        fit.fit(faces(64), faces(4), FIELD, tmp_path)
