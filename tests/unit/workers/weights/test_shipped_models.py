"""What ships in the package is what the manifest pins, and small enough to promise what it promises."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from common.models.figures import SHIPPED as SHIPPED_FIGURES
from common.models.figures import read_confusions
from common.models.manifest import MODELS, ModelKind
from workers.classification.networks import METADATA_KEY
from workers.inference import Runtime
from workers.inference.onnx_session import load_session
from workers.weights.files import file_path

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


CLASSIFIERS = [model for model in MODELS.values() if model.kind is ModelKind.CLASSIFIER]


@pytest.mark.parametrize("model", CLASSIFIERS, ids=lambda model: model.name)
def test_the_model_card_is_about_this_very_file(model):
    card = file_path(model, model.files[0]).with_suffix(".md").read_text(encoding="utf-8")
    assert model.sha256 in card
    for heading in ("## Trained on", "## How well it does", "## Through the whole pipeline", "## Choice", "## Limits"):
        assert heading in card


@pytest.mark.parametrize("model", CLASSIFIERS, ids=lambda model: model.name)
def test_a_file_is_small_enough_to_ship_and_tells_its_network(model):
    assert model.files[0].size < 50_000_000
    file = onnx.load(file_path(model, model.files[0]))
    (told,) = (json.loads(entry.value) for entry in file.metadata_props if entry.key == METADATA_KEY)
    assert told["arch"] == model.name
    assert told["classes"] == ["with_mask", "without_mask"]


def test_every_shipped_classifier_has_a_kept_confusion_matrix():
    kept = read_confusions(SHIPPED_FIGURES)
    assert {model.sha256 for model in CLASSIFIERS} == set(kept)
