"""Small models and pictures for the tests of the vision code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from common.domain import ModelRef
from common.models import manifest
from common.models.manifest import Model, ModelFile, ModelKind


def brightness_network(side: int = 64) -> bytes:
    """An ONNX network (n, side, side, 3) → softmax (n, 2): the brighter a crop, the surer `with_mask`.

    p_with_mask = sigmoid(4 · mean), for inputs in [-1, 1].
    """
    weights = [
        numpy_helper.from_array(np.array([4.0, 0.0], np.float32), "gain"),
        numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.array([-1, 1], np.int64), "column"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["crops", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["means"]),
        helper.make_node("Mul", ["means", "gain"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["n", side, side, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 2])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture
def ship_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, bytes], ModelRef]:
    """Makes a model file known to the manifest, as if a package shipped it: (name, kind, content) → its ref."""
    package = tmp_path / "shipped_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def ship(name: str, kind: str, content: bytes) -> ModelRef:
        (package / f"{name}.onnx").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        file = ModelFile(f"{name}.onnx", digest, len(content), package.name, f"{name}.onnx")
        model = Model(name, ModelKind(kind), (file,), "Apache-2.0", "this test", threshold=0.5)
        monkeypatch.setitem(manifest.MODELS, name, model)
        return model.ref

    return ship


@pytest.fixture
def ship_brightness(ship_model: Callable[[str, str, bytes], ModelRef]) -> Callable[..., ModelRef]:
    """Makes the brightness network known as the classifier `bright`: (side=64) → its ref."""
    return lambda side=64: ship_model("bright", "classifier", brightness_network(side))
