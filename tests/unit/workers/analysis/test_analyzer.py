"""The pipeline: what is cropped and classified, what a face says, and that only what is needed is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.domain import MaskStatus, ModelRef
from common.sample.source_images import astronaut
from tests.pipelines import default_spec
from workers.analysis.analyzer import Analyzer
from workers.analysis.load import load_analyzer
from workers.detection import Detections
from workers.inference import Runtime

SPEC = replace(default_spec(), widen_below_px=50, widen_factor=2.0, uncertain_below=0.6)


class FixedDetector:
    def __init__(self, *boxes: tuple[float, float, float, float]) -> None:
        scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
        self.found = Detections(np.array(boxes, np.float32).reshape(-1, 4), scores)

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        return self.found


class FixedClassifier:
    """Gives these probabilities of a mask, one after the other, and keeps the crops it saw."""

    def __init__(self, *p_with_mask: float) -> None:
        self.p = np.array(p_with_mask, np.float32)
        self.calls: list[Sequence[NDArray[np.uint8]]] = []

    def classify(self, crops_rgb: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        self.calls.append(crops_rgb)
        return np.stack([self.p, np.float32(1) - self.p], axis=1)


@pytest.fixture
def image() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (200, 300, 3), dtype=np.uint8)


def test_a_small_face_is_classified_with_its_surroundings_and_stored_as_it_is(image: NDArray[np.uint8]) -> None:
    small, large = (100.0, 100.0, 120.0, 130.0), (10.0, 20.0, 80.0, 110.0)
    classifier = FixedClassifier(0.9, 0.2)
    faces = Analyzer(SPEC, FixedDetector(small, large), classifier).analyze(image)
    assert [(f.x1, f.y1, f.x2, f.y2) for f in faces] == [small, large]
    ((first, second),) = classifier.calls  # one batch for the whole picture
    assert np.array_equal(first, image[85:145, 90:130])
    assert np.array_equal(second, image[20:110, 10:80])


@pytest.mark.parametrize(
    ("p", "status"),
    [
        (0.95, MaskStatus.WITH_MASK),
        (0.61, MaskStatus.WITH_MASK),
        (0.59, MaskStatus.UNCERTAIN),
        (0.5, MaskStatus.UNCERTAIN),
        (0.41, MaskStatus.UNCERTAIN),
        (0.39, MaskStatus.WITHOUT_MASK),
        (0.0, MaskStatus.WITHOUT_MASK),
    ],
)
def test_a_status_follows_from_the_larger_probability(image: NDArray[np.uint8], p: float, status: MaskStatus) -> None:
    (face,) = Analyzer(SPEC, FixedDetector((0, 0, 60, 60)), FixedClassifier(p)).analyze(image)
    assert face.status is status


def test_a_image_without_faces_costs_no_classification(image: NDArray[np.uint8]) -> None:
    classifier = FixedClassifier()
    assert Analyzer(SPEC, FixedDetector(), classifier).analyze(image) == []
    assert classifier.calls == []


@given(st.lists(st.floats(-1e-6, 1 + 1e-6), min_size=1, max_size=8))
def test_probabilities_are_floats_in_range_and_add_up(values: list[float]) -> None:
    boxes = [(float(i), 0.0, i + 10.0, 10.0) for i in range(len(values))]
    analyzer = Analyzer(SPEC, FixedDetector(*boxes), FixedClassifier(*values))
    for face in analyzer.analyze(np.zeros((20, 30, 3), np.uint8)):
        for value in (face.p_face, face.p_with_mask, face.p_without_mask, face.x1, face.y2):
            assert type(value) is float
        assert 0 <= face.p_with_mask <= 1
        assert 0 <= face.p_without_mask <= 1
        assert face.p_with_mask + face.p_without_mask == pytest.approx(1, abs=1e-6)


def test_the_loaded_pipeline_finds_and_judges_a_real_face(ship_brightness: Callable[..., ModelRef]) -> None:
    ship_brightness()
    analyzer = load_analyzer(default_spec(classifier="bright"), Runtime())
    photograph = astronaut()
    (bright,) = analyzer.analyze(photograph)
    (dark,) = analyzer.analyze(photograph // 3)
    assert bright.p_with_mask > dark.p_with_mask  # the stand-in classifier goes by brightness
    assert dark.status is MaskStatus.WITHOUT_MASK
    for face in (bright, dark):
        assert 0 <= face.x1 < face.x2 <= 512
        assert 0 <= face.y1 < face.y2 <= 512
        assert 100 < face.size_px < 150


def test_analysing_needs_neither_a_queue_nor_a_database() -> None:
    code = (
        "import sys, workers.analysis.analyzer, workers.media.images, workers.annotation.drawing,"
        "workers.detection.registry, workers.classification.network_classifier;"
        "print([m for m in ('celery', 'kombu', 'sqlalchemy', 'psycopg', 'tensorflow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
