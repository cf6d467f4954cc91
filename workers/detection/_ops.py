"""Geometry of boxes: pure functions over numpy arrays. Boxes are xyxy, float32 (n, 4), in pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]

#: Boxes thinner than this, after they were cut at the image's edge, don't count as faces. Pixels of the original.
MIN_SIDE_PX = 1.0


def clip(boxes_xyxy: Boxes, width: float, height: float) -> Boxes:
    """The boxes cut at the edges of an image of width × height pixels."""
    clipped = boxes_xyxy.astype(np.float32, copy=True)
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, width)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, height)
    return clipped


def has_area(boxes_xyxy: Boxes, at_least_px: float = 0.0) -> NDArray[np.bool_]:
    """Which boxes, (n,), are finite and have both sides longer than `at_least_px`."""
    finite = np.isfinite(boxes_xyxy).all(axis=1)
    wide = boxes_xyxy[:, 2] - boxes_xyxy[:, 0] > at_least_px
    tall = boxes_xyxy[:, 3] - boxes_xyxy[:, 1] > at_least_px
    result: NDArray[np.bool_] = finite & wide & tall
    return result


def iou(a_xyxy: Boxes, b_xyxy: Boxes) -> NDArray[np.float32]:
    """Intersection over union of every box of a with every box of b: float32 (len(a), len(b)).

    0 where boxes don't meet, and where both are empty.
    """
    both = _intersections(a_xyxy, b_xyxy)
    either = _areas(a_xyxy)[:, None] + _areas(b_xyxy)[None, :] - both
    return _ratio(both, either)


def nms(boxes_xyxy: Boxes, scores: NDArray[np.float32], max_iou: float) -> NDArray[np.intp]:
    """Greedy non-maximum suppression: indices of the boxes to keep, best score first.

    A box is dropped if it overlaps a better one that is kept by `max_iou` or more. Equal scores keep the
    order of the input, so the result doesn't depend on the machine.
    """
    return _suppress(boxes_xyxy, scores, max_iou, iou)


def nms_by_smaller(boxes_xyxy: Boxes, scores: NDArray[np.float32], max_share: float) -> NDArray[np.intp]:
    """As `nms`, but an overlap is a share of the smaller box, so that a box inside another one is dropped, too."""
    return _suppress(boxes_xyxy, scores, max_share, _shares)


def _suppress(
    boxes_xyxy: Boxes,
    scores: NDArray[np.float32],
    limit: float,
    overlaps: Callable[[Boxes, Boxes], NDArray[np.float32]],
) -> NDArray[np.intp]:
    left = np.argsort(-scores, kind="stable")
    kept: list[np.intp] = []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[overlaps(boxes_xyxy[best : best + 1], boxes_xyxy[left])[0] < limit]
    return np.array(kept, dtype=np.intp)


def _shares(a_xyxy: Boxes, b_xyxy: Boxes) -> NDArray[np.float32]:
    """Intersection as a share of the smaller box: float32 (len(a), len(b)); 0 where one is empty."""
    both = _intersections(a_xyxy, b_xyxy)
    smaller = np.minimum(_areas(a_xyxy)[:, None], _areas(b_xyxy)[None, :])
    return _ratio(both, smaller)


def _intersections(a_xyxy: Boxes, b_xyxy: Boxes) -> NDArray[np.float32]:
    top_left = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    bottom_right = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    sides = (bottom_right - top_left).clip(min=0)
    both: NDArray[np.float32] = sides[:, :, 0] * sides[:, :, 1]
    return both


def _ratio(part: NDArray[np.float32], whole: NDArray[np.float32]) -> NDArray[np.float32]:
    ratio = np.zeros_like(part)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _areas(boxes_xyxy: Boxes) -> NDArray[np.float32]:
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(min=0)
    areas: NDArray[np.float32] = sides[:, 0] * sides[:, 1]
    return areas
