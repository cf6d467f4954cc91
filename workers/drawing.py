"""Draws faces on a picture for people to look at: green with mask, red without, amber uncertain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from common.domain import Face, MaskStatus

Colour = tuple[int, int, int]

#: RGB.
COLOURS: dict[MaskStatus, Colour] = {
    MaskStatus.WITH_MASK: (40, 200, 60),
    MaskStatus.WITHOUT_MASK: (235, 50, 50),
    MaskStatus.UNCERTAIN: (255, 176, 0),
}
WORDS = {
    MaskStatus.WITH_MASK: "With mask",
    MaskStatus.WITHOUT_MASK: "Without mask",
    MaskStatus.UNCERTAIN: "Uncertain",
}

#: How much of the label's box covers the picture, as in the notebook this follows.
LABEL_ALPHA = 0.2
#: Pictures whose longer side is below this get no readable labels unless they are enlarged.
LEGIBLE_PX = 1000
#: A label wider than this many faces shows the probability alone, so that it doesn't hide the neighbours.
LABEL_LIMIT = 2.5

_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True, slots=True)
class _Style:
    """Sizes that follow from the picture's: the width of boxes and of strokes in pixels, and the font's factor."""

    line_px: int
    stroke_px: int
    font: float

    @classmethod
    def of(cls, width: int, height: int) -> _Style:
        longer = max(width, height)
        font = min(max(longer / 1800, 0.4), 3.0)
        return cls(max(1, round(longer / 600)), max(1, round(font * 2.5)), font)


def draw_faces(image_rgb: NDArray[np.uint8], faces: Sequence[Face]) -> NDArray[np.uint8]:
    """A copy of a picture, uint8 (height, width, 3), with a box and a label for every face.

    A label says what the face was taken for and how probable that is.
    """
    drawn = np.array(image_rgb, dtype=np.uint8, order="C")
    style = _Style.of(drawn.shape[1], drawn.shape[0])
    # The surest faces last: where labels overlap, theirs stay readable.
    for face in sorted(faces, key=lambda face: face.p_face):
        _draw_box(drawn, face, style)
        _draw_label(drawn, face, style)
    return drawn


def enlarge_for_labels(image_rgb: NDArray[np.uint8], faces: Sequence[Face]) -> tuple[NDArray[np.uint8], list[Face]]:
    """The picture with its faces, a whole number of times larger if its labels would not be readable."""
    height, width = image_rgb.shape[:2]
    factor = min(4, math.ceil(LEGIBLE_PX / max(width, height)))
    if factor <= 1:
        return image_rgb, list(faces)
    size = (width * factor, height * factor)
    enlarged = np.asarray(cv2.resize(image_rgb, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    return enlarged, [replace(f, x1=f.x1 * factor, y1=f.y1 * factor, x2=f.x2 * factor, y2=f.y2 * factor) for f in faces]


def _draw_box(image: NDArray[np.uint8], face: Face, style: _Style) -> None:
    height, width = image.shape[:2]
    corners = (
        (round(face.x1), round(face.y1)),
        (min(round(face.x2), width - 1), min(round(face.y2), height - 1)),
    )
    cv2.rectangle(image, *corners, COLOURS[face.status], style.line_px)


def _draw_label(image: NDArray[np.uint8], face: Face, style: _Style) -> None:
    width = image.shape[1]
    text = _label(face, style)
    (text_w, text_h), below = cv2.getTextSize(text, _FONT, style.font, style.stroke_px)
    pad = style.stroke_px + 1
    label_w, label_h = text_w + 2 * pad, text_h + below + 2 * pad

    # Above the box; inside it, at its top, where the picture ends. Never out of the picture sideways.
    left = max(0, min(round(face.x1), width - label_w))
    top = round(face.y1) - label_h if face.y1 >= label_h else round(face.y1)
    area = image[top : top + label_h, left : left + label_w]
    colour = COLOURS[face.status]
    area[:] = (area * (1 - LABEL_ALPHA) + np.array(colour) * LABEL_ALPHA).astype(np.uint8)

    origin = (left + pad, top + pad + text_h)
    # A dark rim keeps the words readable on any picture.
    cv2.putText(image, text, origin, _FONT, style.font, (0, 0, 0), style.stroke_px + 2, cv2.LINE_AA)
    cv2.putText(image, text, origin, _FONT, style.font, colour, style.stroke_px, cv2.LINE_AA)


def _label(face: Face, style: _Style) -> str:
    probability = f"{max(face.p_with_mask, face.p_without_mask):.0%}"
    words = f"{WORDS[face.status]} {probability}"
    (text_w, _), _ = cv2.getTextSize(words, _FONT, style.font, style.stroke_px)
    return words if text_w <= LABEL_LIMIT * (face.x2 - face.x1) else probability
