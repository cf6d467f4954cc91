"""Geometry of boxes: pure functions over numpy arrays. Boxes are xyxy, float32 (n, 4), in pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]

#: Boxes thinner than this, after they were cut at the picture's edge, are no faces. Pixels of the original.
MIN_SIDE_PX = 1.0


def clip(boxes_xyxy: Boxes, width: float, height: float) -> Boxes:
    """The boxes cut at the edges of a picture of width × height pixels."""
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
    top_left = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    bottom_right = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    overlaps = (bottom_right - top_left).clip(min=0)
    both: NDArray[np.float32] = overlaps[:, :, 0] * overlaps[:, :, 1]
    either = _areas(a_xyxy)[:, None] + _areas(b_xyxy)[None, :] - both
    ratio = np.zeros_like(both)
    np.divide(both, either, out=ratio, where=either > 0)
    return ratio


def nms(boxes_xyxy: Boxes, scores: NDArray[np.float32], max_iou: float) -> NDArray[np.intp]:
    """Greedy non-maximum suppression: indices of the boxes to keep, best score first.

    A box is dropped if it overlaps a better one that is kept by `max_iou` or more. Equal scores keep the
    order of the input, so the result doesn't depend on the machine.
    """
    left = np.argsort(-scores, kind="stable")
    kept: list[np.intp] = []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[iou(boxes_xyxy[best : best + 1], boxes_xyxy[left])[0] < max_iou]
    return np.array(kept, dtype=np.intp)


def _areas(boxes_xyxy: Boxes) -> NDArray[np.float32]:
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(min=0)
    areas: NDArray[np.float32] = sides[:, 0] * sides[:, 1]
    return areas
