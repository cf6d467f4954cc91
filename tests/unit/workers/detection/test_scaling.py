"""How pictures are enlarged and scaled down before detection: within the pipeline's limits, and truly told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pipelines import default_spec
from workers.detection._scaling import resize, scale_for

SPEC = default_spec()


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_scale_keeps_to_the_limits(width: int, height: int) -> None:
    scale = scale_for(width, height, SPEC)
    longer = max(width, height)
    assert scale * longer <= SPEC.shrink_above_px + 1e-6
    assert scale <= SPEC.enlarge_limit
    if longer < SPEC.enlarge_below_px:
        assert scale > 1
        assert scale == SPEC.enlarge_limit or scale * longer == pytest.approx(SPEC.enlarge_below_px)
    elif longer <= SPEC.shrink_above_px:
        assert scale == 1


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([0.01, 0.3, 1.0, 1.5, 2.0]))
def test_the_scale_that_is_told_is_the_one_applied(width: int, height: int, scale: float) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    resized, (scale_x, scale_y, *again) = resize(image, scale)
    assert (resized == 200).all()
    assert resized.shape == (max(1, round(height * scale)), max(1, round(width * scale)), 3)
    assert resized.shape[1] == pytest.approx(width * scale_x)
    assert resized.shape[0] == pytest.approx(height * scale_y)
    assert again == [scale_x, scale_y]
    assert (resized is image) == (scale == 1 or resized.shape == image.shape)
