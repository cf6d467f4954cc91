"""Measures the whole pipeline on labelled scenes: recall per face size, how often found faces are classified right, and
calibration.

Also reads scenes for `detectors`. Knows neither click nor a console; `workers/cli/evaluate_scenes.py` prints the
results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.domain import Face, MaskStatus, MaskwatchError, PermanentJobError
from workers.classification import _ops
from workers.datasets.annotations import CLASS_NAMES, Box, LabelledBox, read_boxes, scene_pairs
from workers.evaluation.calibration import calibration_figures
from workers.evaluation.faces import (  # fmt: skip
    COMBINED_BINS,
    JUDGED_FROM_PX,
    SIZE_BINS,
    Labels,
    Mistake,
    Pixels,
    Probabilities,
    ScoredDetections,
    balanced_accuracy,
    label_figures,
    match,
    mislabelled_words,
    ratio,
    said,
    two_probabilities,
    uncertain_bands,
    worst,
)
from workers.media.images import decode_image

#: A mistake is shown with its surroundings, in this multiple of its box.
CONTEXT = 1.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """A labelled face and the detection that matched it, or None."""

    labelled: LabelledBox
    face: Face | None


@dataclass(slots=True)
class SceneResults:
    """All labelled faces with their outcomes, all detections, and the worst mistakes.

    mislabelled: faces that were found and called the other class, the surest first; missed: the largest labelled faces
    that were not found; unlabelled: the surest detections where no face is labelled.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    detections: ScoredDetections = field(default_factory=ScoredDetections)
    images: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    mislabelled: list[Mistake] = field(default_factory=list)
    missed: list[Mistake] = field(default_factory=list)
    unlabelled: list[Mistake] = field(default_factory=list)

    def add(self, name: str, image_rgb: Pixels, labelled: Sequence[LabelledBox], faces: Sequence[Face]) -> None:
        """Counts one image, RGB uint8 (height, width, 3)."""
        self.images += 1
        scores = [face.p_face for face in faces]
        matched = match(labelled, [_box(face) for face in faces], scores)
        self.detections.add(scores, matched)
        outcomes = [
            Outcome(entry, None if index is None else faces[index])
            for entry, index in zip(labelled, matched, strict=True)
        ]
        self.outcomes += outcomes
        free = [face for index, face in enumerate(faces) if index not in matched]
        self._keep_mistakes(name, image_rgb, outcomes, free)

    def _keep_mistakes(self, name: str, image_rgb: Pixels, outcomes: Sequence[Outcome], free: Sequence[Face]) -> None:
        for entry, face in ((outcome.labelled, outcome.face) for outcome in outcomes):
            if face is None:
                words = f"missed {CLASS_NAMES[entry.label]}, {entry.size_px:.0f} px: {name}"
                self.missed.append(Mistake(_with_context(image_rgb, entry.box), entry.size_px, words))
            elif said(face.p_with_mask) != entry.label:
                sureness = max(face.p_with_mask, face.p_without_mask)
                words = mislabelled_words(entry.label, sureness, entry.size_px, name)
                self.mislabelled.append(Mistake(_with_context(image_rgb, _box(face)), sureness, words))
        for face in free:
            words = f"no label, score {face.p_face:.2f}, {face.size_px:.0f} px: {name}"
            self.unlabelled.append(Mistake(_with_context(image_rgb, _box(face)), face.p_face, words))
        self.missed, self.mislabelled = worst(self.missed), worst(self.mislabelled)
        self.unlabelled = worst(self.unlabelled)

    def judged(self) -> tuple[Probabilities, Labels]:
        """Probabilities (n, 2) and true classes (n,) of the found faces of `JUDGED_FROM_PX` and more."""
        return _probabilities_of(_within(self.outcomes, JUDGED_FROM_PX, np.inf))

    def summary(self, uncertain_below: float) -> dict[str, Any]:
        """All figures, ready for JSON. A ratio with nothing to count is None.

        uncertain_below: the pipeline's setting. Average precision reaches down to the pipeline's detector threshold.
        """
        matched = [outcome for outcome in self.outcomes if outcome.face is not None]
        labelled = len(self.outcomes)
        bins = {**SIZE_BINS, **COMBINED_BINS}
        judged = self.judged()
        return {
            "images": self.images,
            "unreadable": [{"file": name, "reason": reason} for name, reason in self.unreadable],
            "labelled_faces": labelled,
            "detections": len(self.detections),
            "matched": len(matched),
            "recall": ratio(len(matched), labelled),
            "precision": ratio(len(matched), len(self.detections)),
            "average_precision": self.detections.average_precision(labelled) if labelled else None,
            "sizes": {name: _summary_of(_within(self.outcomes, *bounds)) for name, bounds in bins.items()},
            "judged": _summary_of(_within(self.outcomes, JUDGED_FROM_PX, np.inf)),
            "calibration": calibration_figures(*judged),
            "uncertain": uncertain_bands(*judged, uncertain_below),
        }


