"""RetinaFace: the notebook's detector (ResNet50) and a smaller one (MobileNet), under ONNX Runtime or torch.

The network is defined in `retinaface_network`, which needs torch; this module doesn't, once the ONNX file has been made
from the weights. Pre- and post-processing are those of fdet 0.2.1 and github.com/biubug6/Pytorch_Retinaface, so the
same weights find the same faces, except that images are scaled as the pipeline says and boxes end at the image's edge.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.domain import ModelRef, PipelineSpec
from workers.detection import Detections
from workers.detection._anchors import decode, priors
from workers.detection._ops import MIN_SIDE_PX, clip, has_area, nms
from workers.detection._scaling import resize, scale_for
from workers.inference import Engine, Runtime, Session
from workers.inference.derived import derived_onnx
from workers.inference.onnx_session import make_session
from workers.weights.files import read_model

#: The backbone of each model of the manifest.
BACKBONES: dict[str, Literal["resnet50", "mobilenet"]] = {
    "retinaface-resnet50": "resnet50",
    "retinaface-mobilenet": "mobilenet",
}
#: Raised when the exported file changes: see `derived_onnx`.
EXPORT_VERSION = "retinaface-1"
#: What is subtracted from blue, green and red: the means of ImageNet, as the weights were trained.
MEAN_BGR = (104, 117, 123)
#: The IoU from which the weaker of two boxes is dropped; the authors' own value.
NMS_IOU = 0.4
#: At most this many candidates, the best, enter the suppression, to limit the work for a hostile image.
MAX_CANDIDATES = 5000


class RetinaFace:
    """The detector of a pipeline."""

    def __init__(self, spec: PipelineSpec, session: Session) -> None:
        self._spec = spec
        self._session = session

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3): boxes in its pixels, best score first."""
        height, width = image_rgb.shape[:2]
        scaled, scale_xyxy = resize(image_rgb, scale_for(width, height, self._spec))
        locations, scores, _ = self._session.run(to_input(scaled))
        boxes, found = find(locations[0], scores[0], priors(*scaled.shape[:2]), self._spec.detector_threshold)
        boxes = clip(boxes / scale_xyxy, width, height)
        whole = has_area(boxes, at_least_px=MIN_SIDE_PX)
        return Detections(boxes[whole], found[whole])


def load_retinaface(spec: PipelineSpec, runtime: Runtime) -> RetinaFace:
    """The detector with the weights the pipeline pins.

    Errors as `workers.analysis.load.load_analyzer`, `derived_onnx` and `retinaface_network.load_weights`.
    """
    return RetinaFace(spec, _session(spec.detector, runtime))


@lru_cache(maxsize=4)
def _session(model: ModelRef, runtime: Runtime) -> Session:
    if runtime.engine is Engine.ONNX:
        return make_session(derived_onnx(model, EXPORT_VERSION, lambda: _exported(model)), runtime)
    # Imported here: torch is not installed everywhere.
    from workers.inference.torch_session import TorchSession, torch_device

    torch_device(runtime)  # says what is missing, torch itself included, before torch is needed
    return TorchSession(_network(model), runtime, ("n", 3, "height", "width"))


def to_input(image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network's input for an image, uint8 (h, w, 3): float32 (1, 3, h, w), BGR minus `MEAN_BGR`."""
    batch = np.empty((1, 3, *image_rgb.shape[:2]), np.float32)
    for channel, mean in enumerate(MEAN_BGR):
        np.subtract(image_rgb[:, :, 2 - channel], np.float32(mean), out=batch[0, channel])
    return batch


def find(
    locations: NDArray[np.float32],
    scores: NDArray[np.float32],
    priors_px: NDArray[np.float32],
    threshold: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (n, 4) xyxy in pixels of the input, best first, and their scores (n,); neither clipped nor scaled.

    locations (p, 4), scores (p,): the network's outputs for one image; priors_px (p, 3): its prior boxes. Only
    locations that reach the threshold are decoded: a few hundred of tens of thousands.
    """
    candidates = np.flatnonzero(scores >= threshold)
    if candidates.size > MAX_CANDIDATES:
        candidates = candidates[np.argsort(-scores[candidates], kind="stable")[:MAX_CANDIDATES]]
    boxes, found = decode(locations[candidates], priors_px[candidates]), scores[candidates]
    kept = nms(boxes, found, NMS_IOU)
    return boxes[kept], found[kept]


def _network(model: ModelRef) -> Any:
    # Imported here: torch is not installed everywhere.
    from workers.detection.retinaface_network import load_weights

    return load_weights(read_model(model), BACKBONES[model.name], what=f"the file of {model.name}")


def _exported(model: ModelRef) -> bytes:
    # Imported here: torch is not installed everywhere.
    from workers.detection.retinaface_network import export_onnx

    return export_onnx(_network(model))
