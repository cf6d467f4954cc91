"""Draws faces on an image: green with mask, red without, amber uncertain. Also blurs faces."""

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

#: Opacity of a label's box, as in the reference notebook.
LABEL_ALPHA = 0.2
#: Images whose longer side is below this are enlarged, so that labels are readable.
LEGIBLE_PX = 1000
#: A label wider than this many faces shows only the probability, so that it doesn't hide other faces.
LABEL_LIMIT = 2.5
#: A blurred face and its surroundings become this many squares along their longer side, whatever their size: about
#: three across the face itself. They show no more than the colour of hair and skin.
BLUR_SQUARES = 5
#: The blurred area is larger than the face's box by this share of it on each side: hair, ears and chin.
BLUR_MARGIN = 0.25

_WHITE = (255, 255, 255)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True, slots=True)
class _Style:
    """Sizes that depend on the image's: the width of boxes and of strokes in pixels, and the font's factor."""

    line_px: int
    stroke_px: int
    font: float

    @classmethod
    def of(cls, width: int, height: int) -> _Style:
        longer = max(width, height)
        font = min(max(longer / 1800, 0.4), 3.0)
        return cls(max(1, round(longer / 600)), max(1, round(font * 2.5)), font)


def draw_faces(
    image_rgb: NDArray[np.uint8], faces: Sequence[Face], *, emphasised: int | None = None
) -> NDArray[np.uint8]:
    """A copy of an image, uint8 (height, width, 3), with a box and a label for every face.

    A label shows the face's status and probability. emphasised: the index of a face whose box is drawn wider and with a
    white rim.
    """
    drawn = np.array(image_rgb, dtype=np.uint8, order="C")
    style = _Style.of(drawn.shape[1], drawn.shape[0])
    # The surest faces are drawn last, so that their labels stay readable on overlap; the emphasised one is on top.
    for index in sorted(range(len(faces)), key=lambda index: (index == emphasised, faces[index].p_face)):
        face = faces[index]
        if index == emphasised:
            _draw_box(drawn, face, 5 * style.line_px, _WHITE)
        _draw_box(drawn, face, style.line_px * (3 if index == emphasised else 1), COLOURS[face.status])
        _draw_label(drawn, face, style)
    return drawn


def blur_faces(image_rgb: NDArray[np.uint8], faces: Sequence[Face]) -> NDArray[np.uint8]:
    """A copy of an image, uint8 (height, width, 3), with these faces made unrecognisable."""
    blurred = np.array(image_rgb, dtype=np.uint8, order="C")
    height, width = blurred.shape[:2]
    for face in faces:
        across, down = BLUR_MARGIN * (face.x2 - face.x1), BLUR_MARGIN * (face.y2 - face.y1)
        left, right = max(0, math.floor(face.x1 - across)), min(width, math.ceil(face.x2 + across))
        top, bottom = max(0, math.floor(face.y1 - down)), min(height, math.ceil(face.y2 + down))
        area = blurred[top:bottom, left:right]
        if area.size:
            square = max(area.shape[:2]) / BLUR_SQUARES
            squares = (max(1, int(area.shape[1] / square)), max(1, int(area.shape[0] / square)))
            coarse = cv2.resize(area, squares, interpolation=cv2.INTER_AREA)
            area[:] = cv2.resize(coarse, (area.shape[1], area.shape[0]), interpolation=cv2.INTER_NEAREST)
    return blurred


def enlarge_for_labels(image_rgb: NDArray[np.uint8], faces: Sequence[Face]) -> tuple[NDArray[np.uint8], list[Face]]:
    """The image and its faces, enlarged by a whole number if its labels would not be readable."""
    height, width = image_rgb.shape[:2]
    factor = min(4, math.ceil(LEGIBLE_PX / max(width, height)))
    if factor <= 1:
        return image_rgb, list(faces)
    size = (width * factor, height * factor)
    enlarged = np.asarray(cv2.resize(image_rgb, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    return enlarged, [replace(f, x1=f.x1 * factor, y1=f.y1 * factor, x2=f.x2 * factor, y2=f.y2 * factor) for f in faces]


def _draw_box(image: NDArray[np.uint8], face: Face, line_px: int, colour: Colour) -> None:
    height, width = image.shape[:2]
    corners = (
        (round(face.x1), round(face.y1)),
        (min(round(face.x2), width - 1), min(round(face.y2), height - 1)),
    )
    cv2.rectangle(image, *corners, colour, line_px)


def _draw_label(image: NDArray[np.uint8], face: Face, style: _Style) -> None:
    width = image.shape[1]
    text = _label(face, style)
    (text_w, text_h), below = cv2.getTextSize(text, _FONT, style.font, style.stroke_px)
    pad = style.stroke_px + 1
    label_w, label_h = text_w + 2 * pad, text_h + below + 2 * pad

    # Above the box, or inside it at its top where the image ends. Never beyond the image's sides.
    left = max(0, min(round(face.x1), width - label_w))
    top = round(face.y1) - label_h if face.y1 >= label_h else round(face.y1)
    area = image[top : top + label_h, left : left + label_w]
    colour = COLOURS[face.status]
    area[:] = (area * (1 - LABEL_ALPHA) + np.array(colour) * LABEL_ALPHA).astype(np.uint8)

    origin = (left + pad, top + pad + text_h)
    # A dark rim keeps the words readable on any image.
    cv2.putText(image, text, origin, _FONT, style.font, (0, 0, 0), style.stroke_px + 2, cv2.LINE_AA)
    cv2.putText(image, text, origin, _FONT, style.font, colour, style.stroke_px, cv2.LINE_AA)


def _label(face: Face, style: _Style) -> str:
    probability = f"{max(face.p_with_mask, face.p_without_mask):.0%}"
    words = f"{WORDS[face.status]} {probability}"
    (text_w, _), _ = cv2.getTextSize(words, _FONT, style.font, style.stroke_px)
    return words if text_w <= LABEL_LIMIT * (face.x2 - face.x1) else probability
