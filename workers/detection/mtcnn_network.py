"""The three networks of MTCNN in torch: one proposes faces, one filters them, one refines them.

Zhang et al., "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks" (arXiv 1604.02878),
with the names of github.com/timesler/facenet-pytorch (MIT), so that its files load. Needs torch alone. The cascade
around them is the business of `mtcnn`.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.functional import softmax

from workers.inference.torch_weights import fill, read_state

#: Operators of ONNX that the exported networks use.
OPSET = 17
OUTPUTS = ("scores", "shifts")


class ProposalNetwork(nn.Module):  # type: ignore[misc]
    """Float32 (n, 3, h, w) → scores (n, y, x), shifts (n, 4, y, x): one per window of 12 pixels, every 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, batch: Any) -> tuple[Any, Any]:
        x = self.pool1(self.prelu1(self.conv1(batch)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return softmax(self.conv4_1(x), dim=1)[:, 1], self.conv4_2(x)


class RefinementNetwork(nn.Module):  # type: ignore[misc]
    """Float32 (n, 3, 24, 24) → scores (n,), shifts (n, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, batch: Any) -> tuple[Any, Any]:
        x = self.pool1(self.prelu1(self.conv1(batch)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu4(self.dense4(_by_column(self.prelu3(self.conv3(x)))))
        return softmax(self.dense5_1(x), dim=1)[:, 1], self.dense5_2(x)


class OutputNetwork(nn.Module):  # type: ignore[misc]
    """Float32 (n, 3, 48, 48) → scores (n,), shifts (n, 4). The weights of its landmarks are read and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, batch: Any) -> tuple[Any, Any]:
        x = self.pool1(self.prelu1(self.conv1(batch)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu5(self.dense5(_by_column(self.prelu4(self.conv4(x)))))
        return softmax(self.dense6_1(x), dim=1)[:, 1], self.dense6_2(x)


#: The networks by the name of their file, and the side of the images they take; None: of any size.
NETWORKS: dict[str, tuple[type[nn.Module], int | None]] = {
    "pnet": (ProposalNetwork, None),
    "rnet": (RefinementNetwork, 24),
    "onet": (OutputNetwork, 48),
}


def load_weights(content: bytes, name: str) -> Any:
    """One of `NETWORKS` with the weights of its file, in eval mode, on the CPU.

    Raises `MaskwatchError` as `torch_weights.read_state` and `torch_weights.fill` do.
    """
    network = NETWORKS[name][0]()
    what = f"{name}.pt of mtcnn"
    fill(network, read_state(content, what), what)
    return network


def export_onnx(network: Any, side: int | None) -> bytes:
    """A network as an ONNX file for any number of images: of this side, or of any size. Outputs: `OUTPUTS`."""
    written = io.BytesIO()
    axes: dict[str, dict[int, str]] = {name: {0: "n"} for name in ("batch", *OUTPUTS)}
    if side is None:
        axes = {
            "batch": {0: "n", 2: "height", 3: "width"},
            "scores": {0: "n", 1: "rows", 2: "columns"},
            "shifts": {0: "n", 2: "rows", 3: "columns"},
        }
    with warnings.catch_warnings():
        # torch wants its other exporter, which needs one more package and does no better for such a network.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, side or 24, side or 32),),
            written,
            input_names=["batch"],
            output_names=list(OUTPUTS),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    return written.getvalue()


def _by_column(features: Any) -> Any:
    """(n, c, h, w) → (n, w · h · c): the order in which the dense layers' weights were trained."""
    return features.permute(0, 3, 2, 1).flatten(1)
