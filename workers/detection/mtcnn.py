"""MTCNN: a cascade of three small networks over a pyramid of the image, under ONNX Runtime or torch.

Zhang et al. (arXiv 1604.02878), with the weights, thresholds and steps of github.com/timesler/facenet-pytorch (MIT).
The networks are defined in `mtcnn_network`, which needs torch; this module doesn't, once the ONNX files have been made
from the weights. It is here only for comparison: masks hide the chin and mouth that it searches for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import ModelRef, PipelineSpec
from workers.detection import Detections
from workers.detection._ops import MIN_SIDE_PX, Boxes, clip, has_area, nms, nms_by_smaller
from workers.detection._scaling import resize, scale_for
from workers.inference import Engine, Runtime, Session
from workers.inference.derived import derived_onnx
from workers.inference.faults import in_parts
from workers.inference.onnx_session import make_session
from workers.weights.files import read_files

NAMES = ("pnet", "rnet", "onet")
#: Raised when the exported files change: see `derived_onnx`.
EXPORT_VERSION = "1"
#: The smallest face that is searched for, in pixels of the scaled image, and the size of each level of the pyramid as a
#: fraction of the one before: facenet-pytorch's values.
MIN_FACE_PX, SHRINK = 20, 0.709
#: The proposal network's window, and the pixels from one to the next.
WINDOW_PX, STRIDE_PX = 12, 2
#: The sides of the inputs of the second and the third network.
REFINED_PX, OUTPUT_PX = 24, 48
#: Score thresholds of the first two networks. That of the third is the pipeline's.
PROPOSAL_THRESHOLD, REFINEMENT_THRESHOLD = 0.6, 0.7
#: IoU from which the weaker box is dropped: within a level of the pyramid, and later.
LEVEL_IOU, NMS_IOU = 0.5, 0.7
#: At most this many candidates, the best, go on to the next network, to limit the work for a hostile image.
MAX_CANDIDATES = 2000


class Mtcnn:
    """The detector of a pipeline."""

    def __init__(self, spec: PipelineSpec, pnet: Session, rnet: Session, onet: Session) -> None:
        self._spec = spec
        self._pnet, self._rnet, self._onet = pnet, rnet, onet

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3): boxes in its pixels, best score first."""
        height, width = image_rgb.shape[:2]
        scaled, scale_xyxy = resize(image_rgb, scale_for(width, height, self._spec))
        boxes = squares(self._proposals(scaled))
        boxes, scores, shifts = self._refine(self._rnet, scaled, boxes, REFINED_PX, REFINEMENT_THRESHOLD)
        kept = nms(boxes, scores, NMS_IOU)
        boxes = squares(moved(boxes[kept], shifts[kept]))
        boxes, scores, shifts = self._refine(self._onet, scaled, boxes, OUTPUT_PX, self._spec.detector_threshold)
        boxes = moved(boxes, shifts)
        kept = nms_by_smaller(boxes, scores, NMS_IOU)
        boxes, scores = clip(boxes[kept] / scale_xyxy, width, height), scores[kept]
        whole = has_area(boxes, at_least_px=MIN_SIDE_PX)
        return Detections(boxes[whole], scores[whole])

    def _proposals(self, scaled: NDArray[np.uint8]) -> Boxes:
        """The boxes that the first network proposes, at all levels of the pyramid."""
        levels = []
        for scale in pyramid(*scaled.shape[:2]):
            level, scale_xyxy = resize(scaled, scale)
            scores, shifts = self._pnet.run(to_input(level)[None])
            boxes, found, moves = windows(scores[0], shifts[0], PROPOSAL_THRESHOLD)
            kept = nms(boxes, found, LEVEL_IOU)
            levels.append((boxes[kept] / scale_xyxy, found[kept], moves[kept]))
        if not levels:
            return np.zeros((0, 4), np.float32)
        boxes, found, moves = (np.concatenate(part) for part in zip(*levels, strict=True))
        kept = nms(boxes, found, NMS_IOU)[:MAX_CANDIDATES]
        return moved(boxes[kept], moves[kept])

    def _refine(
        self, session: Session, scaled: NDArray[np.uint8], boxes: Boxes, side: int, threshold: float
    ) -> tuple[Boxes, NDArray[np.float32], NDArray[np.float32]]:
        """Run a network on boxes: those that reach its threshold, their scores (n,) and shifts (n, 4)."""
        # Boxes wholly outside the image, or thinner than a pixel, have no pixels to run on.
        boxes = boxes[has_area(clip(boxes.round(), scaled.shape[1], scaled.shape[0]))]
        if not len(boxes):
            return boxes, np.zeros(0, np.float32), np.zeros((0, 4), np.float32)

        def run(part: slice) -> list[NDArray[np.float32]]:
            return session.run(np.stack([to_input(cut(scaled, box, side)) for box in boxes[part]]))

        scores, shifts = (np.concatenate(each) for each in zip(*in_parts(run, len(boxes), len(boxes)), strict=True))
        over = scores >= threshold
        return boxes[over], scores[over], shifts[over]


