"""Face detectors behind one protocol, chosen by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Detections:
    """The faces of one image, best score first.

    boxes_xyxy: float32 (n, 4), pixels of the original image, inside it, with positive area.
    scores: float32 (n,), in [0, 1].
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.boxes_xyxy.ndim != 2 or self.boxes_xyxy.shape[1] != 4:
            raise ValueError(f"boxes_xyxy has shape {self.boxes_xyxy.shape}; valid: (n, 4)")
        if self.scores.shape != (len(self.boxes_xyxy),):
            raise ValueError(f"scores has shape {self.scores.shape}; valid: ({len(self.boxes_xyxy)},)")

    def __len__(self) -> int:
        return len(self.scores)


class FaceDetector(Protocol):
    """Finds faces in an image."""

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        """Faces of one RGB image, uint8 (height, width, 3)."""
        ...
