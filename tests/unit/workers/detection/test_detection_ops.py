"""Boxes: clipping, IoU and suppression, against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.detection._ops import clip, has_area, iou, nms

Boxes = NDArray[np.float32]


@st.composite
def scored_boxes(draw: st.DrawFn) -> tuple[Boxes, NDArray[np.float32]]:
    """Up to 25 boxes on a coarse grid, so that many overlap, some are equal, and scores tie."""
    count = draw(st.integers(0, 25))
    corner = st.integers(0, 12)
    rows = [
        [x, y, x + draw(st.integers(1, 8)), y + draw(st.integers(1, 8))]
        for x, y in (draw(st.tuples(corner, corner)) for _ in range(count))
    ]
    scores = draw(st.lists(st.sampled_from([0.3, 0.5, 0.7, 0.9]), min_size=count, max_size=count))
    return np.array(rows, np.float32).reshape(-1, 4), np.array(scores, np.float32)


def plain_iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return float(both / either)


def plain_nms(boxes: Boxes, scores: NDArray[np.float32], max_iou: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(plain_iou(boxes[i], boxes[k]) < max_iou for k in kept):
            kept.append(i)
    return kept


@given(scored_boxes(), scored_boxes())
def test_iou_is_its_definition(a: tuple[Boxes, object], b: tuple[Boxes, object]) -> None:
    found = iou(a[0], b[0])
    assert found.shape == (len(a[0]), len(b[0]))
    for i, box in enumerate(a[0]):
        for j, other in enumerate(b[0]):
            assert found[i, j] == pytest.approx(plain_iou(box, other), abs=1e-6)


def test_iou_of_nothing_is_nought() -> None:
    point = np.array([[3, 3, 3, 3]], np.float32)
    assert iou(point, point).tolist() == [[0]]


@given(scored_boxes(), st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_nms_is_its_definition(case: tuple[Boxes, NDArray[np.float32]], max_iou: float) -> None:
    boxes, scores = case
    assert nms(boxes, scores, max_iou).tolist() == plain_nms(boxes, scores, max_iou)


@given(scored_boxes())
def test_what_nms_keeps_hardly_overlaps_and_what_it_drops_does(
    case: tuple[Boxes, NDArray[np.float32]],
) -> None:
    boxes, scores = case
    kept = nms(boxes, scores, 0.3)
    overlaps = iou(boxes[kept], boxes[kept])
    assert (overlaps[~np.eye(len(kept), dtype=bool)] < 0.3).all()
    dropped = np.setdiff1d(np.arange(len(boxes)), kept)
    if dropped.size:
        assert (iou(boxes[dropped], boxes[kept]).max(axis=1) >= 0.3).all()


coordinates = st.floats(-1e6, 1e6, width=32) | st.sampled_from([np.inf, -np.inf, np.nan])


@given(st.lists(st.tuples(*[coordinates] * 4), max_size=20), st.integers(1, 500), st.integers(1, 500))
def test_clipped_boxes_with_area_lie_inside(rows: list[tuple[float, ...]], width: int, height: int) -> None:
    clipped = clip(np.array(rows, np.float32).reshape(-1, 4), width, height)
    left = clipped[has_area(clipped)]
    assert (left[:, :2] >= 0).all()
    assert (left[:, 2] <= width).all()
    assert (left[:, 3] <= height).all()
    assert (left[:, 2:] > left[:, :2]).all()


def test_clipping_leaves_the_boxes_it_was_given() -> None:
    boxes = np.array([[-5, -5, 50, 50]], np.float32)
    assert clip(boxes, 20, 10).tolist() == [[0, 0, 20, 10]]
    assert boxes.tolist() == [[-5, -5, 50, 50]]


def test_thin_boxes_have_no_area() -> None:
    boxes = np.array([[0, 0, 1, 9], [0, 0, 9, 1], [0, 0, 2, 2], [5, 5, 3, 9]], np.float32)
    assert has_area(boxes).tolist() == [True, True, True, False]
    assert has_area(boxes, at_least_px=1.5).tolist() == [False, False, True, False]
