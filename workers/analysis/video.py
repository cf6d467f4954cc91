"""Analyses a video's frames and links their faces into tracks, while the next frames are decoded."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from common.domain import FrameFaces
from workers.analysis.analyzer import ImageAnalyzer
from workers.analysis.tracking import FaceTracker
from workers.media.prefetch import ahead


@dataclass(frozen=True, slots=True)
class SampledFrame:
    """A frame of a video for the analyzer. rgb: uint8 (height, width, 3), upright. at, covers: seconds, exact."""

    rgb: NDArray[np.uint8]
    #: When it is shown, from the start of the file.
    at: Fraction
    #: How much of the video it covers.
    covers: Fraction


def analyze_frames(
    frames: Iterable[SampledFrame],
    analyzer: ImageAnalyzer,
    frames_per_second: float,
    *,
    buffer_bytes: int,
    batch: int,
) -> Generator[FrameFaces, None, None]:
    """The faces of a video's frames, in their order, linked into tracks.

    Frames are read and decoded in a thread of their own, up to `buffer_bytes` ahead (one frame at least), while earlier
    frames are analysed; waiting frames of one size are analysed together, `batch` at most. An error in the other thread
    is raised here, after the frames before it.
    """
    tracker = FaceTracker(frames_per_second)
    groups = ahead(
        frames,
        size_of=lambda frame: frame.rgb.nbytes,
        alike=lambda a, b: a.rgb.shape == b.rgb.shape,
        max_size=buffer_bytes,
        max_items=batch,
    )
    with closing(groups):
        for group in groups:
            faces = analyzer.analyze_batch([frame.rgb for frame in group])
            for frame, found in zip(group, faces, strict=True):
                at = float(frame.at)
                yield FrameFaces(at, float(frame.covers), tuple(found), tuple(tracker.update(found, at)))
