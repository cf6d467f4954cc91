"""Detectors for batches of frames on the device, which find the same faces as `workers.detection` finds one by one.

The networks, their constants and the meaning of their outputs are described there; here frames are tensors.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from common.domain import MaskwatchError, PipelineSpec
from workers.analysis.device.images import resized
from workers.detection import _ops, centerface, retinaface, torch_ops
from workers.detection._scaling import scale_for
from workers.detection.retinaface_network import load_weights
from workers.inference.onnx_in_torch import to_torch
from workers.inference.onnx_session import with_free_size
from workers.weights.files import read_model

#: Boxes float32 (n, k, 4) in pixels of the frames, best first, scores float32 (n, k), and which are faces, bool (n, k).
Found = tuple[Any, Any, Any]


class DeviceDetector(Protocol):
    """Finds faces in frames of one size."""

    #: The torch module, on its device, in the precision it runs in.
    network: Any

    def detect(self, frames_rgb: Any) -> Found:
        """Faces of frames uint8 (n, h, w, 3) on the network's device; boxes lie inside the frame."""
        ...


class DeviceCenterFace:
    """`centerface.CenterFace` for batches."""

    def __init__(self, spec: PipelineSpec, network: Any) -> None:
        self.spec = spec
        self.network = network

    def detect(self, frames_rgb: Any) -> Found:
        height, width = frames_rgb.shape[1:3]
        images, to_frame = _scaled(frames_rgb, self.spec)
        rest_x, rest_y = -images.shape[3] % centerface.MULTIPLE, -images.shape[2] % centerface.MULTIPLE
        heatmap, log_sizes, offsets = self._forward(functional.pad(images, (0, rest_x, 0, rest_y)))
        threshold = self.spec.detector_threshold
        scores, cells = torch_ops.best(heatmap.flatten(1), threshold, centerface.MAX_CANDIDATES)
        columns = heatmap.shape[3]
        # Channels are y, x; boxes are x, y.
        offsets, log_sizes = (_of_cells(values, cells) for values in (offsets, log_sizes))
        corners = torch.stack([cells % columns, cells // columns], dim=-1)
        centres = (corners + offsets + 0.5) * centerface.STRIDE
        halves = log_sizes.clamp(max=20).exp() * (centerface.STRIDE / 2)
        boxes = torch.cat([centres - halves, centres + halves], dim=-1) * to_frame
        boxes = torch_ops.clip(_to_labels(boxes), width, height)
        candidates = (scores >= threshold) & _whole(boxes)
        return boxes, scores, torch_ops.nms(boxes, candidates, centerface.NMS_IOU)

    def _forward(self, images: Any) -> tuple[Any, ...]:
        return tuple(values.float() for values in self.network(_as_input(images, self.network)))


class DeviceRetinaFace:
    """`retinaface.RetinaFace` for batches."""

    def __init__(self, spec: PipelineSpec, network: Any) -> None:
        self.spec = spec
        self.network = network

    def detect(self, frames_rgb: Any) -> Found:
        height, width = frames_rgb.shape[1:3]
        images, to_frame = _scaled(frames_rgb, self.spec)
        mean = torch.tensor(retinaface.MEAN_BGR, dtype=torch.float32).to(images.device, non_blocking=True)
        batch = images.flip(1) - mean[:, None, None]
        locations, scores, _ = self.network(_as_input(batch, self.network))
        threshold = self.spec.detector_threshold
        scores, rows = torch_ops.best(scores.float(), threshold, retinaface.MAX_CANDIDATES)
        priors_px = torch_ops.priors(*images.shape[2:], images.device)[rows]
        locations = locations.float().gather(1, rows[..., None].expand(-1, -1, 4))
        boxes = torch_ops.decode(locations, priors_px)
        kept = torch_ops.nms(boxes, scores >= threshold, retinaface.NMS_IOU)
        boxes = torch_ops.clip(boxes * to_frame, width, height)
        return boxes, scores, kept & _whole(boxes)


def load_device_detector(spec: PipelineSpec, device: Any, precision: Any) -> DeviceDetector:
    """The detector of a pipeline with the weights it pins, on a `torch.device`, in a torch float type.

    Raises `MaskwatchError` for a detector that can't run on the device, else errors as
    `workers.weights.files.read_files`.
    """
    name = spec.detector.name
    if name == "centerface":
        network = to_torch(with_free_size(read_model(spec.detector), centerface.OUTPUTS))
        return DeviceCenterFace(spec, ready(network, device, precision))
    if name in retinaface.BACKBONES:
        content = read_model(spec.detector)
        network = load_weights(content, retinaface.BACKBONES[name], what=f"the file of {name}")
        return DeviceRetinaFace(spec, ready(folded(network), device, precision))
    able = ", ".join(["centerface", *retinaface.BACKBONES])
    raise MaskwatchError(f"detector {name} runs on the CPU only; on a GPU: {able}; or choose the device cpu")


def ready(network: Any, device: Any, precision: Any) -> Any:
    """The network on the device, in this precision and in the memory layout in which GPUs convolve fastest."""
    return network.eval().requires_grad_(False).to(device, precision).to(memory_format=torch.channels_last)


def folded(network: Any) -> Any:
    """The network with each normalisation folded into the convolution before it, which saves memory traffic.

    In place. Assumes that a normalisation follows the convolution that is defined before it.
    """
    for module in network.modules():
        before = None
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                assert before is not None, f"{name} follows no convolution"
                setattr(module, before, torch.nn.utils.fuse_conv_bn_eval(getattr(module, before), child))
                setattr(module, name, torch.nn.Identity())
            before = name if isinstance(child, torch.nn.Conv2d) else None
    return network


def _scaled(frames_rgb: Any, spec: PipelineSpec) -> tuple[Any, Any]:
    """The frames scaled as the pipeline says, float32 (n, 3, h, w), and the factors back to the frame: float32 (4,)."""
    height, width = frames_rgb.shape[1:3]
    scale = scale_for(width, height, spec)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    back = torch.tensor([width / new_width, height / new_height] * 2, dtype=torch.float32)
    return resized(frames_rgb, new_height, new_width), back.to(frames_rgb.device, non_blocking=True)


def _as_input(batch: Any, network: Any) -> Any:
    weight = next(iter([*network.parameters(), *network.buffers()]))
    return batch.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _of_cells(values: Any, cells: Any) -> Any:
    """The two channels y, x (n, 2, h, w) at the cells (n, k), as x, y: (n, k, 2)."""
    taken = values.flatten(2).gather(2, cells[:, None, :].expand(-1, 2, -1))
    return taken.flip(1).transpose(1, 2)


def _to_labels(boxes: Any) -> Any:
    """`centerface.to_labels` for boxes (n, k, 4)."""
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    heights = y2 - y1
    return torch.stack([x1, y1 + centerface.TOP_DOWN * heights, x2, y2 + centerface.BOTTOM_DOWN * heights], dim=-1)


def _whole(boxes: Any) -> Any:
    """`_ops.has_area` for boxes (n, k, 4), at the detectors' `MIN_SIDE_PX`."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes.isfinite().all(dim=-1) & (sides > _ops.MIN_SIDE_PX).all(dim=-1)
