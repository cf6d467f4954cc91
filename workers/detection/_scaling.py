"""Scales an image for detection, in the same way for all of our detectors, as the pipeline pins it."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import PipelineSpec


def scale_for(width: int, height: int, spec: PipelineSpec) -> float:
    """The factor by which an image is enlarged (> 1) or scaled down (< 1) before detection."""
    longer = max(width, height)
    if longer < spec.enlarge_below_px:
        return min(spec.enlarge_limit, spec.enlarge_below_px / longer)
    if longer > spec.shrink_above_px:
        return spec.shrink_above_px / longer
    return 1.0


def resize(image_rgb: NDArray[np.uint8], scale: float) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The image, uint8 (h, w, 3), at this scale, and the scale that was actually applied: float32 (4,) x, y, x, y.

    Sides are whole pixels, at least one. A scale of 1 returns the image itself.
    """
    height, width = image_rgb.shape[:2]
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    if (new_width, new_height) != (width, height):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image_rgb = np.asarray(cv2.resize(image_rgb, (new_width, new_height), interpolation=interpolation), np.uint8)
    return image_rgb, np.array([new_width / width, new_height / height] * 2, np.float32)
