"""Checks that weights fit their network, by loading them strictly, and makes the networks that derive from them.

The networks themselves, and reading their files without executing anything, are left to the detectors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from common.domain import MaskwatchError
from common.models.manifest import Model, ModelKind
from common.models.pipeline import spec_of
from common.settings import PipelineSettings


def check_fits(model: Model, contents: Sequence[bytes]) -> None:
    """Raises `MaskwatchError`, naming the keys that differ, if a model's files are weights of another network.

    contents: of each file of the model, in its order. A machine without torch accepts only files with a known hash,
    without this check.
    """
    check = _CHECKS.get(model.name)
    if model.sha256 is not None and (check is None or importlib.util.find_spec("torch") is None):
        return
    if check is None:
        raise MaskwatchError(
            f"nobody has published a hash for {model.name}, and its files can't be checked in another way: "
            f"give the hash that you trust: `maskwatch models pull {model.name} --url URL --sha256 HEX`"
        )
    check(model, contents)


def derive(model: Model) -> None:
    """Make the ONNX file of a torch model in the cache, if torch is installed; else do nothing."""
    derives = model.kind is ModelKind.DETECTOR and model.requirement is None
    if not derives or any(importlib.util.find_spec(name) is None for name in ("torch", "onnxruntime")):
        return
    # Imported here, as below, so that listing models loads no model runtime.
    from workers.detection.registry import load_detector
    from workers.inference import Runtime
    from workers.weights.files import cache_folder

    load_detector(spec_of(PipelineSettings(detector=f"{model.name}@{model.sha256}"), cache_folder()), Runtime())


def _retinaface_resnet50(model: Model, contents: Sequence[bytes]) -> None:
    # Imported here: torch is not installed everywhere.
    from workers.detection.retinaface_network import load_weights

    load_weights(contents[0], "resnet50", model.files[0].name)


def _retinaface_mobilenet(model: Model, contents: Sequence[bytes]) -> None:
    # Imported here: torch is not installed everywhere.
    from workers.detection.retinaface_network import load_weights

    load_weights(contents[0], "mobilenet", model.files[0].name)


def _mtcnn(model: Model, contents: Sequence[bytes]) -> None:
    # Imported here: torch is not installed everywhere.
    from workers.detection.mtcnn_network import load_weights

    for file, content in zip(model.files, contents, strict=True):
        load_weights(content, file.name.removesuffix(".pt"))


#: Model name → loads the contents of its files and throws the network away. Imports torch, so only when it is called.
_CHECKS: dict[str, Callable[[Model, Sequence[bytes]], None]] = {
    "retinaface-resnet50": _retinaface_resnet50,
    "retinaface-mobilenet": _retinaface_mobilenet,
    "mtcnn": _mtcnn,
    "fdet-retinaface": _retinaface_resnet50,
    "fdet-retinaface-mobilenet": _retinaface_mobilenet,
    "fdet-mtcnn": _mtcnn,
}
