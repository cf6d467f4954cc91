"""Measures a classifier on labelled faces. Also holds the rules of all figures: size bins, matching detections to
faces, balanced accuracy, average precision, uncertain faces.

Knows neither click nor a console; `workers/cli/evaluate_faces.py` prints the results. Whole scenes are left to
`scenes`, comparing detectors to `detectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from workers.datasets.annotations import CLASS_NAMES, Box, LabelledBox
from workers.datasets.augment import fixed_crop
from workers.datasets.dataset import FaceSample
from workers.detection._ops import iou
from workers.evaluation.calibration import calibration_figures

#: A detection and a labelled face are the same if they overlap at least this much (Pascal VOC).
MATCH_IOU = 0.5

#: Longer side of the labelled box in pixels, [from, below).
SIZE_BINS = {
    "<16": (0.0, 16.0), "16–24": (16.0, 24.0), "24–32": (24.0, 32.0), "32–64": (32.0, 64.0), "≥64": (64.0, np.inf),
}  # fmt: skip

#: Bins for which the tests set minimum figures.
COMBINED_BINS = {"16–32": (16.0, 32.0), "≥32": (32.0, np.inf)}

#: Labels of smaller faces are too doubtful to measure a classifier with.
JUDGED_FROM_PX = 24.0

#: Thresholds in the table of uncertain faces; at 0.5 no face is uncertain.
UNCERTAIN_BELOW = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

#: How many of the worst mistakes of a kind are kept at most, to be shown.
WORST = 32

#: How many faces are classified between two reports of progress; also limits how many crops are in memory.
CHUNK = 256

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]


def size_bin(size_px: float) -> str:
    """The name of the bin a face of this size falls into."""
    return next(name for name, (low, high) in SIZE_BINS.items() if low <= size_px < high)


def match(labelled: Sequence[LabelledBox], boxes: Sequence[Box], scores: Sequence[float]) -> list[int | None]:
    """For each labelled box the index of its detection, or None. Boxes: xyxy, in pixels of the image.

    One to one: in the order of their scores, each detection takes the free labelled box that it overlaps most. In
    Pascal VOC, unlike here, a detection whose best box is taken gets no other.
    """
    matched: list[int | None] = [None] * len(labelled)
    if not labelled or not boxes:
        return matched
    overlaps = iou(np.array(boxes, np.float32), np.array([entry.box for entry in labelled], np.float32))
    for index in sorted(range(len(boxes)), key=lambda at: -scores[at]):
        best = int(overlaps[index].argmax())
        if overlaps[index, best] >= MATCH_IOU:
            matched[best] = index
            overlaps[:, best] = 0  # taken
    return matched


def balanced_accuracy(confusion: Sequence[Sequence[int]]) -> float | None:
    """Mean of the classes' recalls; rows are the true classes. None if a class has no face."""
    if not all(sum(row) for row in confusion):
        return None
    return float(np.mean([row[at] / sum(row) for at, row in enumerate(confusion)]))


@dataclass(slots=True)
class ScoredDetections:
    """All detections of a set of images: the score of each, and whether it matched a labelled face (`match`)."""

    scores: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, scores: Sequence[float], matched: Sequence[int | None]) -> None:
        """Counts one image: the scores of its detections, and what `match` said of its labelled faces."""
        found = set(matched)
        self.scores += scores
        self.hits += [index in found for index in range(len(scores))]

    def curve(self, labelled: int) -> tuple[list[float], list[float]]:
        """(recalls, precisions) of `labelled` faces, one pair for every score as threshold, the highest first.

        Detections of equal score are counted together: no threshold could separate them.
        """
        if labelled < 1:
            raise ValueError(f"labelled is {labelled}; valid: at least 1")
        scores, hits = np.array(self.scores), np.array(self.hits, bool)
        order = np.argsort(-scores, kind="stable")
        last_of_score = np.append(np.diff(scores[order]) != 0, True)[: len(scores)]
        right = np.cumsum(hits[order])[last_of_score]
        counted = np.arange(1, len(scores) + 1)[last_of_score]
        return (right / labelled).tolist(), (right / counted).tolist()

    def average_precision(self, labelled: int) -> float:
        """The area under precision over recall, interpolated at all points: PASCAL VOC's measure since 2010.

        At each recall, the best precision at this recall or a higher one counts (Everingham et al.,
        "The PASCAL Visual Object Classes Challenge: A Retrospective", 2015, section 2.2).
        """
        recalls, precisions = self.curve(labelled)
        best_from_here = np.maximum.accumulate(precisions[::-1])[::-1]
        return float(np.sum(np.diff([0.0, *recalls]) * best_from_here))


@dataclass(frozen=True, slots=True, eq=False)  # comparing arrays gives no single bool
class Mistake:
    """One mistake, to be shown: the pixels, how bad it is (higher is worse), and a description."""

    crop: Pixels
    badness: float
    words: str


