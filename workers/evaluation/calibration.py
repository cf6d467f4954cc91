"""Measures how well a classifier's probabilities are calibrated, and fits the temperature that improves them.

Pure functions over probabilities and labels. Computing probabilities is left to the callers, applying a temperature to
`workers.training.export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Equal-width bins of the confidence over (0, 1], as Guo et al. count them ("On Calibration of Modern Neural Networks",
#: 2017, section 2). With two classes the confidence is at least 0.5, so that the lower ones stay empty.
BINS = 15

#: The range of temperatures. If all faces are classified right, a lower temperature always fits better.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.2, 10.0

#: Halvings of that range: its width times 2⁻⁵⁰ is below what a float tells apart.
_STEPS = 50

#: Smaller probabilities are replaced by this one, the smallest normal float32, because log(0) has no value.
_SMALLEST = float(np.finfo(np.float32).tiny)

Probabilities = NDArray[np.float32] | NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The faces with a confidence in (low, high]: the mean confidence, and the share that is classified right.

    confidence and accuracy are means, None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None

    @property
    def gap(self) -> float | None:
        """Confidence minus accuracy: above 0 the classifier is overconfident."""
        return None if self.confidence is None or self.accuracy is None else self.confidence - self.accuracy


def reliability_bins(probabilities: Probabilities, labels: Labels, bins: int = BINS) -> list[ReliabilityBin]:
    """All bins from the lowest to the highest, for probabilities (n, classes) and true class indices (n,).

    The confidence of a face is its largest probability. Raises `ValueError` for arrays that don't fit each other.
    """
    _check(probabilities, labels)
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0, 1, bins + 1)
    # Bin m holds (m/bins, (m+1)/bins]. Rounding may carry a sum of probabilities a little above 1.
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found = []
    for number in range(bins):
        within = at == number
        count = int(within.sum())
        means = (float(confidence[within].mean()), float(right[within].mean())) if count else (None, None)
        found.append(ReliabilityBin(float(edges[number]), float(edges[number + 1]), count, *means))
    return found


def calibration_error(bins: Sequence[ReliabilityBin]) -> float | None:
    """Expected calibration error: the mean of the bins' |gap|, weighted by their faces. None without a face."""
    total = sum(entry.count for entry in bins)
    if total == 0:
        return None
    return sum(abs(entry.gap) * entry.count for entry in bins if entry.gap is not None) / total


def brier_score(probabilities: Probabilities, labels: Labels) -> float:
    """Mean squared distance of the true class's probability from 1: 0 is best; always answering 0.5 gives 0.25.

    Brier (1950), for two classes, in its usual half form. Raises `ValueError` as `reliability_bins`.
    """
    _check(probabilities, labels)
    return float(np.mean((1 - _of_label(probabilities, labels)) ** 2))


def negative_log_likelihood(probabilities: Probabilities, labels: Labels) -> float:
    """Mean of -log of the true class's probability, the loss of a training. Raises as `reliability_bins`."""
    _check(probabilities, labels)
    return float(-np.mean(np.log(np.maximum(_of_label(probabilities, labels), _SMALLEST))))


def calibration_figures(probabilities: Probabilities, labels: Labels) -> dict[str, Any]:
    """All figures of calibration, ready for JSON, with the signed gaps of the filled bins. None without a face."""
    bins = reliability_bins(probabilities, labels)
    return {
        "expected_calibration_error": calibration_error(bins),
        "brier_score": brier_score(probabilities, labels) if len(labels) else None,
        "negative_log_likelihood": negative_log_likelihood(probabilities, labels) if len(labels) else None,
        "bins": [{**asdict(entry), "gap": entry.gap} for entry in bins if entry.count],
    }


def fit_temperature(probabilities: Probabilities, labels: Labels) -> float:
    """The temperature T for which the softmax of logits / T gives the labels the highest likelihood.

    Takes probabilities (n, classes), since their logarithms are the logits up to a constant that the softmax cancels.
    Above 1: the classifier was overconfident. Raises `ValueError` for arrays that don't fit each other and for no
    faces.
    """
    _check(probabilities, labels)
    if len(labels) == 0:
        raise ValueError("a temperature can't be fitted without faces")
    logits = _logits(probabilities)
    of_label = logits[np.arange(len(labels)), labels]

    def slope(sharpness: float) -> float:
        """Derivative of the loss with respect to 1 / T. It is increasing, since the loss is convex in 1 / T."""
        expected = (_softmax(logits * sharpness) * logits).sum(axis=1)
        return float(np.mean(expected - of_label))

    low, high = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return 2 / (low + high)


def _logits(probabilities: Probabilities) -> NDArray[np.float64]:
    return np.asarray(np.log(np.maximum(probabilities.astype(np.float64), _SMALLEST)))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _of_label(probabilities: Probabilities, labels: Labels) -> NDArray[np.float64]:
    return probabilities[np.arange(len(labels)), labels].astype(np.float64)


def _check(probabilities: Probabilities, labels: Labels) -> None:
    if probabilities.ndim != 2 or len(probabilities) != len(labels):
        raise ValueError(f"probabilities have shape {probabilities.shape}; valid: ({len(labels)}, classes)")
    classes = probabilities.shape[1]
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}; valid: 0 to {classes - 1}")
