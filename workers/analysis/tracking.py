"""Links the faces of a video's frames into tracks by place and time alone; nobody is recognised.

A track is expected to keep its velocity, and goes on with the nearest face that a walking person could have reached;
the nearest pairs come first. How good tracks are is measured in `benchmarks/tracking.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.domain import Face

#: How long a face may be out of sight and still be the same visit; if frames are rarer, one frame.
LONGEST_GAP_SECONDS = 2.0
#: How far a face may be from its expected place, in face sizes: always, since boxes aren't exact, ...
SLACK = 0.5
#: ... per second up to the next frame, since people set off and stop: 1.75 m/s, a brisk walk, in faces of 0.22 m, ...
REACH_PER_SECOND = 8.0
#: ... and per second of a longer gap once a velocity is known, so that an arriving face isn't linked to one that left.
DRIFT_PER_SECOND = 2.0
#: How much a face may grow or shrink, always and per second, in natural logarithms of its size.
SIZE_SLACK, SIZE_PER_SECOND = 0.25, 0.35
#: In some videos frames are late, by at most this share of the time between two.
UNEVEN = 0.25


@dataclass(frozen=True, slots=True)
class _Sight:
    """A face at a time (seconds): its middle and its longer side, in pixels."""

    x: float
    y: float
    size: float
    at: float

    @classmethod
    def of(cls, face: Face, at_seconds: float) -> _Sight:
        # At least a pixel, because distances are divided by the size.
        return cls((face.x1 + face.x2) / 2, (face.y1 + face.y2) / 2, max(face.size_px, 1.0), at_seconds)


@dataclass(slots=True)
class _Track:
    """A track so far. velocity: pixels per second; None before the face was seen twice."""

    number: int
    last: _Sight
    velocity: tuple[float, float] | None = None

    def misfit(self, sight: _Sight, frame_seconds: float) -> float | None:
        """How badly this face fits the track, in face sizes; None if a person can't get there in that time."""
        seconds = sight.at - self.last.at
        growth = abs(math.log(sight.size / self.last.size))
        if growth > SIZE_SLACK + SIZE_PER_SECOND * seconds:
            return None
        if self.velocity is None:
            vx, vy = 0.0, 0.0
            reach = SLACK + REACH_PER_SECOND * seconds
        else:
            vx, vy = self.velocity
            next_frame = min(seconds, frame_seconds)
            reach = SLACK + REACH_PER_SECOND * next_frame + DRIFT_PER_SECOND * (seconds - next_frame)
        away = math.hypot(sight.x - self.last.x - vx * seconds, sight.y - self.last.y - vy * seconds)
        distance = away / math.sqrt(sight.size * self.last.size)
        # A person near the camera and one far away may be side by side in the image, but their faces differ in size.
        return distance + growth if distance <= reach else None

    def go_on(self, sight: _Sight) -> None:
        # Two frames with the same time, which broken videos have, give no velocity.
        if (seconds := sight.at - self.last.at) > 0:
            self.velocity = (sight.x - self.last.x) / seconds, (sight.y - self.last.y) / seconds
        self.last = sight


class FaceTracker:
    """Gives the faces of consecutive frames their tracks: 1, 2, ... in the order in which they begin."""

    def __init__(self, frames_per_second: float) -> None:
        if not (math.isfinite(frames_per_second) and frames_per_second > 0):
            raise ValueError(f"frames_per_second {frames_per_second} is not a rate; valid: above 0")
        self._frame_seconds = (1 + UNEVEN) / frames_per_second
        self._longest_gap = max(LONGEST_GAP_SECONDS + UNEVEN / frames_per_second, (2 + UNEVEN) / frames_per_second)
        self._tracks: list[_Track] = []
        self._begun = 0

    def update(self, faces: Sequence[Face], at_seconds: float) -> list[int]:
        """The track of each face of the next frame, in order. A face that fits no track begins a new one.

        at_seconds: the frame's time, not before the last frame's; a frame without faces only advances the time.
        """
        self._tracks = [track for track in self._tracks if at_seconds - track.last.at <= self._longest_gap]
        sights = [_Sight.of(face, at_seconds) for face in faces]
        taken = self._pairs(sights)
        numbers = []
        for i, sight in enumerate(sights):
            track = taken.get(i)
            if track is None:
                self._begun += 1
                track = _Track(self._begun, sight)
                self._tracks.append(track)
            else:
                track.go_on(sight)
            numbers.append(track.number)
        return numbers

    def _pairs(self, sights: Sequence[_Sight]) -> dict[int, _Track]:
        """The track that each face continues, the best fit first; among equals the older track, then the first face.

        The assignment with the smallest sum of misfits isn't better (measured), and would need SciPy.
        """
        fits = sorted(
            (misfit, t, i)
            for t, track in enumerate(self._tracks)
            for i, sight in enumerate(sights)
            if (misfit := track.misfit(sight, self._frame_seconds)) is not None
        )
        taken: dict[int, _Track] = {}
        continued: set[int] = set()
        for _, t, i in fits:
            if i not in taken and t not in continued:
                taken[i] = self._tracks[t]
                continued.add(t)
        return taken
