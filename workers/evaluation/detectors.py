"""Measures face detectors on the same labelled scenes: recall per face size, precision, and time.

The rules are those of `faces`; `workers/cli/evaluate_detectors.py` chooses the detectors, loads them and prints.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from workers.datasets.annotations import Box, LabelledBox
from workers.detection import Detections, FaceDetector
from workers.evaluation.faces import COMBINED_BINS, SIZE_BINS, ScoredDetections, match, ratio
from workers.evaluation.scenes import check_scenes, read_scenes

#: The score from which detections enter the curve of precision over recall: what the authors of RetinaFace's
#: PyTorch version evaluate WIDER FACE with (biubug6/Pytorch_Retinaface, test_widerface.py).
CURVE_FROM = 0.02


@dataclass(slots=True)
class DetectorResults:
    """The results of one detector on the scenes.

    found: whether each labelled face was found at the detector's own threshold; at_threshold: all detections at that
    threshold; down_to_curve: all detections with a score of at least `CURVE_FROM`; seconds: one per image.
    """

    labelled: list[LabelledBox] = field(default_factory=list)
    found: list[bool] = field(default_factory=list)
    at_threshold: ScoredDetections = field(default_factory=ScoredDetections)
    down_to_curve: ScoredDetections = field(default_factory=ScoredDetections)
    seconds: list[float] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def add(
        self, labelled: list[LabelledBox], at_threshold: Detections, down_to_curve: Detections, seconds: float
    ) -> None:
        """Counts one image, detected twice: at the detector's own threshold, in `seconds`, and down to `CURVE_FROM`."""
        self.labelled += labelled
        self.seconds.append(seconds)
        scores = at_threshold.scores.tolist()
        matched = match(labelled, _boxes(at_threshold), scores)
        self.at_threshold.add(scores, matched)
        self.found += [index is not None for index in matched]
        scores = down_to_curve.scores.tolist()
        self.down_to_curve.add(scores, match(labelled, _boxes(down_to_curve), scores))

    def summary(self) -> dict[str, Any]:
        """All figures, ready for JSON. A ratio with nothing to count is None."""
        sizes = np.array([entry.size_px for entry in self.labelled])
        found = np.array(self.found, bool)
        within = {name: (low <= sizes) & (sizes < high) for name, (low, high) in {**SIZE_BINS, **COMBINED_BINS}.items()}
        return {
            "images": len(self.seconds),
            "labelled_faces": len(self.labelled),
            "detections": len(self.at_threshold),
            "recall": ratio(int(found.sum()), len(found)),
            "precision": ratio(int(found.sum()), len(self.at_threshold)),
            "average_precision": self.down_to_curve.average_precision(len(self.labelled)),
            "sizes": {
                name: {"labelled": int(chosen.sum()), "recall": ratio(int(found[chosen].sum()), int(chosen.sum()))}
                for name, chosen in within.items()
            },
            "median_ms": 1000 * statistics.median(self.seconds),
        }

    def curve(self) -> tuple[list[float], list[float]]:
        """(recalls, precisions) from the highest score down to `CURVE_FROM`."""
        return self.down_to_curve.curve(len(self.labelled))


def evaluate_detector(
    folder: Path,
    at_threshold: FaceDetector,
    down_to_curve: FaceDetector,
    max_pixels: int,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> DetectorResults:
    """Runs one detector on every image of a scene folder, at its own threshold and again at `CURVE_FROM`.

    Twice, because a low threshold gives a detector more boxes to sort out, which would distort the measured time. The
    first image is detected once beforehand, as a warm-up. Raises `MaskwatchError` as `evaluate_scenes`.
    """
    results = DetectorResults()
    for scene in read_scenes(folder, max_pixels, results.unreadable, on_image):
        if not results.seconds:
            at_threshold.detect(scene.image_rgb)
        start = time.perf_counter()
        found = at_threshold.detect(scene.image_rgb)
        seconds = time.perf_counter() - start
        results.add(scene.labelled, found, down_to_curve.detect(scene.image_rgb), seconds)
    check_scenes(folder, len(results.seconds), len(results.labelled), results.unreadable)
    return results


def _boxes(detections: Detections) -> list[Box]:
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in detections.boxes_xyxy.tolist()]
