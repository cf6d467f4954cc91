"""Converts a decoded video frame into an upright RGB array with the colours that a player shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

#: Frames that don't name their colour space are taken for HDTV from this height on, as players do; else for SDTV.
_HD_HEIGHT = 720
#: Values of AVColorSpace (FFmpeg, libavutil/pixfmt.h) → the scaler's. For other values the height decides.
_COLOURS = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


def to_rgb(frame: Any) -> NDArray[np.uint8]:
    """The frame as RGB, uint8 (height, width, 3), upright. frame: PyAV's."""
    guess = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    source = _COLOURS.get(int(frame.colorspace), guess)  # ignored for frames that are RGB
    # One thread: by default each frame starts as many threads as there are cores.
    converted = frame.reformat(
        format="rgb24", src_colorspace=source, dst_color_range=ColorRange.JPEG, threads=1
    )  # fmt: skip
    rgb = converted.to_ndarray()
    # PyAV's rotation is counter-clockwise.
    turns = round(frame.rotation / 90) % 4
    # Rows of a frame may end with padding.
    return np.ascontiguousarray(np.rot90(rgb, turns))
