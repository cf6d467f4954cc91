"""From a decoded video frame to the picture that a player shows: colours and rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

#: Frames from this height on that don't name their colours are taken for HDTV's, as players do; others for SDTV's.
_HD_HEIGHT = 720
#: Values of AVColorSpace (FFmpeg, libavutil/pixfmt.h) and what they mean to the scaler. Others, and those that name
#: nothing, go by the height.
_COLOURS = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


def to_picture(frame: Any) -> NDArray[np.uint8]:
    """The frame as RGB, uint8 (height, width, 3), upright. frame: PyAV's."""
    guess = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    source = _COLOURS.get(int(frame.colorspace), guess)  # means nothing to frames that are RGB
    # One thread: by default each frame starts as many as there are cores, whatever else they do.
    converted = frame.reformat(
        format="rgb24", src_colorspace=source, dst_color_range=ColorRange.JPEG, threads=1
    )  # fmt: skip
    rgb = converted.to_ndarray()
    # PyAV tells how far a player turns it counter-clockwise.
    turns = round(frame.rotation / 90) % 4
    # Rows of a frame may have padding behind them.
    return np.ascontiguousarray(np.rot90(rgb, turns))
