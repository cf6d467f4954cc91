"""From pictures and video frames to their faces: detect, widen, crop, classify, link.

Knows neither queues nor databases.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.domain import Face, FrameFaces, MaskStatus, PipelineSpec
from common.observability import metrics
from common.observability.metrics import Stage
from workers.analysis.tracking import FaceTracker
from workers.classification import MaskClassifier
from workers.classification._ops import crop_for_classification
from workers.detection import FaceDetector
from workers.inference import Runtime, limit_opencv_threads
from workers.inference.faults import OutOfModelMemoryError, told
from workers.media.prefetch import ahead


class PictureAnalyzer(Protocol):
    """Turns pictures into faces."""

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB picture, uint8 (height, width, 3), the surest detection first."""
        ...

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """The faces of each frame, uint8 (height, width, 3), in the order of the frames; as `analyze`."""
        ...


@dataclass(frozen=True, slots=True)
class Picture:
    """A frame of a video as it is analysed. rgb: uint8 (height, width, 3), upright. at, covers: seconds, exact."""

    rgb: NDArray[np.uint8]
    #: When it is shown, from the start of the file.
    at: Fraction
    #: The part of the video that it stands for.
    covers: Fraction


class Analyzer:
    """The pipeline of a `PipelineSpec`, ready to analyse pictures one after the other."""

    def __init__(self, spec: PipelineSpec, detector: FaceDetector, classifier: MaskClassifier) -> None:
        self.spec = spec
        self._detector = detector
        self._classifier = classifier

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB picture, uint8 (height, width, 3), the surest detection first.

        Boxes are the detector's, in pixels of the picture and inside it; what the classifier sees is wider
        where a face is small. A picture without faces gives an empty list. Raises as `workers.inference.faults.told`:
        out of memory for a picture that doesn't fit even with its faces classified one by one.
        """
        (faces,) = self.analyze_batch([image_rgb])
        return faces

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """As `analyze`, for several frames. One by one: on a CPU larger batches gain nothing and cost memory, and a
        face's probabilities would depend, in their last digits, on its neighbours in the batch."""
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


def analyze_frames(
    pictures: Iterable[Picture],
    analyzer: PictureAnalyzer,
    frames_per_second: float,
    *,
    buffer_bytes: int,
    batch: int,
) -> Generator[FrameFaces, None, None]:
    """The faces of a video's frames, in their order, linked into tracks.

    Frames are read and decoded in a thread of their own, up to `buffer_bytes` ahead (one frame at least), while the
    ones before them are analysed; those of one size that wait are analysed together, `batch` at most. What the other
    thread raises is raised here, after the frames that came before.
    """
    tracker = FaceTracker(frames_per_second)
    groups = ahead(
        pictures,
        size_of=lambda picture: picture.rgb.nbytes,
        alike=lambda a, b: a.rgb.shape == b.rgb.shape,
        max_size=buffer_bytes,
        max_items=batch,
    )
    with closing(groups):
        for group in groups:
            faces = analyzer.analyze_batch([picture.rgb for picture in group])
            for picture, found in zip(group, faces, strict=True):
                at = float(picture.at)
                yield FrameFaces(at, float(picture.covers), tuple(found), tuple(tracker.update(found, at)))


def load_analyzer(spec: PipelineSpec, runtime: Runtime) -> PictureAnalyzer:
    """The pipeline with its pinned models loaded. On a GPU it is one whose frames stay there.

    Models are loaded once per process. Errors as `workers.weights.files.read_files`, and `MaskwatchError` if the device
    isn't there.
    """
    # Imported here, so that an analyser made of other models (in tests, say) needs no runtime.
    from workers.classification.registry import load_classifier
    from workers.detection.registry import load_detector

    if runtime.device != "cpu":
        # Imported here: torch is not installed everywhere.
        from workers.inference.torch_session import torch_device

        torch_device(runtime)  # says what is missing, torch itself included, before torch is needed
        # Imported here: torch is not installed everywhere.
        from workers.analysis.device.analyzer import load_device_analyzer

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
