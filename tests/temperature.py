"""What another temperature does to a network's probabilities: the reference for temperatures that were fitted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def apply_temperature(probabilities: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """The probabilities (n, classes) the network would have given with its logits divided by `temperature`, above 0.

    Which class is the likelier, and which face is the surer one, never changes.
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
