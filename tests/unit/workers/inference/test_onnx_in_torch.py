"""ONNX files in torch: the same numbers as ONNX Runtime, and a clear refusal of what isn't known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from common.domain import MaskwatchError
from common.models.manifest import MODELS, Model, ModelKind
from tests.unit.workers.conftest import brightness_network
from workers.detection import centerface
from workers.inference import Runtime
from workers.inference.onnx_session import make_session, with_free_size
from workers.weights.files import read_model

torch = pytest.importorskip("torch", reason="the `native` layer is not installed")

from workers.inference.onnx_in_torch import to_torch  # noqa: E402

#: Largest difference of an output between ONNX Runtime and torch, both in float32.
TOLERANCE = 1e-4


def difference(content: bytes, batch: NDArray[np.float32]) -> float:
    """The largest difference of any output."""
    expected = make_session(content, Runtime()).run(batch)
    with torch.inference_mode():
        found = to_torch(content)(torch.from_numpy(batch))
    assert [value.shape for value in expected] == [tuple(value.shape) for value in found]
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(expected, found, strict=True))


def network(
    nodes: Sequence[Any], shape: Sequence[int | str], weights: dict[str, NDArray[Any]], *, opset: int = 17
) -> bytes:
    """An ONNX file with the input `x` and the output `y`."""
    graph = helper.make_graph(
        nodes,
        "made by hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def centerface_of_any_size() -> bytes:
    return with_free_size(read_model(MODELS["centerface"].ref), centerface.OUTPUTS)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 32)])
def test_centerface_is_the_same(size: tuple[int, int]) -> None:
    batch = np.random.default_rng(1).uniform(0, 255, (2, 3, *size)).astype(np.float32)
    assert difference(centerface_of_any_size(), batch) < TOLERANCE


SHIPPED = [model for model in MODELS.values() if model.kind is ModelKind.CLASSIFIER]


@pytest.mark.parametrize("model", SHIPPED, ids=lambda model: model.name)
def test_the_shipped_classifiers_are_the_same(model: Model) -> None:
    content = read_model(model.ref)
    _, height, width, _ = to_torch(content).input_shape
    batch = np.random.default_rng(2).uniform(-1, 1, (5, height, width, 3)).astype(np.float32)
    assert difference(content, batch) < TOLERANCE


def test_a_network_made_by_hand_is_the_same() -> None:
    batch = np.random.default_rng(3).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    assert difference(brightness_network(8), batch) < TOLERANCE


@pytest.mark.train
@pytest.mark.parametrize(
    ("arch", "half"),
    [
        # Half a minute of both cores.
        pytest.param("xception", True, marks=pytest.mark.bench),
        ("efficientnet-lite0", False),
        ("compact", True),
    ],
)
def test_classifiers_are_the_same_as_training_exports_them(arch: str, half: bool, tmp_path: Path) -> None:
    """Keras through tf2onnx, with the mirror image, some with weights in half precision; seeded random weights."""
    keras = pytest.importorskip("keras", reason="the `train` layer is not installed")
    from workers.classification.networks import build
    from workers.training.export import export_onnx
    from workers.training.recipes import FitSettings, Recipe, Stage

    keras.utils.set_random_seed(4)
    batch = np.random.default_rng(4).uniform(-1, 1, (3, 64, 64, 3)).astype(np.float32)
    path = tmp_path / "network.onnx"
    settings = FitSettings(arch, Recipe.FIELD, (Stage(64, 1),), 32, 1e-4)
    export_onnx(build(arch, 64), settings, path, batch, temperature=1.5, half=half)
    assert difference(path.read_bytes(), batch) < TOLERANCE


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (1, 0, 2, 1)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_padding_may_differ_between_the_ends(pads: tuple[int, ...], strides: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["c"], pads=pads, strides=strides, kernel_shape=(3, 3)),
        helper.make_node("MaxPool", ["c"], ["y"], pads=pads, strides=strides, kernel_shape=(3, 3)),
    ]
    # All negative, so that a maximum over zeros beyond the edge would show.
    kernel = -rng.uniform(0, 1, (4, 3, 3, 3)).astype(np.float32)
    content = network(nodes, ("n", 3, 11, 9), {"kernel": kernel})
    assert difference(content, rng.uniform(0, 1, (2, 3, 11, 9)).astype(np.float32)) < TOLERANCE


@pytest.mark.parametrize(("opset", "bounds"), [(6, False), (17, True)])
def test_bounds_and_axes_are_attributes_or_inputs(opset: int, bounds: bool) -> None:
    if bounds:
        weights = {"low": np.float32(-0.5), "high": np.float32(0.25), "axes": np.array([2, 3], np.int64)}
        clip = helper.make_node("Clip", ["x", "low", "high"], ["c"])
        reduced = [helper.make_node("ReduceMean", ["c"], ["m"], axes=[2, 3], keepdims=1)]
        squeezed = helper.make_node("Squeeze", ["m", "axes"], ["s"])
        out = helper.make_node("Unsqueeze", ["s", "axes"], ["y"])
    else:
        weights = {}
        clip = helper.make_node("Clip", ["x"], ["c"], min=-0.5, max=0.25)
        reduced = [helper.make_node("ReduceMean", ["c"], ["m"], axes=[2, 3], keepdims=1)]
        squeezed = helper.make_node("Squeeze", ["m"], ["s"], axes=[2, 3])
        out = helper.make_node("Unsqueeze", ["s"], ["y"], axes=[0, 3])
    content = network(
        [clip, *reduced, squeezed, out],
        ("n", 3, 4, 5),
        {name: np.asarray(v) for name, v in weights.items()},
        opset=opset,
    )
    batch = np.random.default_rng(6).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32)
    assert difference(content, batch) < TOLERANCE


def test_weights_in_half_precision_are_read() -> None:
    rng = np.random.default_rng(7)
    weights = {"half": rng.normal(0, 1, (6, 4)).astype(np.float16)}
    nodes = [
        helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "single"], ["y"]),
    ]
    content = network(nodes, ("n", 6), weights)
    assert difference(content, rng.normal(0, 1, (3, 6)).astype(np.float32)) < TOLERANCE


def test_in_half_precision_every_weight_is_a_half() -> None:
    module = to_torch(read_model(MODELS["compact"].ref)).half()
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float16}
    batch = np.random.default_rng(8).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    (expected,) = make_session(read_model(MODELS["compact"].ref), Runtime()).run(batch)
    with torch.inference_mode():
        (found,) = module(torch.from_numpy(batch).half())
    assert found.dtype == torch.float32  # probabilities keep their digits
    assert found.numpy() == pytest.approx(expected, abs=0.01)


def test_values_are_dropped_after_their_last_use() -> None:
    """Else a forward pass would hold every map of the network at once."""
    module = to_torch(centerface_of_any_size())
    alive, most = 0, 0
    for step in module._steps:
        alive += len(step.outputs)
        most = max(most, alive)
        alive -= len(step.last_used)
    assert alive == len(centerface.OUTPUTS)
    assert most <= 8  # of more than a hundred


def test_an_unknown_operator_is_named() -> None:
    nodes = [
        helper.make_node("Erf", ["x"], ["e"]),
        helper.make_node("Relu", ["e"], ["r"]),
        helper.make_node("Det", ["r"], ["y"]),
    ]
    with pytest.raises(MaskwatchError, match="unknown operators Det, Erf; run it with the engine onnx"):
        to_torch(network(nodes, (3, 3), {}))


def test_an_operator_that_no_output_needs_is_left_out() -> None:
    nodes = [helper.make_node("Erf", ["x"], ["unused"]), helper.make_node("Relu", ["x"], ["y"])]
    assert difference(network(nodes, (2, 2), {}), np.array([[1, -1], [-2, 2]], np.float32)) == 0


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=(2, 2), ceil_mode=1), "MaxPool has auto_pad or ceil"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=(2, 2), auto_pad="SAME_UPPER"), "MaxPool has auto_pad"),
        (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64), "Cast to something else"),
    ],
)
def test_an_attribute_that_is_not_heeded_is_refused(node: Any, named: str) -> None:
    with pytest.raises(MaskwatchError, match=named):
        to_torch(network([node], (1, 1, 5, 5), {}))


def test_a_network_of_two_inputs_is_refused() -> None:
    model = onnx.load_from_string(network([helper.make_node("Relu", ["x"], ["y"])], (2, 2), {}))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 2)))
    with pytest.raises(MaskwatchError, match="2 inputs; valid: 1"):
        to_torch(model.SerializeToString())
