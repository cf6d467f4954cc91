"""Widening, cropping and resizing: always inside the picture, never empty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.classification._ops import crop_for_classification, pixel_box, prepare_crop, widen_box

Box = tuple[float, float, float, float]


@st.composite
def boxes_in_images(draw: st.DrawFn) -> tuple[Box, int, int]:
    """A box of at least a hundredth of a pixel, in a picture."""
    width, height = draw(st.integers(1, 4000)), draw(st.integers(1, 4000))
    x1 = draw(st.floats(0, width - 0.01))
    y1 = draw(st.floats(0, height - 0.01))
    x2 = draw(st.floats(x1 + 0.01, width).filter(lambda x: x > x1))
    y2 = draw(st.floats(y1 + 0.01, height).filter(lambda y: y > y1))
    return (x1, y1, x2, y2), width, height


@given(boxes_in_images(), st.floats(0, 500), st.floats(1, 4))
def test_a_widened_box_holds_the_box_and_lies_inside(
    case: tuple[Box, int, int], below_px: float, factor: float
) -> None:
    box, width, height = case
    x1, y1, x2, y2 = widen_box(box, width, height, below_px, factor)
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    near = 1e-6 * max(width, height)
    assert x1 <= box[0] + near
    assert y1 <= box[1] + near
    assert x2 >= box[2] - near
    assert y2 >= box[3] - near


@given(boxes_in_images(), st.floats(0, 500), st.floats(1, 4))
def test_a_crop_is_never_empty(case: tuple[Box, int, int], below_px: float, factor: float) -> None:
    box, width, height = case
    left, top, right, bottom = pixel_box(widen_box(box, width, height, below_px, factor), width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_small_box_grows_around_its_centre() -> None:
    assert widen_box((40, 40, 60, 80), 200, 200, below_px=90, factor=1.5) == (35, 30, 65, 90)


def test_one_short_side_is_enough_to_grow() -> None:
    assert widen_box((50, 50, 70, 150), 200, 200, below_px=90, factor=2) == (40, 0, 80, 200)


def test_a_large_box_stays() -> None:
    assert widen_box((40, 40, 130, 130), 200, 200, below_px=90, factor=1.5) == (40, 40, 130, 130)


def test_at_an_edge_only_the_image_limits_it() -> None:
    assert widen_box((0, 0, 20, 20), 25, 200, below_px=90, factor=2) == (0, 0, 25, 30)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 5, 5, 9), (30, 30, 40, 40)])
def test_a_box_without_pixels_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match=r"no area|outside"):
        widen_box(box, 20, 20, below_px=0, factor=1)


def test_the_crop_is_the_widened_part_of_the_image() -> None:
    image = np.arange(20 * 30 * 3, dtype=np.uint16).astype(np.uint8).reshape(20, 30, 3)
    crop = crop_for_classification(image, (10, 5, 14, 9), below_px=90, factor=1.5)
    assert np.array_equal(crop, image[4:10, 9:15])


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([32, 64]), st.integers(0, 255))
def test_any_crop_becomes_the_networks_input(height: int, width: int, side: int, level: int) -> None:
    prepared = prepare_crop(np.full((height, width, 3), level, np.uint8), side)
    assert prepared.shape == (side, side, 3)
    assert prepared.dtype == np.float32
    assert prepared == pytest.approx(level / 127.5 - 1, abs=1e-6)


def test_the_order_of_colours_stays() -> None:
    crop = np.zeros((10, 10, 3), np.uint8)
    crop[:, :, 0] = 255
    assert prepare_crop(crop, 64)[5, 5].tolist() == [1, -1, -1]


def test_a_shrinking_crop_is_averaged_and_not_sampled() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert prepare_crop(stripes, 64) == pytest.approx(0, abs=0.01)


def test_an_empty_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="0×5"):
        prepare_crop(np.zeros((5, 0, 3), np.uint8), 64)
