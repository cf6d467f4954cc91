"""From a decoded video frame to the picture that a player shows: colours and rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

#: Frames from this height on that don't name their colours are taken for HDTV's, as players do; others for SDTV's.
_HD_HEIGHT = 720
#: Values of AVColorSpace (FFmpeg, libavutil/pixfmt.h) and what they mean to the scaler. Others are left to it.
_COLOURS = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
}
_UNSPECIFIED = 2


def to_picture(frame: Any) -> NDArray[np.uint8]:
    """The frame as RGB, uint8 (height, width, 3), upright. frame: PyAV's."""
    space = int(frame.colorspace)
    if space == _UNSPECIFIED and not frame.format.is_rgb:
        source = Colorspace.ITU709 if frame.height >= _HD_HEIGHT else Colorspace.ITU601
    else:
        source = _COLOURS.get(space, Colorspace.DEFAULT)
    rgb = frame.reformat(format="rgb24", src_colorspace=source, dst_color_range=ColorRange.JPEG).to_ndarray()
    # PyAV tells how far a player turns it counter-clockwise.
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb
