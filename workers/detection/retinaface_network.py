"""RetinaFace as a torch network: a backbone, a feature pyramid, context modules and three heads.

Deng et al., "RetinaFace: Single-stage Dense Face Localisation in the Wild" (arXiv 1905.00641), in the form that
github.com/biubug6/Pytorch_Retinaface trains (MIT) and fdet uses: its names of weights, so its files load. Needs torch
alone. What goes in, and what the numbers that come out mean, is the business of `retinaface`.
"""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import interpolate, relu, softmax

from workers.inference.torch_weights import fill, read_state

Backbone = Literal["resnet50", "mobilenet"]

#: Boxes of different size that each cell of a map proposes: see `_anchors.SIDES_PX`.
PROPOSALS = 2
#: What MobileNet lets through of a negative value, and what the pyramid does on narrow maps. A variant of the file
#: on the net was trained with 0; either loads in the other's code and then hardly finds a face.
SLOPE = 0.1
#: Operators of ONNX that the exported network uses: the newest that torch's exporter by tracing writes well.
OPSET = 17
OUTPUTS = ("locations", "scores", "landmarks")


class RetinaFaceNetwork(nn.Module):  # type: ignore[misc]
    """Float32 (n, 3, h, w) → locations (n, p, 4), scores (n, p), landmarks (n, p, 10), one row per prior box.

    The rows are those of `_anchors.priors(h, w)`. A score is P(face); a landmark row is x, y of the eyes, the nose
    and the corners of the mouth, encoded as the centres of boxes are.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = 256 if backbone == "resnet50" else 64
        inputs = (512, 1024, 2048) if backbone == "resnet50" else (64, 128, 256)
        # The attributes' names are those of the weights.
        self.body = ResNet50() if backbone == "resnet50" else MobileNet()
        self.fpn = FeaturePyramid(inputs, width)
        self.ssh1, self.ssh2, self.ssh3 = (ContextModule(width) for _ in range(3))
        self.ClassHead = nn.ModuleList(Head(width, 2) for _ in range(3))
        self.BboxHead = nn.ModuleList(Head(width, 4) for _ in range(3))
        self.LandmarkHead = nn.ModuleList(Head(width, 10) for _ in range(3))

    def forward(self, batch: Any) -> tuple[Any, Any, Any]:
        """batch: BGR minus the mean, as `retinaface.to_input` makes it."""
        maps = self.fpn(self.body(batch))
        maps = [ssh(each) for ssh, each in zip((self.ssh1, self.ssh2, self.ssh3), maps, strict=True)]
        locations, logits, landmarks = (
            torch.cat([head(each) for head, each in zip(heads, maps, strict=True)], dim=1)
            for heads in (self.BboxHead, self.ClassHead, self.LandmarkHead)
        )
        return locations, softmax(logits, dim=-1)[..., 1], landmarks


class ResNet50(nn.Module):  # type: ignore[misc]
    """The 50-layer residual network (He et al., arXiv 1512.03385) without its top, each stage's stride in the 3×3
    convolution as torchvision has it. Gives the maps of the last three stages: strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _residual_stage(64, 64, blocks=3, stride=1)
        self.layer2 = _residual_stage(256, 128, blocks=4, stride=2)
        self.layer3 = _residual_stage(512, 256, blocks=6, stride=2)
        self.layer4 = _residual_stage(1024, 512, blocks=3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, batch: Any) -> list[Any]:
        features = self.layer1(self.pool(relu(self.bn1(self.conv1(batch)))))
        maps = []
        for stage in (self.layer2, self.layer3, self.layer4):
            features = stage(features)
            maps.append(features)
        return maps


class Bottleneck(nn.Module):  # type: ignore[misc]
    """A 1×1 convolution to fewer channels, a 3×3, a 1×1 to four times as many, and the residual added."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: Any = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: Any) -> Any:
        added = features if self.downsample is None else self.downsample(features)
        features = relu(self.bn1(self.conv1(features)))
        features = relu(self.bn2(self.conv2(features)))
        return relu(self.bn3(self.conv3(features)) + added)


class MobileNet(nn.Module):  # type: ignore[misc]
    """MobileNetV1 (Howard et al., arXiv 1704.04861) at a quarter of its width, without its top. Gives the maps of
    strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            _normalised(3, 8, stride=2, slope=SLOPE),
            _separable(8, 16),
            _separable(16, 32, stride=2),
            _separable(32, 32),
            _separable(32, 64, stride=2),
            _separable(64, 64),
        )
        self.stage2 = nn.Sequential(_separable(64, 128, stride=2), *(_separable(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(_separable(128, 256, stride=2), _separable(256, 256))

    def forward(self, batch: Any) -> list[Any]:
        fine = self.stage1(batch)
        middle = self.stage2(fine)
        return [fine, middle, self.stage3(middle)]


class FeaturePyramid(nn.Module):  # type: ignore[misc]
    """Brings the maps of three strides to one width, and adds each coarser one to the next finer."""

    def __init__(self, inputs: tuple[int, int, int], width: int) -> None:
        super().__init__()
        slope = _slope(width)
        self.output1, self.output2, self.output3 = (_normalised(each, width, kernel=1, slope=slope) for each in inputs)
        self.merge1 = _normalised(width, width, slope=slope)
        self.merge2 = _normalised(width, width, slope=slope)

    def forward(self, maps: list[Any]) -> list[Any]:
        fine, middle, coarse = self.output1(maps[0]), self.output2(maps[1]), self.output3(maps[2])
        middle = self.merge2(middle + interpolate(coarse, size=middle.shape[2:], mode="nearest"))
        fine = self.merge1(fine + interpolate(middle, size=fine.shape[2:], mode="nearest"))
        return [fine, middle, coarse]


class ContextModule(nn.Module):  # type: ignore[misc]
    """Convolves a map with 3×3, 5×5 and 7×7 windows, the larger ones made of 3×3 (Najibi et al., "SSH", arXiv
    1708.03979)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter, slope = width // 2, width // 4, _slope(width)
        self.conv3X3 = _normalised(width, half)
        self.conv5X5_1 = _normalised(width, quarter, slope=slope)
        self.conv5X5_2 = _normalised(quarter, quarter)
        self.conv7X7_2 = _normalised(quarter, quarter, slope=slope)
        self.conv7x7_3 = _normalised(quarter, quarter)

    def forward(self, features: Any) -> Any:
        wider = self.conv5X5_1(features)
        windows = [self.conv3X3(features), self.conv5X5_2(wider), self.conv7x7_3(self.conv7X7_2(wider))]
        return relu(torch.cat(windows, dim=1))


class Head(nn.Module):  # type: ignore[misc]
    """`values` numbers for each proposal of each cell: (n, c, h, w) → (n, h · w · proposals, values)."""

    def __init__(self, inputs: int, values: int) -> None:
        super().__init__()
        self._values = values
        self.conv1x1 = nn.Conv2d(inputs, PROPOSALS * values, 1)

    def forward(self, features: Any) -> Any:
        cells = self.conv1x1(features).permute(0, 2, 3, 1)
        return cells.reshape(cells.shape[0], -1, self._values)


def load_weights(content: bytes, backbone: Backbone, what: str = "the file of weights") -> RetinaFaceNetwork:
    """The network with the weights of a file, in eval mode, on the CPU. what: names the file in errors.

    Raises `MaskwatchError` as `torch_weights.read_state` and `torch_weights.fill` do.
    """
    network = RetinaFaceNetwork(backbone)
    fill(network, read_state(content, what), what)
    return network


def export_onnx(network: RetinaFaceNetwork) -> bytes:
    """The network as an ONNX file for any number of images of any size, normalisations folded into convolutions.

    The input is `batch`, the outputs are `OUTPUTS`.
    """
    written = io.BytesIO()
    axes = {name: {0: "n", 1: "priors"} for name in OUTPUTS}
    with warnings.catch_warnings():
        # torch wants its other exporter, which needs one more package and does no better for such a network.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, 96, 64),),
            written,
            input_names=["batch"],
            output_names=list(OUTPUTS),
            dynamic_axes={"batch": {0: "n", 2: "height", 3: "width"}, **axes},
            opset_version=OPSET,
            dynamo=False,
        )
    return written.getvalue()


def _normalised(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, slope: float | None = None) -> Any:
    """A convolution and its normalisation, then a leaky ReLU where a slope is given."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if slope is not None:
        layers.append(nn.LeakyReLU(slope))
    return nn.Sequential(*layers)


def _separable(inputs: int, outputs: int, stride: int = 1) -> Any:
    """A 3×3 convolution of each channel by itself, and a 1×1 across channels."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(SLOPE),
    )


def _residual_stage(inputs: int, width: int, blocks: int, stride: int) -> Any:
    first = Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)))


def _slope(width: int) -> float:
    """The slope of the pyramid's and the context modules' ReLU: leaky where maps are narrow."""
    return SLOPE if width <= 64 else 0.0