def worst(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The worst ones, the worst first."""
    return sorted(mistakes, key=lambda mistake: -mistake.badness)[:WORST]


def said(p_with_mask: float) -> int:
    """The class with the larger probability, as an index into `CLASS_NAMES`; a tie is `with_mask`, as in production."""
    return 0 if p_with_mask >= 1 - p_with_mask else 1


def two_probabilities(p_with_mask: Sequence[float] | NDArray[np.float32]) -> Probabilities:
    """float64 (n, 2) as faces are stored: the second probability follows from the first."""
    first = np.asarray(p_with_mask, np.float64).reshape(-1).clip(0, 1)
    return np.stack([first, 1 - first], axis=1)


def uncertain_bands(probabilities: Probabilities, labels: Labels, configured: float) -> list[dict[str, Any]]:
    """For each threshold, including the configured one: the share of faces that are `uncertain`, and how often the rest
    is classified right. Ready for JSON."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    rows = []
    for below in sorted({*UNCERTAIN_BELOW, configured}):
        certain = confidence >= below
        figures = label_figures(labels[certain], probabilities[certain].argmax(axis=1))
        rows.append(
            {
                "below": below,
                "configured": below == configured,
                "uncertain_share": ratio(int((~certain).sum()), len(labels)),
                "accuracy": ratio(int(right[certain].sum()), int(certain.sum())),
                "balanced_accuracy": figures["balanced_accuracy"],
                "confusion": figures["confusion"],
            }
        )
    return rows


def mislabelled_words(label: int, sureness: float, size_px: float, name: str) -> str:
    """The description of a `Mistake` of the classifier; sureness: the probability of the wrong class."""
    return f"{CLASS_NAMES[label]}, called {CLASS_NAMES[1 - label]} {sureness:.2f}, {size_px:.0f} px: {name}"


def ratio(part: int, whole: int) -> float | None:
    """part / whole; None if there was nothing to count."""
    return part / whole if whole else None


@dataclass(frozen=True, slots=True, eq=False)
class FaceResults:
    """A classifier's results on labelled faces: probabilities float64 (n, 2), and their samples.

    face_px: the size that larger faces were scaled down to, or None.
    """

    samples: Sequence[FaceSample]
    probabilities: Probabilities
    face_px: float | None

    @property
    def labels(self) -> Labels:
        return np.array([sample.label for sample in self.samples], np.int64)

    def seen_px(self, sample: FaceSample) -> float:
        """The size at which the classifier saw the face."""
        return sample.size_px if self.face_px is None else min(self.face_px, sample.size_px)

    def summary(self, uncertain_below: float) -> dict[str, Any]:
        """All figures, ready for JSON: scikit-learn's report, one row per face size, calibration, uncertain faces."""
        from sklearn.metrics import classification_report

        labels, predicted = self.labels, self.probabilities.argmax(axis=1)
        bins = np.array([size_bin(self.seen_px(sample)) for sample in self.samples])
        wrongly_worn = np.array([sample.worn_wrongly for sample in self.samples])
        names = {"target_names": CLASS_NAMES, "labels": [0, 1], "zero_division": 0}
        return {
            "all": label_figures(labels, predicted),
            "sizes": {
                name: label_figures(labels[bins == name], predicted[bins == name])
                for name in SIZE_BINS
                if (bins == name).any()
            },
            "worn_wrongly": {
                "faces": int(wrongly_worn.sum()),
                "called_without_mask": int((predicted[wrongly_worn] == 1).sum()),
            },
            "calibration": calibration_figures(self.probabilities, labels),
            "uncertain": uncertain_bands(self.probabilities, labels, uncertain_below),
            "report": classification_report(labels, predicted, output_dict=True, **names),
            "report_text": classification_report(labels, predicted, digits=3, **names),
        }

    def mislabelled(self) -> list[Mistake]:
        """The worst of the faces that were called the other class, as the classifier saw them."""
        labels, predicted = self.labels, self.probabilities.argmax(axis=1)
        sureness = self.probabilities.max(axis=1)
        wrong = np.flatnonzero(predicted != labels)
        found = []
        for at in wrong[np.argsort(-sureness[wrong], kind="stable")][:WORST].tolist():
            sample = self.samples[at]
            words = mislabelled_words(sample.label, sureness[at], self.seen_px(sample), sample.name)
            found.append(Mistake(fixed_crop(sample, self.face_px), float(sureness[at]), words))
        return found


def evaluate_faces(
    samples: Sequence[FaceSample],
    classify: Callable[[Sequence[Pixels]], NDArray[np.float32]],
    face_px: float | None = None,
    on_faces: Callable[[int, int], None] = lambda done, total: None,
) -> FaceResults:
    """Runs a classifier on labelled faces.

    A face of a class folder is its whole image, a face of a scene is cut as in production. face_px: larger faces
    are scaled down to this many pixels first, as a distant camera would see them. `on_faces` is called with faces done
    and all faces. Raises `MaskwatchError` if a class has no face.
    """
    for label, name in enumerate(CLASS_NAMES):
        if not any(sample.label == label for sample in samples):
            raise MaskwatchError(f"none of the {len(samples)} faces is {name}: measuring a classifier needs both")
    p_with_mask = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        p_with_mask.append(classify([fixed_crop(sample, face_px) for sample in chunk])[:, 0])
        on_faces(start + len(chunk), len(samples))
    return FaceResults(samples, two_probabilities(np.concatenate(p_with_mask)), face_px)


def label_figures(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, Any]:
    """Number of faces, balanced accuracy and confusion (rows: true classes) of predicted class indices."""
    confusion = [[int(((labels == true) & (predicted == said)).sum()) for said in (0, 1)] for true in (0, 1)]
    return {"faces": len(labels), "balanced_accuracy": balanced_accuracy(confusion), "confusion": confusion}


def confusion_rows(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows for a table: the true class, then how often each class was predicted."""
    return [[f"is {name}", *row] for name, row in zip(CLASS_NAMES, summary["confusion"], strict=True)]