def _box(face: Face) -> Box:
    return face.x1, face.y1, face.x2, face.y2


def _with_context(image_rgb: Pixels, box: Box) -> Pixels:
    """The face with its surroundings, copied, so that the image can be freed."""
    return _ops.crop_for_classification(image_rgb, box, float("inf"), CONTEXT).copy()


def _within(outcomes: Sequence[Outcome], low: float, high: float) -> list[Outcome]:
    """The outcomes of labelled faces with a size in [low, high)."""
    return [outcome for outcome in outcomes if low <= outcome.labelled.size_px < high]


def _probabilities_of(outcomes: Sequence[Outcome]) -> tuple[Probabilities, Labels]:
    found = [(outcome.face.p_with_mask, outcome.labelled.label) for outcome in outcomes if outcome.face is not None]
    return two_probabilities([p for p, _ in found]), np.array([label for _, label in found], np.int64)


def _summary_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Recall and classification of these labelled faces."""
    matched = [outcome for outcome in outcomes if outcome.face is not None]
    certain = [o for o in matched if o.face is not None and o.face.status is not MaskStatus.UNCERTAIN]
    wrongly_worn = [outcome for outcome in matched if outcome.labelled.worn_wrongly]
    confusion = _confusion(matched)
    return {
        "labelled": len(outcomes),
        "matched": len(matched),
        "recall": ratio(len(matched), len(outcomes)),
        "balanced_accuracy": balanced_accuracy(confusion),
        "confusion": confusion,
        "uncertain_share": ratio(len(matched) - len(certain), len(matched)),
        "certain_balanced_accuracy": balanced_accuracy(_confusion(certain)),
        "expected_calibration_error": calibration_figures(*_probabilities_of(matched))["expected_calibration_error"],
        "worn_wrongly": {
            "labelled": sum(outcome.labelled.worn_wrongly for outcome in outcomes),
            "matched": len(wrongly_worn),
            "called_without_mask": _confusion(wrongly_worn)[1][1],
        },
    }


def _confusion(matched: Sequence[Outcome]) -> list[list[int]]:
    """Rows: true classes, columns: the class of the larger probability, both in the order of `CLASS_NAMES`."""
    probabilities, labels = _probabilities_of(matched)
    confusion: list[list[int]] = label_figures(labels, probabilities.argmax(axis=1))["confusion"]
    return confusion


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """An image, RGB uint8 (height, width, 3), with its labelled faces."""

    name: str
    image_rgb: Pixels
    labelled: list[LabelledBox]


def read_scenes(
    folder: Path,
    max_pixels: int,
    unreadable: list[tuple[str, str]],
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Scene]:
    """The images of a scene folder, one after the other; those that can't be read go to `unreadable` with the reason.

    `on_image` is called with images done and all images, whenever the next one is asked for. Raises
    `MaskwatchError` as `annotations.scene_pairs` and `annotations.read_boxes`.
    """
    pairs = scene_pairs(folder)
    for done, (image_path, annotation_path) in enumerate(pairs, start=1):
        try:
            image_rgb = decode_image(image_path.read_bytes(), max_pixels=max_pixels).rgb
        except (PermanentJobError, OSError) as error:
            unreadable.append((image_path.name, str(error)))
        else:
            height, width = image_rgb.shape[:2]
            yield Scene(image_path.name, image_rgb, read_boxes(annotation_path, width, height, unreadable))
        on_image(done, len(pairs))


def evaluate_scenes(
    folder: Path,
    analyze: Callable[[Pixels], list[Face]],
    max_pixels: int,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> SceneResults:
    """Runs `analyze` on every image of a scene folder. Images that can't be read are listed, not counted.

    Raises `MaskwatchError` as `read_scenes`, and if no image can be read or none has a labelled face.
    """
    results = SceneResults()
    for scene in read_scenes(folder, max_pixels, results.unreadable, on_image):
        results.add(scene.name, scene.image_rgb, scene.labelled, analyze(scene.image_rgb))
    check_scenes(folder, results.images, len(results.outcomes), results.unreadable)
    return results


def check_scenes(folder: Path, images: int, labelled: int, unreadable: Sequence[tuple[str, str]]) -> None:
    """Raises `MaskwatchError` if there was nothing to measure."""
    if images == 0:
        name, reason = unreadable[0]
        raise MaskwatchError(
            f"none of the {len(unreadable)} pictures in {folder} can be read; the first is {name}: {reason}"
        )
    if labelled == 0:
        raise MaskwatchError(f"{folder / 'annotations'} labels no face in {images} pictures: nothing to measure")
