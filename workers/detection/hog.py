"""dlib's frontal face detector: histograms of oriented gradients and a linear classifier, as in 2005.

King, "Max-Margin Object Detection" (arXiv 1502.00046). It is here for the comparison: it needs faces of about
40 pixels that look into the camera.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, PipelineSpec
from workers.detection import Detections
from workers.detection._ops import MIN_SIDE_PX, clip, has_area
from workers.detection._scaling import resize, scale_for
from workers.inference import Runtime
from workers.weights import files

#: How often the picture is doubled before the search, beside the pipeline's own enlarging: the detector's window has
#: 80 pixels, so once finds faces of 40.
UPSAMPLE = 1


class Hog:
    """The detector of a pipeline. Scores are the logistic function of dlib's; 0.5 is dlib's own threshold, at which it
    finds half as many faces in crowds as at the manifest's."""

    def __init__(self, spec: PipelineSpec, detector: Any) -> None:
        self._spec = spec
        self._detector = detector

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3): boxes in its pixels, best score first."""
        height, width = image_rgb.shape[:2]
        scaled, scale_xyxy = resize(image_rgb, scale_for(width, height, self._spec))
        adjust = to_margin(self._spec.detector_threshold)
        rectangles, margins, _ = self._detector.run(np.ascontiguousarray(scaled), UPSAMPLE, adjust)
        # dlib's right and bottom are the last pixels inside.
        corners = [(r.left(), r.top(), r.right() + 1, r.bottom() + 1) for r in rectangles]
        boxes = clip(np.array(corners, np.float32).reshape(-1, 4) / scale_xyxy, width, height)
        scores = to_score(np.array(margins, np.float64))
        whole = np.flatnonzero(has_area(boxes, at_least_px=MIN_SIDE_PX))
        order = whole[np.argsort(-scores[whole], kind="stable")]
        return Detections(boxes[order], scores[order])


def load_hog(spec: PipelineSpec, runtime: Runtime) -> Hog:
    """The detector that is compiled into the pinned dlib. It runs on one core of the CPU, whatever the runtime.

    Raises `MaskwatchError` where dlib isn't installed, or is another version than the pinned one.
    """
    files.require(spec.detector)
    try:
        import dlib
    except ModuleNotFoundError as error:
        raise MaskwatchError("the detector hog needs dlib: pip install 'maskwatch[native]'") from error
    return Hog(spec, dlib.get_frontal_face_detector())


def to_score(margins: NDArray[np.float64]) -> NDArray[np.float32]:
    """Distances from dlib's separating plane as scores in [0, 1]: 1 / (1 + e^-margin). Monotonic; no probability."""
    return (1 / (1 + np.exp(-margins))).astype(np.float32)


def to_margin(score: float) -> float:
    """What `to_score` makes this score of."""
    return math.log(score / (1 - score))
