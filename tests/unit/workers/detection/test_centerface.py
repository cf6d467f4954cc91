"""CenterFace: its decoding on maps made by hand, and the real network on a real photograph."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.sample.source_images import astronaut
from tests.pipelines import default_spec
from workers.detection._ops import iou
from workers.detection._scaling import resize, scale_for
from workers.detection.centerface import CenterFace, decode, load_centerface, to_input, to_labels
from workers.inference import Engine, Runtime

SPEC = default_spec()

#: The face of the photograph, from brow to chin and ear to ear, drawn by hand.
ASTRONAUT_FACE = np.array([[178, 72, 272, 186]], np.float32)


@pytest.fixture(scope="module")
def detector() -> CenterFace:
    return load_centerface(SPEC, Runtime())


@pytest.fixture(scope="module")
def photograph() -> NDArray[np.uint8]:
    return astronaut()


class Session:
    """Stands in for the network: gives the same maps whatever it sees."""

    def __init__(self, heatmap: NDArray[np.float32], log_sizes: float) -> None:
        self.maps = [heatmap[None, None], np.full((1, 2, *heatmap.shape), log_sizes, np.float32)]
        self.maps.append(np.zeros((1, 2, *heatmap.shape), np.float32))

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        assert (batch.shape[2] // 4, batch.shape[3] // 4) == self.maps[0].shape[2:]
        return self.maps


def test_one_cell_becomes_the_box_the_paper_says() -> None:
    heatmap = np.zeros((1, 16, 24), np.float32)
    heatmap[0, 5, 9] = 0.8
    heatmap[0, 1, 1] = 0.2
    log_sizes = np.zeros((2, 16, 24), np.float32)
    log_sizes[:, 5, 9] = np.log([10, 5])  # 40 pixels high, 20 wide
    offsets = np.zeros((2, 16, 24), np.float32)
    offsets[:, 5, 9] = (0.25, -0.5)  # down, left
    boxes, scores = decode(heatmap, log_sizes, offsets, threshold=0.5)
    assert scores.tolist() == pytest.approx([0.8])
    centre_x, centre_y = 4 * (9 - 0.5 + 0.5), 4 * (5 + 0.25 + 0.5)
    assert boxes.tolist() == [pytest.approx([centre_x - 10, centre_y - 20, centre_x + 10, centre_y + 20])]


def test_a_image_that_is_all_face_costs_a_bounded_amount() -> None:
    heatmap = np.linspace(0.4, 0.9, 150 * 150, dtype=np.float32).reshape(1, 150, 150)
    zeros = np.zeros((2, 150, 150), np.float32)
    _, scores = decode(heatmap, zeros, zeros, threshold=0.3)
    assert len(scores) == 5000
    assert scores.min() >= np.sort(heatmap.ravel())[-5000]


@given(st.integers(1, 90), st.integers(1, 90))
def test_the_input_is_padded_at_its_end(width: int, height: int) -> None:
    blob = to_input(np.full((height, width, 3), 200, np.uint8))
    assert blob.shape[:2] == (1, 3)
    assert blob.shape[2] % 32 == blob.shape[3] % 32 == 0
    assert (blob[:, :, :height, :width] == 200).all()
    assert blob.sum() == pytest.approx(200 * 3 * width * height)


def test_boxes_move_from_the_hair_to_the_chin() -> None:
    moved = to_labels(np.array([[10, 20, 60, 120]], np.float32))
    assert moved.tolist() == [[10, 35, 60, 128]]


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1), st.floats(-2, 30))
def test_boxes_always_lie_inside_and_have_area(width: int, height: int, seed: int, log_size: float) -> None:
    """Whatever the network says, also at the edges and at absurd sizes."""
    blank = np.zeros((height, width, 3), np.uint8)
    blob = to_input(resize(blank, scale_for(width, height, SPEC))[0])
    heatmap = np.random.default_rng(seed).random((blob.shape[2] // 4, blob.shape[3] // 4), np.float32) ** 8
    found = CenterFace(SPEC, Session(heatmap, log_size)).detect(blank)  # type: ignore[arg-type]
    boxes = found.boxes_xyxy
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 1).all()
    assert (np.diff(found.scores) <= 0).all()
    assert ((found.scores >= SPEC.detector_threshold) & (found.scores <= 1)).all()


def test_it_finds_the_face_of_the_photograph(detector: CenterFace, photograph: NDArray[np.uint8]) -> None:
    found = detector.detect(photograph)
    assert len(found) == 1
    assert found.scores[0] > 0.8
    assert iou(found.boxes_xyxy, ASTRONAUT_FACE)[0, 0] > 0.8


@pytest.mark.parametrize("size", [(2400, 1800), (300, 260), (128, 128)])
def test_boxes_are_in_pixels_of_the_original(
    detector: CenterFace, photograph: NDArray[np.uint8], size: tuple[int, int]
) -> None:
    resized = np.asarray(cv2.resize(photograph, size, interpolation=cv2.INTER_AREA), np.uint8)
    found = detector.detect(resized)
    assert len(found) == 1
    scale = np.array([size[0] / 512, size[1] / 512] * 2, np.float32)
    assert iou(found.boxes_xyxy, ASTRONAUT_FACE * scale)[0, 0] > 0.7


def test_a_small_face_needs_the_enlargement(detector: CenterFace, photograph: NDArray[np.uint8]) -> None:
    scene = np.full((200, 200, 3), 128, np.uint8)
    scene[60:120, 60:120] = cv2.resize(photograph, (60, 60), interpolation=cv2.INTER_AREA)
    enlarged = detector.detect(scene)
    as_it_is = load_centerface(replace(SPEC, enlarge_limit=1.0), Runtime()).detect(scene)
    assert len(enlarged) == 1  # a face of 11 pixels
    assert as_it_is.scores.max(initial=0) < enlarged.scores[0]


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 3)])
def test_a_sliver_has_no_faces(detector: CenterFace, size: tuple[int, int]) -> None:
    assert len(detector.detect(np.full((*size, 3), 127, np.uint8))) == 0


def test_a_plain_wall_has_no_faces(detector: CenterFace) -> None:
    found = detector.detect(np.full((480, 640, 3), 180, np.uint8))
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.scores.shape == (0,)


def test_torch_finds_the_same_as_onnx_runtime(detector: CenterFace, photograph: NDArray[np.uint8]) -> None:
    pytest.importorskip("torch", reason="the `native` layer is not installed")
    scene = np.full((300, 400, 3), 128, np.uint8)
    scene[20:220, 30:230] = cv2.resize(photograph, (200, 200), interpolation=cv2.INTER_AREA)
    expected = detector.detect(scene)
    found = load_centerface(SPEC, Runtime(Engine.NATIVE)).detect(scene)
    assert len(expected) > 0
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.boxes_xyxy == pytest.approx(expected.boxes_xyxy, abs=0.01)
