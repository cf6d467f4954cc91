"""The detectors of fdet 0.2.1, the package of the reference notebook, for comparison with our own detectors.

fdet can't be imported as it is: it needs a torchvision of 2020, which doesn't work with today's torch, and it downloads
its weights and unpickles them. So it is imported with a stand-in for the few parts of torchvision that it uses, and is
given tensors that were read without executing anything. It downloads nothing; all computations are fdet's own code.

Its detectors get an image unscaled, as in the notebook: the pipeline's enlarging and shrinking are not applied.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef, PipelineSpec
from workers.detection import Detections
from workers.detection._ops import MIN_SIDE_PX, clip, has_area, nms
from workers.inference import Runtime
from workers.inference.torch_session import torch_device
from workers.weights.files import read_files, read_model

#: fdet's name of the backbone of each model of the manifest.
BACKBONES = {"fdet-retinaface": "RESNET50", "fdet-retinaface-mobilenet": "MOBILENET"}
#: Score thresholds of MTCNN's first two stages: fdet's own. The third is the pipeline's.
MTCNN_THRESHOLDS = (0.6, 0.7)

#: Importing puts modules into `sys.modules` for a while, and loading switches cuDNN: one at a time.
_lock = threading.Lock()


class Fdet:
    """A detector of fdet behind our protocol."""

    def __init__(self, detector: Any) -> None:
        self._detector = detector

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3): boxes in its pixels, best score first.

        fdet's boxes are whole pixels, and some reach beyond the image: here they end at its edge.
        """
        import torch

        with torch.no_grad():
            faces = self._detector.detect(image_rgb)
        boxes = np.array([face["box"] for face in faces], np.float32).reshape(-1, 4)
        scores = np.array([face["confidence"] for face in faces], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes = clip(boxes, image_rgb.shape[1], image_rgb.shape[0])
        whole = np.flatnonzero(has_area(boxes, at_least_px=MIN_SIDE_PX))
        order = whole[np.argsort(-scores[whole], kind="stable")]
        return Detections(boxes[order], scores[order])


def load_fdet_retinaface(spec: PipelineSpec, runtime: Runtime) -> Fdet:
    """fdet's RetinaFace with the weights the pipeline pins. It runs under torch, whatever the runtime's engine.

    Errors as `workers.analysis.load.load_analyzer` and `workers.inference.torch_weights`.
    """
    return Fdet(_retinaface(spec.detector, spec.detector_threshold, runtime))


def load_fdet_mtcnn(spec: PipelineSpec, runtime: Runtime) -> Fdet:
    """fdet's MTCNN with timesler's weights, of the same networks; else as `load_fdet_retinaface`."""
    return Fdet(_mtcnn(spec.detector, spec.detector_threshold, runtime))


@lru_cache(maxsize=2)
def _retinaface(model: ModelRef, threshold: float, runtime: Runtime) -> Any:
    options = _options(runtime)
    # Imported here: torch is not installed everywhere.
    from workers.inference.torch_weights import fill, read_state

    what = f"the file of {model.name}"
    state = read_state(read_model(model), what)
    with _lock, _keeping_cudnn():
        module = _fdet("fdet.retinaface")
        # The backbone's file is only where its training began: every weight of it is in the network's own.
        module.load_state_dict_from_url = _given({"mobilenetv1_pretrain": _with_top(state), "retinaface": state})
        detector = module.RetinaFace(BACKBONES[model.name], threshold=threshold, **options)
    fill(detector._net, state, what)  # fdet accepts a file that doesn't fit without an error
    return detector


@lru_cache(maxsize=2)
def _mtcnn(model: ModelRef, threshold: float, runtime: Runtime) -> Any:
    options = _options(runtime)
    # Imported here: torch is not installed everywhere.
    from workers.inference.torch_weights import fill, read_state

    nets = ("pnet", "rnet", "onet")
    states = {
        net: _fdet_names(read_state(content, f"{net}.pt")) for net, content in zip(nets, read_files(model), strict=True)
    }
    with _lock, _keeping_cudnn():
        module = _fdet("fdet.mtcnn")
        module.load_state_dict_from_url = _given(states)
        detector = module.MTCNN(thresholds=(*MTCNN_THRESHOLDS, threshold), **options)
    for net in nets:
        fill(getattr(detector, f"_{net}"), states[net], f"{net}.pt")
    return detector


def _options(runtime: Runtime) -> dict[str, Any]:
    """fdet's arguments for the device. Raises `MaskwatchError` if it, or torch, isn't there."""
    device = torch_device(runtime)
    import torch

    torch.set_num_threads(runtime.threads)
    if device.type == "cpu":
        return {"cuda_enable": False}
    return {"cuda_enable": True, "cuda_devices": [device.index]}


@contextmanager
def _keeping_cudnn() -> Iterator[None]:
    """Restores cuDNN's switch, which fdet changes for the whole process, for other models."""
    from torch.backends import cudnn

    before = cudnn.enabled, cudnn.benchmark
    try:
        yield
    finally:
        cudnn.enabled, cudnn.benchmark = before


def _given(states: Mapping[str, Mapping[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What fdet calls to download a file: gives the tensors whose key is in the file's name."""

    def load_state_dict_from_url(url: str, **_: object) -> dict[str, Any]:
        return dict(next(state for name, state in states.items() if name in url))

    return load_state_dict_from_url


def _with_top(state: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's part of the weights, and a top of zeros, which fdet wants to see before it takes it off."""
    import torch

    body = {name.removeprefix("body."): value for name, value in state.items() if name.startswith("body.")}
    return body | {"fc.weight": torch.zeros(1000, 256), "fc.bias": torch.zeros(1000)}


def _fdet_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of timesler's MTCNN (github.com/timesler/facenet-pytorch) as fdet's networks have them.

    The layers are the same. Those before the branches are called `features`, the dense ones `conv`; and the first
    dense one sees the map's values channel by channel, each by column and row, where timesler's sees them by column,
    row and channel.
    """
    renamed = {}
    for name, value in state.items():
        if name in ("dense4.weight", "dense5.weight") and value.shape[1] in (576, 1152):
            # 64 channels of 3 × 3 cells, or 128 of them.
            value = value.reshape(len(value), 3, 3, -1).permute(0, 3, 1, 2).reshape(len(value), -1)
        name = name.replace("dense", "conv")
        renamed[name if "_" in name.partition(".")[0] else f"features.{name}"] = value
    return renamed


def _fdet(name: str) -> Any:
    """A module of fdet, imported with the stand-in; `sys.modules` has afterwards what it had of torchvision before.

    Raises `MaskwatchError` where fdet isn't installed.
    """
    import importlib

    if name in sys.modules:
        return sys.modules[name]
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] == "torchvision"}
    sys.modules.update(_stand_in())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MaskwatchError(f"{error.name} is not installed: pip install 'maskwatch[native]'") from error
    finally:
        for key in _stand_in():
            del sys.modules[key]
        sys.modules.update(before)


def _stand_in() -> dict[str, types.ModuleType]:
    """The parts of torchvision that fdet uses, by the names of their modules."""
    names = ("torchvision", "torchvision.models", "torchvision.models._utils", "torchvision.models.utils",
             "torchvision.ops", "torchvision.ops.boxes")  # fmt: skip
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    parts: dict[str, dict[str, Any]] = {
        "torchvision.models": {"resnet50": _resnet50},
        "torchvision.models._utils": {"IntermediateLayerGetter": _layer_getter},
        "torchvision.models.utils": {"load_state_dict_from_url": _given({})},
        "torchvision.ops.boxes": {"batched_nms": _batched_nms},
    }
    for name, functions in parts.items():
        vars(modules[name]).update(functions)
    return modules


def _resnet50(pretrained: bool) -> Any:
    """The residual network's parts in their order, without weights: fdet loads those of its own file over them."""
    from torch import nn

    # Imported here: torch is not installed everywhere.
    from workers.detection.retinaface_network import ResNet50

    body = ResNet50()
    return nn.Sequential(
        OrderedDict(
            conv1=body.conv1, bn1=body.bn1, relu=nn.ReLU(), maxpool=body.pool,
            layer1=body.layer1, layer2=body.layer2, layer3=body.layer3, layer4=body.layer4,
        )
    )  # fmt: skip


def _layer_getter(network: Any, return_layers: Mapping[str, Any]) -> Any:
    """A network's parts up to the last one named, which gives what the named ones put out."""
    from torch import nn

    class LayerGetter(nn.ModuleDict):  # type: ignore[misc]
        def forward(self, batch: Any) -> OrderedDict[Any, Any]:
            found = OrderedDict()
            for name, part in self.items():
                batch = part(batch)
                if name in return_layers:
                    found[return_layers[name]] = batch
            return found

    parts = OrderedDict(network.named_children())
    last = max(list(parts).index(name) for name in return_layers)
    return LayerGetter(OrderedDict(list(parts.items())[: last + 1]))


def _batched_nms(boxes: Any, scores: Any, groups: Any, iou_threshold: float) -> Any:
    """Indices of the boxes to keep, best first, each group by itself: boxes (n, 4), scores (n,), groups (n,)."""
    import torch

    device = boxes.device
    boxes, scores, groups = (values.detach().cpu() for values in (boxes, scores, groups))  # once: each copy waits
    kept: list[int] = []
    for group in groups.unique():
        where = torch.nonzero(groups == group)[:, 0]
        indices = nms(boxes[where].numpy(), scores[where].numpy(), float(iou_threshold))
        kept += where[torch.from_numpy(indices)].tolist()
    ordered = sorted(kept, key=lambda index: -float(scores[index]))
    return torch.tensor(ordered, dtype=torch.int64, device=device)
