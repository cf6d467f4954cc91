"""How often each shipped classifier is right, kept where the read side has it without any model: one confusion matrix
per file of weights, in model_figures.json.

`maskwatch evaluate faces DATA --held-out --keep-confusion common/models/figures.json` measures and writes it, and a
test compares what is kept with what is measured. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from common.domain import MaskwatchError, PipelineSpec, first_line
from common.files import write_atomically

SHIPPED = Path(__file__).with_name("figures.json")

#: Faces called with_mask, without_mask and uncertain.
Called = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Confusion:
    """What a classifier called labelled faces it had never seen, as a pipeline would have stored it.

    classifier and sha256: the model, as in a `ModelRef`; with_mask and without_mask: what faces that really are so were
    called; uncertain_below: the probability below which they were `uncertain`; data: the faces, in words.
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
        """How many faces it was measured on."""
        return sum(self.with_mask) + sum(self.without_mask)

    @property
    def right_with_mask(self) -> float | None:
        """The share of masked faces that is called so, of those that are not uncertain; None where there are none."""
        decided = self.with_mask[0] + self.with_mask[1]
        return self.with_mask[0] / decided if decided else None

    @property
    def right_without_mask(self) -> float | None:
        """The same for faces without a mask."""
        decided = self.without_mask[0] + self.without_mask[1]
        return self.without_mask[1] / decided if decided else None


def confusion_of(spec: PipelineSpec) -> Confusion | None:
    """What is known of a pipeline's classifier; None where nothing was kept of these weights, or where the pipeline
    calls faces uncertain by another threshold than was measured with."""
    kept = _shipped().get(spec.classifier.sha256)
    return kept if kept is not None and kept.uncertain_below == spec.uncertain_below else None


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Confusion]:
    return read_confusions(SHIPPED)


def read_confusions(path: Path) -> dict[str, Confusion]:
    """What a file keeps, by the SHA-256 of the weights. Raises `MaskwatchError` where it holds something else."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        kept = [
            Confusion(**{**entry, "with_mask": tuple(entry["with_mask"]), "without_mask": tuple(entry["without_mask"])})
            for entry in entries
        ]
    except OSError as error:
        raise MaskwatchError(f"{path} can't be read: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise MaskwatchError(f"{path} holds something else than kept confusions ({error}); restore it") from error
    return {entry.sha256: entry for entry in kept}


def keep_confusion(path: Path, confusion: Confusion) -> None:
    """Writes it into the file, in place of what was kept of a classifier with that name.

    Raises `MaskwatchError` where the file can't be written, and as `read_confusions`.
    """
    kept = list(read_confusions(path).values()) if path.exists() else []
    kept = [entry for entry in kept if entry.classifier != confusion.classifier]
    entries = sorted([*kept, confusion], key=lambda entry: entry.classifier)
    try:
        write_atomically(path, json.dumps([asdict(entry) for entry in entries], indent=2) + "\n")
    except OSError as error:
        raise MaskwatchError(f"{path} can't be written: {first_line(error)}") from error
