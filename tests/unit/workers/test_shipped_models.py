"""What ships in the package is what the manifest pins, and small enough to promise what it promises."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from common.manifest import MODELS
from workers.inference import Runtime
from workers.inference.onnx_session import load_session
from workers.weights import file_path

onnx = pytest.importorskip("onnx", reason="the `worker` layer is not installed")

COMPACT = MODELS["compact"]


SHIPPED = [(model, file) for model in MODELS.values() for file in model.files if file.package is not None]


@pytest.mark.parametrize(("model", "file"), SHIPPED, ids=lambda entry: entry.name)
def test_every_file_that_a_package_ships_is_there_with_its_hash_and_size(model, file):
    path = file_path(model, file)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    assert path.stat().st_size == file.size


def test_the_compact_classifier_has_fewer_than_half_a_million_parameters():
    initialisers = onnx.load(file_path(COMPACT, COMPACT.files[0])).graph.initializer
    parameters = sum(int(np.prod(weights.dims)) for weights in initialisers)
    assert 50_000 < parameters < 500_000


def test_the_compact_classifier_takes_crops_in_any_number_and_answers_with_probabilities():
    session = load_session(COMPACT.ref, Runtime())
    count, height, width, channels = session.input_shape
    assert not isinstance(count, int)
    assert height == width
    assert channels == 3
    for number in (1, 5):
        crops = np.random.default_rng(number).uniform(-1, 1, (number, height, width, 3)).astype(np.float32)
        (probabilities,) = session.run(crops)
        assert probabilities.shape == (number, 2)
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_the_model_card_is_about_this_very_file():
    card = file_path(COMPACT, COMPACT.files[0]).with_suffix(".md").read_text(encoding="utf-8")
    assert COMPACT.sha256 in card
    for heading in ("## Trained on", "## How well it does", "## Limits"):
        assert heading in card
