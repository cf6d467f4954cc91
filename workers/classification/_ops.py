"""Prepares crops for a classifier: pure functions over numpy arrays.

Training prepares its crops with the same functions, so that a network is trained on the same resizing as in production.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def prepare_crop(crop_rgb: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """A crop as a network's input: float32 (side, side, 3), RGB, in [-1, 1].

    crop_rgb: uint8 (h, w, 3), any size from 1×1. The aspect ratio is not kept, as in the notebook that
    this follows. A crop that shrinks is averaged (INTER_AREA), since sampling it would alias; otherwise it is
    bilinear.
    """
    height, width = crop_rgb.shape[:2]
    if height == 0 or width == 0:
        raise ValueError(f"the crop is {width}×{height} pixels; valid: at least 1×1")
    if (height, width) != (side, side):
        shrinks = height * width > side * side
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        resized = cv2.resize(crop_rgb, (side, side), interpolation=interpolation)
    else:
        resized = crop_rgb
    scaled: NDArray[np.float32] = resized.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return scaled


def widen_box(
    box: tuple[float, float, float, float], image_w: int, image_h: int, below_px: float, factor: float
) -> tuple[float, float, float, float]:
    """The box to crop for classification: a small face gets more of its surroundings.

    A box (x1, y1, x2, y2; pixels of the image) whose width or height is below `below_px` grows in both
    directions by `factor` around its centre. The result lies inside the image, whether it grew or not,
    and holds at least one whole pixel when its edges are rounded outwards (see `pixel_box`).
    """
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"box {box} has no area; valid: x1 < x2 and y1 < y2")
    if x2 - x1 < below_px or y2 - y1 < below_px:
        half_w, half_h = (x2 - x1) * factor / 2, (y2 - y1) * factor / 2
        centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
        x1, x2 = centre_x - half_w, centre_x + half_w
        y1, y2 = centre_y - half_h, centre_y + half_h
    x1, x2 = max(0.0, x1), min(float(image_w), x2)
    y1, y2 = max(0.0, y1), min(float(image_h), y2)
    if x2 <= x1 or y2 <= y1:
        raise ValueError(f"box {box} lies outside the picture of {image_w}×{image_h} pixels")
    return x1, y1, x2, y2


def pixel_box(box: tuple[float, float, float, float], image_w: int, image_h: int) -> tuple[int, int, int, int]:
    """The whole pixels a box touches: left, top, right, bottom to slice with, inside the image."""
    left = min(max(0, int(np.floor(box[0]))), image_w - 1)
    top = min(max(0, int(np.floor(box[1]))), image_h - 1)
    right = min(max(left + 1, int(np.ceil(box[2]))), image_w)
    bottom = min(max(top + 1, int(np.ceil(box[3]))), image_h)
    return left, top, right, bottom


def crop_for_classification(
    image_rgb: NDArray[np.uint8], box: tuple[float, float, float, float], below_px: float, factor: float
) -> NDArray[np.uint8]:
    """The pixels of a face as a classifier gets them: `widen_box`, then whole pixels. A view, not a copy."""
    height, width = image_rgb.shape[:2]
    left, top, right, bottom = pixel_box(widen_box(box, width, height, below_px, factor), width, height)
    return image_rgb[top:bottom, left:right]
