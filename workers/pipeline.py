"""From a picture to its faces: detect, widen, crop, classify. Knows neither queues nor databases."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.domain import Face, MaskStatus, PipelineSpec
from workers.classification import MaskClassifier
from workers.classification._ops import crop_for_classification
from workers.detection import FaceDetector
from workers.inference import Runtime, limit_opencv_threads


class PictureAnalyzer(Protocol):
    """Turns pictures into faces."""

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB picture, uint8 (height, width, 3), the surest detection first."""
        ...


class Analyzer:
    """The pipeline of a `PipelineSpec`, ready to analyse pictures one after the other."""

    def __init__(self, spec: PipelineSpec, detector: FaceDetector, classifier: MaskClassifier) -> None:
        self.spec = spec
        self._detector = detector
        self._classifier = classifier

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB picture, uint8 (height, width, 3), the surest detection first.

        Boxes are the detector's, in pixels of the picture and inside it; what the classifier sees is wider
        where a face is small. A picture without faces gives an empty list.
        """
        found = self._detector.detect(image_rgb)
        boxes = [(float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in found.boxes_xyxy]
        crops = [
            crop_for_classification(image_rgb, box, self.spec.widen_below_px, self.spec.widen_factor) for box in boxes
        ]
        if not crops:
            return []
        probabilities = self._classifier.classify(crops)
        return [
            face_of(box, float(score), float(p_with), self.spec.uncertain_below)
            for box, score, (p_with, _) in zip(boxes, found.scores, probabilities, strict=True)
        ]


def load_analyzer(spec: PipelineSpec, runtime: Runtime) -> PictureAnalyzer:
    """The pipeline with its pinned models loaded. On a GPU it is one whose frames stay there.

    Models are loaded once per process. Errors as `workers.weights.read_files`, and `MaskwatchError` if the device
    isn't there.
    """
    # Imported here, so that an analyser made of other models (in tests, say) needs no runtime.
    from workers.classification.registry import load_classifier
    from workers.detection.registry import load_detector

    if runtime.device != "cpu":
        from workers.inference.torch_session import torch_device

        torch_device(runtime)  # says what is missing, torch itself included, before torch is needed
        from workers.device.analyzer import load_device_analyzer

        return load_device_analyzer(spec, runtime)
    limit_opencv_threads(runtime.threads)
    return Analyzer(spec, load_detector(spec, runtime), load_classifier(spec, runtime))


def face_of(
    box_xyxy: tuple[float, float, float, float], score: float, p_with_mask: float, uncertain_below: float
) -> Face:
    """What is recorded of a detection and of what the classifier says of it; both probabilities in or near [0, 1]."""
    # The network's two float32 add up to 1 only nearly: the second follows from the first.
    p_with_mask = min(1.0, max(0.0, p_with_mask))
    p_without_mask = 1.0 - p_with_mask
    if max(p_with_mask, p_without_mask) < uncertain_below:
        status = MaskStatus.UNCERTAIN
    elif p_with_mask >= p_without_mask:
        status = MaskStatus.WITH_MASK
    else:
        status = MaskStatus.WITHOUT_MASK
    x1, y1, x2, y2 = box_xyxy
    return Face(x1, y1, x2, y2, min(1.0, max(0.0, score)), p_with_mask, p_without_mask, status)
