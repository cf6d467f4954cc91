"""Mask classifiers behind one protocol, chosen by name. Class order everywhere: 0 with_mask, 1 without_mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class MaskClassifier(Protocol):
    """Decides whether a face wears a mask."""

    def classify(self, crops_rgb: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Probabilities, float32 (n, 2), rows sum to 1, for RGB crops uint8 (h, w, 3) of any size.

        Resizing to the network's input and scaling to [-1, 1] happen inside.
        """
        ...
