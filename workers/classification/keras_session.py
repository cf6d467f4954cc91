"""Classifiers in Keras, on TensorFlow: the weights of an ONNX file in the framework they were trained with."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef
from workers.inference import Runtime
from workers.weights.files import read_model


class KerasSession:
    """A Keras network that is loaded and ready. `run` may be called from several threads at once."""

    def __init__(self, model: Any, device: str) -> None:
        import tensorflow as tf

        self._shape = tuple(model.input_shape)
        self._device = device
        self._tf = tf
        # Traced once for batches of any length: `predict` would build its pipeline anew for every image.
        signature = [tf.TensorSpec(self._shape, tf.float32)]
        self._forward = tf.function(lambda batch: model(batch, training=False), input_signature=signature)

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """The shape of the only input; an axis of any length is None."""
        return self._shape

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the network really runs."""
        return "cuda" if "GPU" in self._device else "cpu"

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One forward pass: the probabilities."""
        with self._tf.device(self._device):
            return [self._forward(self._tf.constant(batch)).numpy()]


@lru_cache(maxsize=4)
def load_session(model: ModelRef, runtime: Runtime) -> KerasSession:
    """The network of one of our ONNX files in Keras, loaded once per process and runtime.

    Errors as `workers.weights.files.read_files`, and `MaskwatchError` if the file doesn't name its architecture, or
    TensorFlow or the device is missing.
    """
    content = read_model(model)
    tf = _tensorflow(runtime)
    device = _device(tf, runtime)
    with tf.device(device):
        return KerasSession(to_keras(content, model.name), device)


def to_keras(content: bytes, name: str) -> Any:
    """The Keras network whose weights an ONNX file of ours holds. name: of the model, for errors."""
    import onnx
    from onnx import numpy_helper

    # Imported here: the networks load TensorFlow.
    from workers.classification import networks

    file = onnx.load_from_string(content)
    told = next((entry.value for entry in file.metadata_props if entry.key == networks.METADATA_KEY), None)
    if told is None:
        raise MaskwatchError(
            f"model {name} doesn't tell its architecture, so only the onnx runtime can run it; "
            "`maskwatch train` writes files that do"
        )
    facts = json.loads(told)
    weights = {
        entry.name.removesuffix(networks.HALF_SUFFIX): numpy_helper.to_array(entry) for entry in file.graph.initializer
    }
    model = networks.build(facts["arch"], facts["side"])
    try:
        networks.fill_folded(model, weights)
    except (KeyError, ValueError) as error:
        raise MaskwatchError(f"model {name} doesn't hold the weights of {facts['arch']}: {error}") from error
    return networks.mirrored(model) if facts["mirrored"] else model


def _tensorflow(runtime: Runtime) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise MaskwatchError("the native runtime needs TensorFlow: pip install 'maskwatch[native]'") from error
    try:
        tf.config.threading.set_intra_op_parallelism_threads(runtime.threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        # TensorFlow takes these settings only before its first operation, which other code in this process has run.
        pass
    return tf


def _device(tf: Any, runtime: Runtime) -> str:
    if runtime.device == "cpu":
        return "/CPU:0"
    found = len(tf.config.list_physical_devices("GPU"))
    if found <= runtime.device_number:
        raise MaskwatchError(
            f"TensorFlow sees {found} GPUs here, so {runtime.device} can't be used; check CUDA, or --device cpu"
        )
    return f"/GPU:{runtime.device_number}"
