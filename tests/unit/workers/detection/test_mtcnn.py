"""MTCNN around its networks: pyramid, windows, shifts and crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain import MaskwatchError, ModelRef
from tests.detector_files import put_in_cache, saved, spec_of
from workers.detection.mtcnn import MAX_CANDIDATES, cut, load_mtcnn, moved, pyramid, squares, windows
from workers.detection.mtcnn_network import NETWORKS, load_weights
from workers.inference import Engine, Runtime


@pytest.fixture
def random_files(cache: Path) -> dict[str, bytes]:
    import torch

    torch.manual_seed(4)
    return {f"{name}.pt": saved(network().state_dict(), prefix="") for name, (network, _) in NETWORKS.items()}


@pytest.fixture
def model(cache: Path, random_files: dict[str, bytes]) -> ModelRef:
    return put_in_cache(cache, "mtcnn", random_files)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_pyramid_goes_from_the_smallest_face_to_the_whole_image(height: int, width: int) -> None:
    scales = pyramid(height, width)
    shorter = min(height, width)
    assert bool(scales) == (shorter >= 20)
    if scales:
        assert scales[0] * 20 == pytest.approx(12)
        assert 12 <= shorter * scales[-1] < 12 / 0.709 + 1e-6
        assert np.allclose(np.divide(scales[1:], scales[:-1]), 0.709)


def test_a_window_is_twelve_pixels_every_two() -> None:
    scores = np.zeros((5, 8), np.float32)
    scores[3, 6] = 0.9
    shifts = np.zeros((4, 5, 8), np.float32)
    shifts[:, 3, 6] = (0.1, 0.2, 0.3, 0.4)
    boxes, found, moves = windows(scores, shifts, 0.6)
    assert boxes.tolist() == [[12, 6, 24, 18]]
    assert found.tolist() == pytest.approx([0.9])
    assert moves[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_windows_by_the_thousand_are_cut_to_the_best() -> None:
    scores = np.linspace(0.7, 0.9, 10_000, dtype=np.float32).reshape(100, 100)
    boxes, found, _ = windows(scores, np.zeros((4, 100, 100), np.float32), 0.6)
    assert len(boxes) == MAX_CANDIDATES
    assert found.min() >= np.sort(scores.ravel())[-MAX_CANDIDATES]


def test_edges_move_in_parts_of_the_box() -> None:
    box = np.array([[10, 20, 30, 60]], np.float32)
    assert moved(box, np.array([[0.5, -0.25, 0, 1]], np.float32)).tolist() == [[20, 10, 30, 100]]


def test_a_square_has_the_same_centre_and_the_longer_side() -> None:
    assert squares(np.array([[10, 20, 30, 60]], np.float32)).tolist() == [[0, 20, 40, 60]]


def test_what_lies_outside_the_image_is_black() -> None:
    image = np.full((20, 30, 3), 200, np.uint8)
    crop = cut(image, np.array([-12, -12, 12, 12], np.float32), 24)
    assert (crop[12:, 12:] == 200).all()
    assert crop.astype(int).sum() == 200 * 3 * 12 * 12
    assert (cut(image, np.array([3, 3, 8, 8], np.float32), 24) == 200).all()


@pytest.mark.parametrize("size", [(1, 1), (20, 1), (21, 35), (64, 47)])
@pytest.mark.parametrize("engine", list(Engine))
def test_every_size_runs_and_gives_boxes_inside(size: tuple[int, int], engine: Engine, model: ModelRef) -> None:
    """Random networks find something nearly everywhere."""
    image = np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)
    boxes = load_mtcnn(spec_of(model, 0.01, enlarge_below_px=0), Runtime(engine)).detect(image).boxes_xyxy
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (size[1], size[0])).all()


def test_networks_in_the_wrong_order_are_refused(random_files: dict[str, bytes], cache: Path) -> None:
    mixed: dict[str, Any] = random_files | {"rnet.pt": random_files["onet.pt"]}
    model = put_in_cache(cache, "mtcnn", mixed)
    with pytest.raises(MaskwatchError, match=r"rnet\.pt of mtcnn is of another network; missing: dense4\.bias"):
        load_mtcnn(spec_of(model), Runtime())
    with pytest.raises(MaskwatchError, match=r"pnet\.pt of mtcnn"):
        load_weights(random_files["rnet.pt"], "pnet")
