"""Exports a fitted network as the ONNX file that workers run, and checks the file against the network.

The file's metadata hold what a worker needs to know: the architecture, so that Keras can run the same weights (see
`workers.classification.keras_session`), the temperature that is already in the last layer, and how it was trained.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from common.files import write_atomically
from workers.classification import networks
from workers.datasets.annotations import CLASS_NAMES
from workers.training.recipes import FitSettings

#: ONNX operator set: old enough for every ONNX Runtime this project supports.
OPSET = 17

#: Largest difference of a probability between the network and its ONNX file, by the precision of the weights.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3}


def for_workers(model: Any, settings: FitSettings, temperature: float) -> Any:
    """The network that workers run: normalisation and temperature are folded into the weights, and the output is the
    mean over a crop and its mirror image. Its input has the size of the last stage.

    Dividing the logits by the temperature is the same as dividing the last layer's weights (Guo et al. 2017).
    """
    folded = networks.folded(model, networks.build(settings.arch, settings.side))
    last = folded.get_layer("probabilities")
    last.set_weights([weights / temperature for weights in last.get_weights()])
    return networks.mirrored(folded)


def export_onnx(
    model: Any, settings: FitSettings, path: Path, crops: NDArray[np.float32], *,
    temperature: float = 1.0, half: bool = False,
) -> float:  # fmt: skip
    """Writes a fitted network as workers run it: input `crops` float32 (n, side, side, 3), output softmax
    `probabilities` (n, 2).

    half: keeps the weights in half precision, at half the size; a runtime computes with them in single precision.
    Returns the largest difference of a probability over `crops`. Raises `MaskwatchError` and writes nothing if it
    is above `TOLERANCE`.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx

    shipped = for_workers(model, settings, temperature)
    signature = [tf.TensorSpec((None, settings.side, settings.side, 3), tf.float32, name="crops")]
    function = tf.function(lambda batch: shipped(batch, training=False), input_signature=signature)
    converted, _ = tf2onnx.convert.from_function(function, input_signature=signature, opset=OPSET)
    _name_output(converted, "probabilities")
    _name_weights(converted, networks.named_weights(shipped))
    if half:
        _halve(converted)
    told = {
        "arch": settings.arch, "side": settings.side, "mirrored": True, "temperature": temperature,
        "recipe": settings.recipe.value, "classes": list(CLASS_NAMES),
    }  # fmt: skip
    onnx.helper.set_model_props(converted, {networks.METADATA_KEY: json.dumps(told)})
    onnx.checker.check_model(converted)
    content: bytes = converted.SerializeToString()
    expected = shipped.predict(crops, batch_size=128, verbose=0)
    difference = float(np.abs(_run(content, crops) - expected).max())
    allowed = TOLERANCE["float16" if half else "float32"]
    if difference > allowed:
        raise MaskwatchError(
            f"the ONNX file differs from the network by {difference:.1e} in a probability; allowed: {allowed:.0e}"
        )
    write_atomically(path, content)
    return difference


def _name_weights(converted: Any, named: dict[str, NDArray[np.float32]]) -> None:
    """Names each initialiser after the weights of the Keras network that it holds, so that Keras finds them again.

    The conversion invents names, but it keeps values (normalisation was folded beforehand) and only transposes kernels.
    It leaves out biases that are zero, and keeps one of two equal biases: those are added under their names. Raises
    `MaskwatchError` naming kernels that the file doesn't hold.
    """
    from onnx import numpy_helper

    held = [(entry, numpy_helper.to_array(entry)) for entry in converted.graph.initializer]
    names: dict[str, str] = {}
    for name, values in named.items():
        turned = networks.as_in_onnx(values)
        for entry, found in held:
            if entry.name in names or found.size != turned.size or found.dtype != np.float32:
                continue
            if np.allclose(found.reshape(turned.shape), turned, rtol=1e-4, atol=1e-6):
                names[entry.name] = name
                break
        else:
            if values.ndim == 1:
                converted.graph.initializer.append(numpy_helper.from_array(values, name))
                continue
            raise MaskwatchError(f"the converted network holds no {name}; was it converted by another tf2onnx?")
    for entry, _ in held:
        entry.name = names.get(entry.name, entry.name)
    for node in converted.graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]


def _halve(converted: Any) -> None:
    """Turns each float32 initialiser into a float16 one with a cast after it, which runtimes fold when they load."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for entry in converted.graph.initializer:
        values = numpy_helper.to_array(entry)
        if values.dtype != np.float32 or values.size < 16:
            continue
        name, halved = entry.name, f"{entry.name}{networks.HALF_SUFFIX}"
        entry.CopyFrom(numpy_helper.from_array(values.astype(np.float16), halved))
        casts.append(helper.make_node("Cast", [halved], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *converted.graph.node]
    del converted.graph.node[:]
    converted.graph.node.extend(nodes)


def _name_output(converted: Any, name: str) -> None:
    """Renames the output, which the conversion named by itself."""
    (output,) = converted.graph.output
    for node in converted.graph.node:
        node.output[:] = [name if value == output.name else value for value in node.output]
    output.name = name


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors only, as in workers
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run(content: bytes, crops: NDArray[np.float32]) -> NDArray[np.float32]:
    session = _session(content)
    parts = [session.run(None, {"crops": crops[at : at + 256]})[0] for at in range(0, len(crops), 256)]
    return np.concatenate(parts)


def crops_per_second(path: Path, side: int, batch: int = 16, seconds: float = 1.0) -> float:
    """Crops per second of the ONNX file on one thread of this machine, in the fastest batch within `seconds`."""
    session = _session(path.read_bytes())
    crops = np.zeros((batch, side, side, 3), np.float32)
    session.run(None, {"crops": crops})
    best = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        session.run(None, {"crops": crops})
        best = min(best, time.perf_counter() - start)
    return batch / best


def parameter_count(path: Path) -> int:
    """How many numbers the initialisers of an ONNX file hold: the network's parameters, normalisation folded in."""
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    initialisers = onnx.load(path).graph.initializer
    return int(sum(np.prod(weights.dims) for weights in initialisers if weights.data_type in floats))
