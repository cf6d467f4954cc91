"""RetinaFace's prior boxes and decoding, against their definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.detection._anchors import decode, priors


@pytest.mark.parametrize("size", [(1, 1), (8, 33), (31, 7), (64, 96), (47, 130)])
def test_priors_are_their_definition(size: tuple[int, int]) -> None:
    height, width = size
    expected = [
        [(column + 0.5) * step, (row + 0.5) * step, side]
        for step, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
        for row in range(math.ceil(height / step))
        for column in range(math.ceil(width / step))
        for side in sides
    ]
    assert priors(height, width).tolist() == expected


def test_priors_are_made_once_and_can_not_be_spoilt() -> None:
    assert priors(40, 56) is priors(40, 56)
    with pytest.raises(ValueError, match="read-only"):
        priors(40, 56)[0] = 0


def test_a_location_shifts_the_centre_and_stretches_the_sides() -> None:
    prior = np.array([[100, 60, 32]], np.float32)
    # A quarter of 32 px to the right, half up; twice as wide, half as high.
    location = np.array([[2.5, -5, math.log(2) / 0.2, -math.log(2) / 0.2]], np.float32)
    assert decode(location, prior)[0].tolist() == pytest.approx([108 - 32, 44 - 8, 108 + 32, 44 + 8], abs=1e-4)


def test_no_location_is_the_prior_itself() -> None:
    prior = priors(40, 56)
    boxes = decode(np.zeros((len(prior), 4), np.float32), prior)
    assert np.array_equal(boxes, np.concatenate([prior[:, :2] - prior[:, 2:] / 2, prior[:, :2] + prior[:, 2:] / 2], 1))


@given(st.lists(st.tuples(*[st.floats(-(2.0**127), 2.0**127, width=32)] * 2), min_size=1, max_size=9))
def test_absurd_sizes_do_not_overflow(rows: list[tuple[float, float]]) -> None:
    """A warning would be an error here."""
    locations = np.concatenate([np.zeros((len(rows), 2)), np.array(rows)], axis=1).astype(np.float32)
    boxes = decode(locations, np.full((len(rows), 3), 512, np.float32))
    assert np.isfinite(boxes).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
