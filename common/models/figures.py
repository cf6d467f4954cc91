"""How often each shipped classifier is right: one confusion matrix per file of weights, in figures.json, so that the
read side needs no model.

`maskwatch evaluate faces DATA --held-out --keep-confusion common/models/figures.json` measures and writes it, and a
test compares the stored matrices with measured ones. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from common.domain import MaskwatchError, PipelineSpec, first_line
from common.files import write_atomically

SHIPPED = Path(__file__).with_name("figures.json")

#: Numbers of faces classified as with_mask, without_mask and uncertain.
Called = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Confusion:
    """How a classifier classified labelled faces that it was not trained on, as a pipeline would have stored it.

    classifier and sha256: the model, as in a `ModelRef`; with_mask and without_mask: the results for faces with that
    label; uncertain_below: the probability below which a face was `uncertain`; data: a description of the faces.
    """

    classifier: str
    sha256: str
    with_mask: Called
    without_mask: Called
    uncertain_below: float
    data: str

    def __post_init__(self) -> None:
        for name, called in (("with_mask", self.with_mask), ("without_mask", self.without_mask)):
            if len(called) != 3 or not all(isinstance(count, int) and count >= 0 for count in called):
                raise ValueError(f"{name} is {called}; valid: three counts")

    @property
    def faces(self) -> int:
        """The number of faces that the matrix was measured on."""
        return sum(self.with_mask) + sum(self.without_mask)

    @property
    def right_with_mask(self) -> float | None:
        """The share of correct results among masked faces that are not uncertain; None if there are none."""
        decided = self.with_mask[0] + self.with_mask[1]
        return self.with_mask[0] / decided if decided else None

    @property
    def right_without_mask(self) -> float | None:
        """The same for faces without a mask."""
        decided = self.without_mask[0] + self.without_mask[1]
        return self.without_mask[1] / decided if decided else None


def confusion_of(spec: PipelineSpec) -> Confusion | None:
    """The matrix of a pipeline's classifier; None if none is stored for these weights, or if the pipeline has another
    threshold for uncertain faces than the measurement."""
    kept = _shipped().get(spec.classifier.sha256)
    return kept if kept is not None and kept.uncertain_below == spec.uncertain_below else None


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Confusion]:
    return read_confusions(SHIPPED)


def read_confusions(path: Path) -> dict[str, Confusion]:
    """The matrices in a file, by the SHA-256 of the weights. Raises `MaskwatchError` if it holds something else."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        kept = [
            Confusion(**{**entry, "with_mask": tuple(entry["with_mask"]), "without_mask": tuple(entry["without_mask"])})
            for entry in entries
        ]
    except OSError as error:
        raise MaskwatchError(f"{path} can't be read: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise MaskwatchError(f"{path} does not hold confusion matrices ({error}); restore it") from error
    return {entry.sha256: entry for entry in kept}


def keep_confusion(path: Path, confusion: Confusion) -> None:
    """Write a matrix into the file, in place of the one of the classifier with that name.

    Raises `MaskwatchError` if the file can't be written, and as `read_confusions`.
    """
    kept = list(read_confusions(path).values()) if path.exists() else []
    kept = [entry for entry in kept if entry.classifier != confusion.classifier]
    entries = sorted([*kept, confusion], key=lambda entry: entry.classifier)
    try:
        write_atomically(path, json.dumps([asdict(entry) for entry in entries], indent=2) + "\n")
    except OSError as error:
        raise MaskwatchError(f"{path} can't be written: {first_line(error)}") from error
