"""Haar and HOG: the old detectors behind the same protocol, with scores in [0, 1]."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from common.domain import MaskwatchError
from common.models.manifest import MODELS
from common.sample.source_images import astronaut
from tests.detector_files import spec_of
from workers.detection import FaceDetector, haar, hog
from workers.detection._ops import iou
from workers.detection.registry import load_detector
from workers.inference import Runtime

NAMES = ("haar", "hog")
FACE = np.array([[178, 72, 272, 186]], np.float32)


def detector(name: str, threshold: float | None = None) -> FaceDetector:
    if name == "hog":
        pytest.importorskip("dlib", reason="the layer `native` is not installed")
    model = MODELS[name]
    return load_detector(spec_of(model.ref, threshold or model.threshold or 0), Runtime())


@pytest.fixture(scope="module")
def photograph() -> NDArray[np.uint8]:
    return astronaut()


@pytest.mark.parametrize("name", NAMES)
def test_the_face_of_the_photograph_is_the_surest_find(name: str, photograph: NDArray[np.uint8]) -> None:
    found = detector(name).detect(photograph)
    assert iou(found.boxes_xyxy, FACE)[0, 0] > 0.5
    assert 0.7 < found.scores[0] < 1
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= 512).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_threshold_is_of_the_score(name: str, photograph: NDArray[np.uint8]) -> None:
    """A lower one finds more, and the surest stay as they are."""
    many, few = detector(name, 0.2).detect(photograph), detector(name, 0.6).detect(photograph)
    assert many.scores.min() >= 0.2
    assert few.scores.min() >= 0.6
    assert iou(few.boxes_xyxy[:1], many.boxes_xyxy[:1])[0, 0] > 0.99
    assert len(detector(name, 0.9999).detect(photograph)) == 0


def test_a_lower_threshold_of_hog_finds_more(photograph: NDArray[np.uint8]) -> None:
    assert len(detector("hog", 0.15).detect(photograph)) > len(detector("hog", 0.5).detect(photograph))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (240, 320)])
def test_there_are_no_faces_on_a_wall(name: str, size: tuple[int, int]) -> None:
    found = detector(name).detect(np.full((*size, 3), 120, np.uint8))
    assert found.boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize("to_score", [haar.to_score, hog.to_score])
def test_scores_rise_with_the_margin_and_stay_below_one(to_score: object) -> None:
    assert callable(to_score)
    scores = to_score(np.linspace(-8, 8, 50))
    assert (np.diff(scores) > 0).all()
    assert 0 < scores[0] < scores[-1] < 1


def test_a_margin_is_what_its_score_says() -> None:
    for score in (0.1, 0.35, 0.5, 0.9):
        assert hog.to_score(np.array([hog.to_margin(score)]))[0] == pytest.approx(score)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"<?xml version='1.0'?><opencv_storage></opencv_storage>"])
def test_a_file_that_is_no_cascade_is_refused(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MaskwatchError, match="cascade of OpenCV; reinstall"):
        haar.Haar(spec_of(MODELS["haar"].ref), content)
