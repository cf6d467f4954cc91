"""Measures the pipeline on labelled scenes (what it finds, per face size, and how often it labels that right) and the
classifier alone on labelled faces.

Knows neither click nor a console; `cli` prints what is computed here. Also home of the size bins and of balanced
accuracy, for whoever reports figures per face size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import Face, MaskStatus, PermanentJobError
from workers.detection._ops import iou
from workers.training.augment import fixed_crop
from workers.training.dataset import CLASS_NAMES, FaceSample, LabelledBox, read_voc, scene_pairs

#: A detection and a labelled face are the same if they overlap at least this much (Pascal VOC).
MATCH_IOU = 0.5

#: Longer side of the labelled box in pixels, [from, below).
SIZE_BINS = {
    "<16": (0.0, 16.0), "16–24": (16.0, 24.0), "24–32": (24.0, 32.0), "32–64": (32.0, 64.0), "≥64": (64.0, np.inf),
}  # fmt: skip

#: Bins that bars are set for.
COMBINED_BINS = {"16–32": (16.0, 32.0), "≥32": (32.0, np.inf)}

#: Labels of smaller faces are too doubtful to judge a classifier by.
JUDGED_FROM_PX = 24.0


def size_bin(size_px: float) -> str:
    """The name of the bin a face of this size falls into."""
    return next(name for name, (low, high) in SIZE_BINS.items() if low <= size_px < high)


def match(labelled: Sequence[LabelledBox], faces: Sequence[Face]) -> list[int | None]:
    """For each labelled box the index of its detection, or None.

    Detections choose in the order of their score, each the free labelled box it overlaps most, as in Pascal VOC,
    save that a box already taken leaves the next best. One to one.
    """
    matched: list[int | None] = [None] * len(labelled)
    if not labelled or not faces:
        return matched
    overlaps = iou(
        np.array([(face.x1, face.y1, face.x2, face.y2) for face in faces], np.float32),
        np.array([entry.box for entry in labelled], np.float32),
    )
    for index in sorted(range(len(faces)), key=lambda at: -faces[at].p_face):
        best = int(overlaps[index].argmax())
        if overlaps[index, best] >= MATCH_IOU:
            matched[best] = index
            overlaps[:, best] = 0  # taken
    return matched


def balanced_accuracy(confusion: Sequence[Sequence[int]]) -> float | None:
    """Mean of the classes' recalls, rows being the truth; None while a class has no face."""
    if not all(sum(row) for row in confusion):
        return None
    return float(np.mean([row[at] / sum(row) for at, row in enumerate(confusion)]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A labelled face and what the pipeline made of it: the detection that was matched, or None."""

    labelled: LabelledBox
    face: Face | None


@dataclass(slots=True)
class SceneResults:
    """All labelled faces with their outcomes, and what was detected in all."""

    outcomes: list[Outcome] = field(default_factory=list)
    detections: int = 0
    images: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def add(self, labelled: Sequence[LabelledBox], faces: Sequence[Face]) -> None:
        """Counts one picture."""
        self.images += 1
        self.detections += len(faces)
        for entry, index in zip(labelled, match(labelled, faces), strict=True):
            self.outcomes.append(Outcome(entry, None if index is None else faces[index]))

    def summary(self) -> dict[str, Any]:
        """Every figure, ready for JSON. Ratios are None where nothing was there to be counted."""
        matched = [outcome for outcome in self.outcomes if outcome.face is not None]
        bins = {**SIZE_BINS, **COMBINED_BINS}
        return {
            "images": self.images,
            "unreadable": [{"file": name, "reason": reason} for name, reason in self.unreadable],
            "labelled_faces": len(self.outcomes),
            "detections": self.detections,
            "matched": len(matched),
            "recall": _ratio(len(matched), len(self.outcomes)),
            "precision": _ratio(len(matched), self.detections),
            "sizes": {name: _summary_of(self.outcomes, low, high) for name, (low, high) in bins.items()},
            "judged": _summary_of(self.outcomes, JUDGED_FROM_PX, np.inf),
        }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _summary_of(outcomes: Sequence[Outcome], low: float, high: float) -> dict[str, Any]:
    """Recall and classification of the labelled faces with a size in [low, high)."""
    within = [outcome for outcome in outcomes if low <= outcome.labelled.size_px < high]
    matched = [outcome for outcome in within if outcome.face is not None]
    certain = [o for o in matched if o.face is not None and o.face.status is not MaskStatus.UNCERTAIN]
    wrongly_worn = [outcome for outcome in matched if outcome.labelled.worn_wrongly]
    confusion = _confusion(matched)
    return {
        "labelled": len(within),
        "matched": len(matched),
        "recall": _ratio(len(matched), len(within)),
        "balanced_accuracy": balanced_accuracy(confusion),
        "confusion": confusion,
        "uncertain_share": _ratio(len(matched) - len(certain), len(matched)),
        "certain_balanced_accuracy": balanced_accuracy(_confusion(certain)),
        "worn_wrongly": {
            "matched": len(wrongly_worn),
            "called_without_mask": sum(_said(outcome) == 1 for outcome in wrongly_worn),
        },
    }


def _said(outcome: Outcome) -> int:
    assert outcome.face is not None
    return 0 if outcome.face.p_with_mask >= outcome.face.p_without_mask else 1


def _confusion(matched: Sequence[Outcome]) -> list[list[int]]:
    """Rows: truth, columns: the larger probability, both in the order of `CLASS_NAMES`."""
    confusion = [[0, 0], [0, 0]]
    for outcome in matched:
        confusion[outcome.labelled.label][_said(outcome)] += 1
    return confusion


def evaluate_scenes(
    folder: Path,
    analyze: Callable[[NDArray[np.uint8]], list[Face]],
    max_pixels: int,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> SceneResults:
    """Runs `analyze` on every picture of a scene folder. Pictures that can't be decoded are listed, not counted.

    Raises `MaskwatchError` as `dataset.scene_pairs` and `dataset.read_voc` do.
    """
    from workers.decoding import decode_image

    results = SceneResults()
    pairs = scene_pairs(folder)
    for done, (image_path, annotation_path) in enumerate(pairs, start=1):
        try:
            image_rgb = decode_image(image_path.read_bytes(), max_pixels=max_pixels).rgb
        except PermanentJobError as error:
            results.unreadable.append((image_path.name, error.detail))
        else:
            height, width = image_rgb.shape[:2]
            results.add(read_voc(annotation_path, width, height), analyze(image_rgb))
        on_image(done, len(pairs))
    return results


def evaluate_faces(
    samples: Sequence[FaceSample],
    classify: Callable[[Sequence[NDArray[np.uint8]]], NDArray[np.float32]],
) -> dict[str, Any]:
    """Figures of a classifier on labelled faces, ready for JSON: scikit-learn's report and one row per face size.

    Needs both classes among the samples. A face of a class folder is its whole picture, one of a scene is cut as
    production cuts it.
    """
    from sklearn.metrics import classification_report

    probabilities = classify([fixed_crop(sample, None) for sample in samples])
    labels = np.array([sample.label for sample in samples])
    predicted = probabilities.argmax(axis=1)
    bins = np.array([size_bin(sample.size_px) for sample in samples])
    names = {"target_names": CLASS_NAMES, "labels": [0, 1], "zero_division": 0}
    return {
        "all": label_figures(labels, predicted),
        "sizes": {
            name: label_figures(labels[bins == name], predicted[bins == name])
            for name in SIZE_BINS
            if (bins == name).any()
        },
        "report": classification_report(labels, predicted, output_dict=True, **names),
        "report_text": classification_report(labels, predicted, digits=3, **names),
    }


def label_figures(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> dict[str, Any]:
    """How many faces, balanced accuracy and confusion (rows: truth) of predicted class indices."""
    confusion = [[int(((labels == true) & (predicted == said)).sum()) for said in (0, 1)] for true in (0, 1)]
    return {"faces": len(labels), "balanced_accuracy": balanced_accuracy(confusion), "confusion": confusion}


def confusion_rows(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows for a table: the true class, then how often each class was said."""
    return [[f"is {name}", *row] for name, row in zip(CLASS_NAMES, summary["confusion"], strict=True)]
