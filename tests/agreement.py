"""How far two ways of analysing the same pictures agree, face by face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.domain import Face
from workers.detection._ops import iou
from workers.media.images import decode_image


@dataclass(frozen=True)
class Agreement:
    """faces: of both ways together, a matched pair counting once; matched: the share of them that both found."""

    faces: int
    matched: float
    same_label: float
    largest_px: float
    p_of_99_percent: float


def compare(found: Sequence[Sequence[Face]], expected: Sequence[Sequence[Face]]) -> Agreement:
    """Pairs faces of the same picture that overlap by four fifths; the figures but the first two are of such pairs."""
    pairs = []
    alone = 0
    for ours, theirs in zip(found, expected, strict=True):
        overlaps = iou(_boxes(ours), _boxes(theirs))
        left = set(range(len(theirs)))
        for index, face in enumerate(ours):
            best = max(left, key=lambda at: overlaps[index, at], default=None)
            if best is None or overlaps[index, best] < 0.8:
                alone += 1
                continue
            left.remove(best)
            pairs.append((face, theirs[best]))
        alone += len(left)
    total = len(pairs) + alone
    assert pairs, "not one face that both found"
    return Agreement(
        faces=total,
        matched=len(pairs) / total,
        same_label=sum(one.status is other.status for one, other in pairs) / len(pairs),
        largest_px=float(max(np.abs(_boxes([one]) - _boxes([other])).max() for one, other in pairs)),
        p_of_99_percent=float(np.quantile([abs(one.p_with_mask - other.p_with_mask) for one, other in pairs], 0.99)),
    )


def scenes(data_dir: Path) -> list[NDArray[np.uint8]]:
    """The pictures of the public test set."""
    paths = sorted((data_dir / "scenes" / "images").iterdir())
    return [decode_image(path.read_bytes(), max_pixels=100_000_000).rgb for path in paths]


def _boxes(faces: Sequence[Face]) -> NDArray[np.float32]:
    return np.array([(face.x1, face.y1, face.x2, face.y2) for face in faces], np.float32).reshape(-1, 4)