def load_mtcnn(spec: PipelineSpec, runtime: Runtime) -> Mtcnn:
    """The detector with the weights the pipeline pins.

    Errors as `workers.analysis.load.load_analyzer`, `derived_onnx` and `mtcnn_network.load_weights`.
    """
    return Mtcnn(spec, *_sessions(spec.detector, runtime))


@lru_cache(maxsize=4)
def _sessions(model: ModelRef, runtime: Runtime) -> tuple[Session, Session, Session]:
    pnet, rnet, onet = (_session(model, runtime, name) for name in NAMES)
    return pnet, rnet, onet


def _session(model: ModelRef, runtime: Runtime, name: str) -> Session:
    if runtime.engine is Engine.ONNX:
        content = derived_onnx(model, f"{name}-{EXPORT_VERSION}", lambda: _exported(model, name))
        return make_session(content, runtime)
    # Imported here: torch is not installed everywhere.
    from workers.inference.torch_session import TorchSession, torch_device

    torch_device(runtime)  # says what is missing, torch itself included, before torch is needed
    # Imported here: torch is not installed everywhere.
    from workers.detection.mtcnn_network import NETWORKS

    side = NETWORKS[name][1]
    return TorchSession(_network(model, name), runtime, ("n", 3, side or "height", side or "width"))


def _network(model: ModelRef, name: str) -> Any:
    # Imported here: torch is not installed everywhere.
    from workers.detection.mtcnn_network import load_weights

    return load_weights(read_files(model)[NAMES.index(name)], name)


def _exported(model: ModelRef, name: str) -> bytes:
    # Imported here: torch is not installed everywhere.
    from workers.detection.mtcnn_network import NETWORKS, export_onnx

    return export_onnx(_network(model, name), NETWORKS[name][1])


def pyramid(height: int, width: int) -> list[float]:
    """The scales of an image for the first network: the first makes `MIN_FACE_PX` fill its window."""
    scale, scales = WINDOW_PX / MIN_FACE_PX, []
    while min(height, width) * scale >= WINDOW_PX:
        scales.append(scale)
        scale *= SHRINK
    return scales


def to_input(image_rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An image, uint8 (h, w, 3), as the networks take it: float32 (3, h, w), RGB, nearly in [-1, 1]."""
    return (image_rgb.transpose(2, 0, 1).astype(np.float32) - np.float32(127.5)) / np.float32(128)


def windows(
    scores: NDArray[np.float32], shifts: NDArray[np.float32], threshold: float
) -> tuple[Boxes, NDArray[np.float32], NDArray[np.float32]]:
    """The first network's windows that reach the threshold: boxes (n, 4) in its input, scores (n,), shifts (n, 4).

    scores (y, x), shifts (4, y, x). At most `MAX_CANDIDATES`, the best.
    """
    rows, columns = np.nonzero(scores >= threshold)
    found = scores[rows, columns]
    if found.size > MAX_CANDIDATES:
        best = np.argsort(-found, kind="stable")[:MAX_CANDIDATES]
        rows, columns, found = rows[best], columns[best], found[best]
    corners = np.stack([columns, rows], axis=1).astype(np.float32) * STRIDE_PX
    return np.concatenate([corners, corners + WINDOW_PX], axis=1), found, shifts[:, rows, columns].T


def moved(boxes: Boxes, shifts: NDArray[np.float32]) -> Boxes:
    """Boxes (n, 4) with each edge moved by its shift (n, 4), a fraction of the box's width or height."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes + shifts * np.tile(sides, 2)


def squares(boxes: Boxes) -> Boxes:
    """The boxes (n, 4) made square around their centres, as large as their longer side."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    halves = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    return np.concatenate([centres - halves, centres + halves], axis=1)


def cut(image_rgb: NDArray[np.uint8], box: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """The image inside a box, (side, side, 3). The box must overlap the image; pixels outside of it are black."""
    height, width = image_rgb.shape[:2]
    x1, y1, x2, y2 = (int(edge) for edge in box.round())
    inner = image_rgb[max(0, y1) : min(height, y2), max(0, x1) : min(width, x2)]
    if inner.shape[:2] != (y2 - y1, x2 - x1):
        inner = cv2.copyMakeBorder(
            inner, max(0, -y1), max(0, y2 - height), max(0, -x1), max(0, x2 - width), cv2.BORDER_CONSTANT
        )  # fmt: skip
    interpolation = cv2.INTER_AREA if inner.shape[0] > side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(inner, (side, side), interpolation=interpolation), np.uint8)
