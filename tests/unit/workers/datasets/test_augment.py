from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.settings import PipelineSettings
from workers.classification import _ops
from workers.datasets import augment
from workers.datasets.dataset import FaceSample


def face(native_px: int, *, from_scene: bool = True) -> FaceSample:
    side = round(native_px * 2.4)
    edge = (side - native_px) / 2
    pixels = np.random.default_rng(native_px).integers(0, 256, (side, side, 3), np.uint8)
    box = (edge, edge, edge + native_px, edge + native_px)
    return FaceSample(pixels, box, 1, native_px, from_scene, "noise", "noise", "noise")


def test_random_crops_reach_ten_pixels_and_never_enlarge():
    rng = np.random.default_rng(0)
    sample = face(120)
    longer = [max(augment.random_crop(sample, rng).shape[:2]) for _ in range(400)]
    # Widened by half at most, with jitter: a face of 10 px comes in a crop of about 15, one of 120 in one of about 120.
    assert min(longer) < 20
    assert 120 < max(longer) < 120 * 1.5 * 1.6


def test_random_crops_are_the_same_for_the_same_seed():
    crops = [
        augment.random_crop(face(60), np.random.default_rng(5), mask=augment.MaskPosition.OVER_NOSE) for _ in range(2)
    ]
    assert np.array_equal(*crops)


@pytest.mark.parametrize("native_px", [8, 9, 30, 89, 160])
def test_every_random_crop_can_be_prepared(native_px):
    rng = np.random.default_rng(native_px)
    masks = [None, *augment.MaskPosition]
    for turn in range(150):
        crop = augment.random_crop(face(native_px), rng, mask=masks[turn % len(masks)])
        prepared = _ops.prepare_crop(crop, 64)
        assert prepared.shape == (64, 64, 3)
        assert np.abs(prepared).max() <= 1


def test_scene_faces_are_validated_as_production_crops_them():
    production = PipelineSettings()
    for native_px in (40, 100):
        sample = face(native_px)
        cut = _ops.crop_for_classification(
            sample.pixels, sample.box, production.widen_below_px, production.widen_factor
        )
        assert np.array_equal(augment.fixed_crop(sample, None), cut)
    assert augment.fixed_crop(face(100), None).shape[:2] == (100, 100)


@pytest.mark.parametrize(("native_px", "other_px"), [(30, 100), (100, 30), (64, 64)])
def test_a_face_in_other_surroundings_keeps_its_pixels_and_gets_theirs(native_px, other_px):
    light, dark = (
        replace(face(side), pixels=np.full_like(face(side).pixels, grey))
        for side, grey in ((native_px, 200), (other_px, 50))
    )
    pixels, box = augment.placed_in(light.pixels, light.box, dark)
    assert box[2] - box[0] == native_px
    left, top, right, bottom = box
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    across, down = np.abs(columns - (left + right) / 2), np.abs(rows - (top + bottom) / 2)
    # The box is the face's but for its round corners; from FADED_AT on nothing is.
    assert (pixels[(across**2 + down**2) ** 0.5 <= native_px / 2] == 200).all()
    assert (pixels[np.maximum(across, down) >= augment.FADED_AT * native_px / 2] == 50).all()
    between = pixels[(down < 1) & (np.abs(across - native_px * 0.57) < 1)]
    assert ((between > 60) & (between < 190)).all()


def test_folder_faces_are_validated_whole_at_the_asked_size():
    sample = face(100, from_scene=False)
    assert augment.fixed_crop(sample, None).shape == sample.pixels.shape
    assert augment.fixed_crop(sample, 20.0).shape[:2] == (48, 48)


@pytest.mark.parametrize(
    ("position", "covered", "free"),
    [
        ("over_nose", (0.58, 0.88), (0.0, 0.36)),
        ("under_nose", (0.82, 0.98), (0.0, 0.66)),
        ("at_chin", (0.96, 1.02), (0.0, 0.84)),
    ],
)
def test_a_drawn_mask_covers_what_its_position_says(position, covered, free):
    sample = face(100)
    left, top = sample.box[:2]
    columns = slice(round(left + 35), round(left + 65))

    def difference(drawn: np.ndarray, span: tuple[float, float]) -> np.ndarray:
        rows = slice(round(top + 100 * span[0]), round(top + 100 * span[1]))
        return np.abs(sample.pixels[rows, columns].astype(int) - drawn[rows, columns])

    for seed in range(20):
        mask = augment.MaskPosition(position)
        drawn = augment.with_drawn_mask(sample.pixels, sample.box, np.random.default_rng(seed), mask)
        assert (difference(drawn, covered).sum(axis=2).max(axis=1) > 10).all()
        # Cloth lets the face through by a blend of the whole picture, which rounds a value here and there.
        assert difference(drawn, free).max() <= 1
