"""OpenCV's cascade of Haar features: Viola and Jones, "Rapid Object Detection using a Boosted Cascade of Simple
Features" (CVPR 2001), trained by Rainer Lienhart on frontal faces.

It is here for the comparison. A mask hides what half of its features look at.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, PipelineSpec
from workers.detection import Detections
from workers.detection._ops import MIN_SIDE_PX, clip, has_area
from workers.detection._scaling import resize, scale_for
from workers.inference import Runtime, limit_opencv_threads
from workers.weights.files import read_model

#: Each window is this much larger than the one before, and a face needs this many windows that agree: OpenCV's values.
GROWTH, NEIGHBOURS = 1.1, 3


class Haar:
    """The detector of a pipeline. A score is the logistic function of the margin in the cascade's last stage."""

    def __init__(self, spec: PipelineSpec, content: bytes) -> None:
        """content: the cascade's XML file. Raises `MaskwatchError` if it holds none."""
        self._spec = spec
        self._cascade = cv2.CascadeClassifier()
        try:
            file = cv2.FileStorage(content.decode(), cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
            node = file.getFirstTopLevelNode()
            read, self._stages = self._cascade.read(node), int(node.getNode("stageNum").real())
        except (UnicodeDecodeError, SystemError, cv2.error) as error:
            raise MaskwatchError("the file of the detector haar is no cascade of OpenCV; reinstall it") from error
        if not read:
            raise MaskwatchError("the file of the detector haar holds no cascade of OpenCV; reinstall it")

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3): boxes in its pixels, best score first."""
        height, width = image_rgb.shape[:2]
        scaled, scale_xyxy = resize(image_rgb, scale_for(width, height, self._spec))
        grey = cv2.cvtColor(scaled, cv2.COLOR_RGB2GRAY)
        # When margins are requested, OpenCV also returns windows that failed in one of the last stages: not faces.
        rectangles, stages, margins = self._cascade.detectMultiScale3(
            grey, scaleFactor=GROWTH, minNeighbors=NEIGHBOURS, outputRejectLevels=True
        )
        boxes = np.array(rectangles, np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = clip(boxes / scale_xyxy, width, height)
        scores = to_score(np.array(margins, np.float64).reshape(-1))
        passed = np.array(stages, np.int64).reshape(-1) >= self._stages
        found = np.flatnonzero(
            passed & (scores >= self._spec.detector_threshold) & has_area(boxes, at_least_px=MIN_SIDE_PX)
        )
        order = found[np.argsort(-scores[found], kind="stable")]
        return Detections(boxes[order], scores[order])


def load_haar(spec: PipelineSpec, runtime: Runtime) -> Haar:
    """The detector with the cascade the pipeline pins. It runs on the CPU, whatever the runtime's engine and device.

    Errors as `workers.weights.files.read_files`, and `MaskwatchError` if the file holds no cascade.
    """
    limit_opencv_threads(runtime.threads)
    return Haar(spec, read_model(spec.detector))


def to_score(margins: NDArray[np.float64]) -> NDArray[np.float32]:
    """Margins of the last stage as scores in [0, 1]: 1 / (1 + e^-margin). Monotonic; no probability."""
    return (1 / (1 + np.exp(-margins))).astype(np.float32)
