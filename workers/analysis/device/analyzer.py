"""Finds and classifies the faces of frames on a GPU, as `workers.analysis.analyzer.Analyzer` does, in batches.

Frames are uploaded once and faces downloaded once; in between all data stay on the device. The size of a batch is found
by trying: a batch that exceeds the memory is halved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.domain import Face, MaskwatchError, PipelineSpec
from common.observability import metrics
from common.observability.metrics import Stage
from workers.analysis.device.detectors import DeviceDetector, load_device_detector, ready
from workers.analysis.device.images import face_crops
from workers.classification.verdict import face_of
from workers.inference import Runtime
from workers.inference.faults import OutOfModelMemoryError, in_parts, told
from workers.inference.onnx_in_torch import to_torch
from workers.inference.torch_session import torch_device
from workers.weights.files import read_model

#: Most frames of one batch, even if more fit: larger batches aren't faster, and each frame waits longer.
MAX_FRAMES = 32
#: Most faces classified at once, so that a crowd takes no more memory than this many crops.
MAX_CROPS = 512


class DeviceAnalyzer:
    """The pipeline of a `PipelineSpec` on one device, ready to analyse frames in batches or one by one."""

    def __init__(self, spec: PipelineSpec, detector: DeviceDetector, classifier: Any, side: int, device: Any) -> None:
        """classifier: a torch module, (m, side, side, 3) in [-1, 1] → probabilities (m, 2); on `device`, as the
        detector."""
        self.spec = spec
        self.detector = detector
        self.classifier = classifier
        self._side = side
        self._device = device
        #: Size of frames (height, width) → how many fit in a batch, for sizes of which `MAX_FRAMES` didn't fit.
        self._fitting: dict[tuple[int, int], int] = {}

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        """The faces of one RGB image, uint8 (height, width, 3), the surest detection first."""
        (faces,) = self.analyze_batch([image_rgb])
        return faces

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        """The faces of each frame, uint8 (height, width, 3), in the order of the frames; as `analyze`.

        Frames of one size are analysed together. Raises `OutOfModelMemoryError` for a frame that doesn't fit the
        memory of the device even alone, else as `workers.inference.faults.told`.
        """
        of_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, frame in enumerate(frames_rgb):
            of_size[frame.shape[0], frame.shape[1]].append(index)
        found: list[list[Face]] = [[] for _ in frames_rgb]
        for size, indices in of_size.items():
            while indices:
                batch, indices = self._fit(size, indices)
                faces = self._faces([frames_rgb[index] for index in batch])
                if faces is None:
                    self._fitting[size] = self._half(size, len(batch))
                    indices = batch + indices
                    continue
                for index, each in zip(batch, faces, strict=True):
                    found[index] = each
        return found

    def _fit(self, size: tuple[int, int], indices: list[int]) -> tuple[list[int], list[int]]:
        """The next batch, and what is left after it."""
        count = self._fitting.get(size, MAX_FRAMES)
        return indices[:count], indices[count:]

    def _half(self, size: tuple[int, int], count: int) -> int:
        if count == 1:
            raise OutOfModelMemoryError(
                f"a frame of {size[1]}×{size[0]} pixels doesn't fit the free memory of {self._device}: let fewer "
                "processes share the GPU, or lower MASKWATCH_PIPELINE__SHRINK_ABOVE_PX"
            )
        return count // 2

    def _faces(self, frames: list[NDArray[np.uint8]]) -> list[list[Face]] | None:
        """The faces of frames of one size; None if the memory of the device is too small for them."""
        try:
            rows = told(lambda: self._run(frames))
        except OutOfModelMemoryError:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        faces: list[list[Face]] = [[] for _ in frames]
        for index, x1, y1, x2, y2, score, p_with_mask in rows.tolist():
            faces[int(index)].append(face_of((x1, y1, x2, y2), score, p_with_mask, self.spec.uncertain_below))
        return faces

    def _run(self, frames: list[NDArray[np.uint8]]) -> Any:
        """One row per face on the CPU: float32 (m, 7), frame, box, score, P(mask); by frame, the best first."""
        with torch.inference_mode():
            with metrics.stage(Stage.DETECT):
                on_device = self._upload(frames)
                boxes, scores, kept = self.detector.detect(on_device)
                # Waits for the device, which must tell the number of faces, so the stage measures the detector's time.
                which, where = kept.nonzero(as_tuple=True)
            with metrics.stage(Stage.CLASSIFY):
                boxes, scores = boxes[which, where], scores[which, where]
                p_with_mask = self._classify(on_device, which, boxes)
                rows = torch.cat([which[:, None].float(), boxes, scores[:, None], p_with_mask[:, None]], dim=1)
                return rows.cpu()

    def _upload(self, frames: list[NDArray[np.uint8]]) -> Any:
        """uint8 (n, h, w, 3) on the device."""
        # From pinned memory the copy runs while the device computes; torch keeps such memory for the next batch.
        pinned = self._device.type == "cuda"
        staged = torch.empty((len(frames), *frames[0].shape), dtype=torch.uint8, pin_memory=pinned)
        np.stack(frames, out=staged.numpy())
        return staged.to(self._device, non_blocking=True)

    def _classify(self, frames: Any, which: Any, boxes: Any) -> Any:
        """P(mask) of each face: float32 (m,)."""

        def run(part: slice) -> Any:
            crops = face_crops(
                frames, which[part], boxes[part], self.spec.widen_below_px, self.spec.widen_factor, self._side
            )
            (probabilities,) = self.classifier(crops.to(next(self.classifier.buffers()).dtype))
            return probabilities[:, 0].float()

        return torch.cat([torch.empty(0, device=self._device), *in_parts(run, len(which), MAX_CROPS)])


def load_device_analyzer(spec: PipelineSpec, runtime: Runtime) -> DeviceAnalyzer:
    """The pipeline with its pinned models on the runtime's device: in half precision, on a CPU in single.

    The networks always run in torch, whichever engine the runtime names: with another engine, intermediate results
    would leave the device. Errors as `workers.analysis.load.load_analyzer`, and `MaskwatchError` for a model
    that torch can't run.
    """
    device = torch_device(runtime)
    precision = torch.float32 if device.type == "cpu" else torch.float16
    torch.set_num_threads(runtime.threads)
    detector = load_device_detector(spec, device, precision)
    classifier = to_torch(read_model(spec.classifier))
    shape = classifier.input_shape
    if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] != shape[2] or shape[3] != 3:
        raise MaskwatchError(f"the classifier's input has shape {shape}; valid: (n, side, side, 3)")
    return DeviceAnalyzer(spec, detector, ready(classifier, device, precision), shape[1], device)
