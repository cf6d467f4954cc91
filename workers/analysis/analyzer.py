"""Finds and classifies the faces of images on a CPU: detect, widen, crop, classify.

Knows neither queues nor databases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.domain import Face, PipelineSpec
from common.observability import metrics
from common.observability.metrics import Stage
from workers.classification import MaskClassifier
from workers.classification._ops import crop_for_classification
from workers.classification.verdict import face_of
from workers.detection import FaceDetector
from workers.inference.faults import OutOfModelMemoryError, told


class ImageAnalyzer(Protocol):
    """Finds and classifies the faces of images and frames."""

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB image, uint8 (height, width, 3), the surest detection first."""
        ...

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """The faces of each frame, uint8 (height, width, 3), in the order of the frames; as `analyze`."""
        ...


class Analyzer:
    """The pipeline of a `PipelineSpec`, ready to analyse images one after the other."""

    def __init__(self, spec: PipelineSpec, detector: FaceDetector, classifier: MaskClassifier) -> None:
        self.spec = spec
        self._detector = detector
        self._classifier = classifier

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB image, uint8 (height, width, 3), the surest detection first.

        Boxes are the detector's, in pixels of the image and inside it; the classifier sees wider crops
        of small faces. An image without faces gives an empty list. Raises as `workers.inference.faults.told`:
        out of memory for an image that doesn't fit even with its faces classified one by one.
        """
        (faces,) = self.analyze_batch([image_rgb])
        return faces

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """As `analyze`, for several frames, one by one: on a CPU larger batches gain nothing and cost memory, and a
        face's probabilities would depend, in their last digits, on the other faces in the batch."""
        return [self._fit(image_rgb) for image_rgb in frames_rgb]

    def _fit(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        try:
            return told(lambda: self._analyze(image_rgb))
        except OutOfModelMemoryError as error:
            height, width = image_rgb.shape[:2]
            raise OutOfModelMemoryError(
                f"a picture of {width}×{height} pixels doesn't fit the free memory, {error}: run fewer processes, or "
                "plan it with a lower MASKWATCH_PIPELINE__SHRINK_ABOVE_PX"
            ) from error

    def _analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        with metrics.stage(Stage.DETECT):
            found = self._detector.detect(image_rgb)
        boxes = [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in found.boxes_xyxy]
        if not boxes:
            return []
        with metrics.stage(Stage.CLASSIFY):
            crops = [
                crop_for_classification(image_rgb, box, self.spec.widen_below_px, self.spec.widen_factor)
                for box in boxes
            ]
            probabilities = self._classifier.classify(crops)
        return [
            face_of(box, float(score), float(p_with), self.spec.uncertain_below)
            for box, score, (p_with, _) in zip(boxes, found.scores, probabilities, strict=True)
        ]
