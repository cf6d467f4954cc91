"""Placeholder until the real one lands: every face its own track."""

from __future__ import annotations

from collections.abc import Sequence

from common.domain import Face


class FaceTracker:
    def __init__(self, frames_per_second: float) -> None:
        self._next = 1

    def update(self, faces: Sequence[Face], at_seconds: float) -> list[int]:
        ids = list(range(self._next, self._next + len(faces)))
        self._next += len(faces)
        return ids
