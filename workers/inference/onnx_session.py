"""Networks under ONNX Runtime, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef
from workers.inference import Runtime
from workers.weights.files import read_model


class OnnxSession:
    """A network that is loaded and ready. `run` may be called from several threads at once."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0]

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """The shape of the only input; an axis of any length is a name or None."""
        return tuple(self._input.shape)

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the network really runs."""
        return "cuda" if self._session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One forward pass: the outputs in the order they were asked for when the session was loaded."""
        outputs: list[NDArray[np.float32]] = self._session.run(None, {self._input.name: batch})
        return outputs


def load_session(model: ModelRef, runtime: Runtime, *, free_size_outputs: Sequence[str] = ()) -> OnnxSession:
    """The network of a pinned ONNX file, loaded once per process and set of arguments.

    free_size_outputs: for an image-to-maps network exported with a fixed picture size: makes batch, height
    and width free, and keeps only these outputs, in this order, and what they need.

    Errors as `workers.weights.files.read_files`, and `MaskwatchError` if the device isn't there.
    """
    return _load_session(model, runtime, tuple(free_size_outputs))


@lru_cache(maxsize=8)
def _load_session(model: ModelRef, runtime: Runtime, free_size_outputs: tuple[str, ...]) -> OnnxSession:
    content = read_model(model)
    return make_session(with_free_size(content, free_size_outputs) if free_size_outputs else content, runtime)


def make_session(content: bytes, runtime: Runtime) -> OnnxSession:
    """The network of an ONNX file's bytes. Raises `MaskwatchError` if the device isn't there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: warnings about unused initialisers help nobody
    # Waiting threads sleep instead of spinning: on a full machine a spinning one takes a core from a sibling.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A memory pattern would be planned and kept for each image size, and there are many sizes. The arena stays on:
    # without it CenterFace takes a third more time, in page faults.
    options.enable_mem_pattern = False

    session = onnxruntime.InferenceSession(content, options, providers=_providers(runtime))
    loaded = OnnxSession(session)
    if not runtime.device.startswith(loaded.device):
        # ONNX Runtime silently falls back to the CPU, for instance when a CUDA library is missing.
        raise MaskwatchError(f"device {runtime.device} can't be used by ONNX Runtime here; check the CUDA installation")
    return loaded


def _providers(runtime: Runtime) -> list[Any]:
    import onnxruntime

    if runtime.device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MaskwatchError(
            f"device {runtime.device} needs onnxruntime-gpu: pip uninstall onnxruntime; pip install 'maskwatch[gpu]'"
        )
    cuda = {
        "device_id": runtime.device_number,
        # The default tries every algorithm for every new image size, which takes seconds each.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Grow by the requested size, not to the next power of two: several processes share a GPU.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def with_free_size(content: bytes, outputs: tuple[str, ...]) -> bytes:
    """The same network for images of any size, with these outputs only."""
    import onnx

    model = onnx.load_from_string(content)
    graph = model.graph
    weights = {weight.name for weight in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    by_name = {value.name: value for value in graph.output}
    kept = [by_name[name] for name in outputs]
    for value, (height, width) in [
        (inputs[0], ("height", "width")),
        *((v, ("map_h", "map_w")) for v in kept),
    ]:
        dims = value.type.tensor_type.shape.dim
        dims[0].dim_param, dims[2].dim_param, dims[3].dim_param = "batch", height, width
    # Weights that are listed as inputs could be replaced at run time, so they would not be folded.
    del graph.input[:]
    graph.input.extend(inputs[:1])
    del graph.output[:]
    graph.output.extend(kept)
    serialised: bytes = model.SerializeToString()
    return serialised
