"""Both engines say the same: ONNX Runtime, and the frameworks the models were made with. Prints the largest difference.

RetinaFace and MTCNN, whose weights don't ship, are compared in test_detectors_equal_fdet.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from common.domain import Face
from common.models.manifest import MODELS, ModelKind
from tests.photos import portrait
from tests.pipelines import default_spec
from workers.analysis.load import load_analyzer
from workers.classification.registry import load_classifier
from workers.inference import Engine, Runtime

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("tensorflow", "torch")),
        reason="the `native` layer is not installed",
    ),
]

CLASSIFIERS = sorted(model.name for model in MODELS.values() if model.kind is ModelKind.CLASSIFIER)
ONNX, NATIVE = Runtime(Engine.ONNX), Runtime(Engine.NATIVE)

#: What the two may differ in: a probability, and a coordinate of a box in pixels.
PROBABILITY, BOX_PX = 1e-3, 1.0


def crops() -> list[NDArray[np.uint8]]:
    """A face and its parts at many sizes, dark, bright and noisy."""
    photo = np.asarray(portrait().convert("RGB"))
    rng = np.random.default_rng(5)
    found = []
    for number in range(40):
        side = int(rng.integers(12, 160))
        top, left = rng.integers(0, 256 - side, 2)
        crop = photo[top : top + side, left : left + side].astype(np.float32) * rng.uniform(0.3, 1.5)
        if number % 2:
            crop = crop + rng.normal(0, 20, crop.shape)
        found.append(crop.clip(0, 255).astype(np.uint8))
    return found


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    with capsys.disabled():
        print("".join(f"\n  {line}" for line in lines))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_shipped_classifier_answers_the_same_in_keras(name: str, report: list[str]) -> None:
    spec = default_spec(classifier=name)
    onnx, native = (load_classifier(spec, runtime).classify(crops()) for runtime in (ONNX, NATIVE))
    assert onnx[:, 0].std() > 0.01, "equal answers to everything would agree with anything"
    difference = float(np.abs(onnx - native).max())
    report.append(f"{name}: largest difference of a probability {difference:.1e}")
    assert difference < PROBABILITY


def corners(faces: list[Face]) -> NDArray[np.float64]:
    return np.array([(face.x1, face.y1, face.x2, face.y2) for face in faces])


def test_the_whole_pipeline_finds_the_same_faces(report: list[str]) -> None:
    photo = np.asarray(portrait(512).convert("RGB"))
    crowd = np.concatenate([np.concatenate([photo, photo[:, ::-1]], 1), np.concatenate([photo // 2, photo], 1)], 0)
    spec = default_spec()
    onnx, native = (load_analyzer(spec, runtime).analyze(np.ascontiguousarray(crowd)) for runtime in (ONNX, NATIVE))
    assert len(onnx) == len(native) >= 4
    boxes = float(np.abs(corners(onnx) - corners(native)).max())
    masks = max(abs(left.p_with_mask - right.p_with_mask) for left, right in zip(onnx, native, strict=True))
    report.append(f"centerface and {spec.classifier.name}: boxes within {boxes:.1e} px, probabilities {masks:.1e}")
    assert boxes < BOX_PX
    assert masks < PROBABILITY


def test_another_rounding_of_the_weights_would_be_noticed() -> None:
    """The control: weights of eight bits are too far off."""
    from workers.classification.keras_session import KerasSession, to_keras
    from workers.classification.network_classifier import NetworkMaskClassifier
    from workers.weights.files import read_model

    spec = default_spec()
    model = to_keras(read_model(spec.classifier), "rounded")
    model.set_weights([np.round(weights * 16) / 16 for weights in model.get_weights()])
    rounded = NetworkMaskClassifier(KerasSession(model, "/CPU:0")).classify(crops())
    assert np.abs(load_classifier(spec, ONNX).classify(crops()) - rounded).max() > PROBABILITY
