from __future__ import annotations

import json

import numpy as np
import pytest

from common.domain import MaskwatchError
from workers.detection import Detections
from workers.evaluation.detectors import evaluate_detector


class Scripted:
    """A detector that finds the same boxes in every picture: those that reach its threshold."""

    def __init__(self, threshold: float, *found: tuple[float, tuple[float, float, float, float]]) -> None:
        kept = [(score, box) for score, box in sorted(found, reverse=True) if score >= threshold]
        self._detections = Detections(
            np.array([box for _, box in kept], np.float32).reshape(-1, 4), np.array([s for s, _ in kept], np.float32)
        )
        self.calls = 0

    def detect(self, image_rgb: np.ndarray) -> Detections:
        self.calls += 1
        return self._detections


#: A face of 40 px, an empty place, and a face of 12 px that only a low threshold brings.
FOUND = ((0.9, (10, 10, 50, 50)), (0.6, (150, 60, 190, 100)), (0.1, (100, 10, 112, 22)))


@pytest.fixture
def scene(tmp_path, write_scene):
    write_scene(tmp_path, "a", [("with_mask", (10, 10, 50, 50)), ("without_mask", (100, 10, 112, 22))])
    return tmp_path


def test_recall_and_precision_are_at_the_detectors_own_threshold_and_the_curve_goes_below(scene):
    chosen, low = Scripted(0.5, *FOUND), Scripted(0.02, *FOUND)
    results = evaluate_detector(scene, chosen, low, 10**6)
    summary = results.summary()
    assert (summary["detections"], summary["recall"], summary["precision"]) == (2, 0.5, 0.5)
    assert (summary["sizes"]["32–64"]["recall"], summary["sizes"]["<16"]["recall"]) == (1, 0)
    assert summary["sizes"]["24–32"] == {"labelled": 0, "recall": None}
    recalls, precisions = results.curve()
    assert (recalls, precisions) == ([0.5, 0.5, 1.0], pytest.approx([1, 1 / 2, 2 / 3]))
    assert summary["average_precision"] == pytest.approx(0.5 + 0.5 * 2 / 3)
    json.dumps(summary)


def test_the_first_image_warms_up_and_is_not_measured_twice(scene, write_scene):
    write_scene(scene, "b", [("with_mask", (10, 10, 50, 50))])
    chosen, low = Scripted(0.5, *FOUND), Scripted(0.02, *FOUND)
    results = evaluate_detector(scene, chosen, low, 10**6)
    assert (chosen.calls, low.calls, len(results.seconds)) == (3, 2, 2)
    assert results.summary()["images"] == 2


def test_a_detector_that_finds_nothing_has_recall_0_and_no_precision(scene):
    summary = evaluate_detector(scene, Scripted(0.5), Scripted(0.02), 10**6).summary()
    assert (summary["recall"], summary["precision"], summary["average_precision"]) == (0, None, 0)


def test_unreadable_images_are_named_and_a_folder_of_nothing_else_refused(scene, write_scene):
    write_scene(scene, "broken", [("with_mask", (10, 10, 50, 50))])
    (scene / "images" / "broken.png").write_bytes(b"no picture")
    results = evaluate_detector(scene, Scripted(0.5, *FOUND), Scripted(0.02, *FOUND), 10**6)
    assert [name for name, _ in results.unreadable] == ["broken.png"]
    assert len(results.seconds) == 1
    (scene / "images" / "a.png").unlink()
    with pytest.raises(MaskwatchError, match="none of the 1 pictures"):
        evaluate_detector(scene, Scripted(0.5), Scripted(0.02), 10**6)
