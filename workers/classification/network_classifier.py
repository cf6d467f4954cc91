"""Classifies crops with a network, under any runtime: two probabilities for each crop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from workers.classification._ops import prepare_crop
from workers.inference import Session
from workers.inference.faults import in_parts

#: Crops per forward pass: more gain nothing on a CPU, and cost memory for an image of a large crowd.
MAX_BATCH = 32


class NetworkMaskClassifier:
    """Classifies with a network of input float32 (n, side, side, 3) in [-1, 1] and softmax output (n, 2)."""

    def __init__(self, session: Session) -> None:
        shape = session.input_shape
        if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] != shape[2] or shape[3] != 3:
            raise MaskwatchError(f"the classifier's input has shape {shape}; valid: (n, side, side, 3)")
        self._session = session
        #: Crops are resized to this many pixels a side.
        self.side: int = shape[1]

    def classify(self, crops_rgb: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Probabilities float32 (n, 2), with_mask and without_mask, for RGB crops uint8 of any size.

        A batch that doesn't fit the memory is halved. Errors as `workers.inference.faults.in_parts`.
        """

        def run(part: slice) -> NDArray[np.float32]:
            batch = np.stack([prepare_crop(crop, self.side) for crop in crops_rgb[part]])
            (probabilities,) = self._session.run(batch)
            return probabilities

        return np.concatenate([np.empty((0, 2), np.float32), *in_parts(run, len(crops_rgb), MAX_BATCH)])
