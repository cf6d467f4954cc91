"""Draws figures into an image: where they stand, and what they hide of each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.domain import MaskStatus
from common.sample import people
from common.sample.ground_truth import Box, TrueFace

#: The longer side of a face at scale 1.
FACE_SIZE_NATIVE = max(people.FACE_BOX[2] - people.FACE_BOX[0], people.FACE_BOX[3] - people.FACE_BOX[1])
#: The area below its head that a figure hides.
BODY_BOX = (15.0, 145.0, 380.0, float(people.FIGURE_SIZE[1]))


@dataclass(frozen=True, slots=True)
class Person:
    """A person in an image: the figure's top left corner, in pixels of the image, and its scale."""

    appearance: people.Appearance
    x: float
    y: float
    scale: float

    def placed(self, box: Box) -> Box:
        """A box of the figure as a box of the image."""
        if self.appearance.flipped:
            box = people.flipped_box(box)
        return (
            self.x + box[0] * self.scale, self.y + box[1] * self.scale,
            self.x + box[2] * self.scale, self.y + box[3] * self.scale,
        )  # fmt: skip

    @property
    def face(self) -> TrueFace:
        label = MaskStatus.WITHOUT_MASK if self.appearance.mask is None else MaskStatus.WITH_MASK
        box = self.placed(people.FACE_BOX)
        return TrueFace((round(box[0], 1), round(box[1], 1), round(box[2], 1), round(box[3], 1)), label)


def hides(near: Person, far: Person, clearance: float) -> bool:
    """Whether the nearer one comes closer to the farther one's face than this share of the face's height."""
    face = far.placed(people.FACE_BOX)
    margin = clearance * (face[3] - face[1])
    grown = (face[0] - margin, face[1] - margin, face[2] + margin, face[3] + margin)
    return meet(grown, near.placed(people.HEAD_BOX)) or meet(grown, near.placed(BODY_BOX))


def meet(a: Box, b: Box) -> bool:
    """Whether two boxes share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def paste(image: Image.Image, person: Person) -> None:
    """Draw a person into an image."""
    # Sampled at the exact fraction of a pixel, so that the box of its face is exact too.
    left, top = math.floor(person.x), math.floor(person.y)
    inverse = 1 / person.scale
    width, height = (math.ceil(side * person.scale) + 1 for side in people.FIGURE_SIZE)
    shift_x, shift_y = (person.x - left) * inverse, (person.y - top) * inverse
    box = (-shift_x, -shift_y, width * inverse - shift_x, height * inverse - shift_y)
    pad = math.ceil(inverse) + 2
    figure = people.figure(person.appearance)
    padded = Image.new("RGBA", (figure.width + 2 * pad, figure.height + 2 * pad))
    padded.paste(figure, (pad, pad))
    visible = (box[0] + pad, box[1] + pad, min(box[2] + pad, padded.width), min(box[3] + pad, padded.height))
    size = (round((visible[2] - visible[0]) / inverse), round((visible[3] - visible[1]) / inverse))
    resized = padded.resize(size, Image.Resampling.LANCZOS, box=visible)
    image.paste(resized, (left, top), resized)


def vignette(width: int, height: int) -> NDArray[np.float64]:
    """The share of light that a lens lets through at each pixel: 1 in the middle, 0.87 in the corners;
    (height, width, 1)."""
    rows, columns = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    shares: NDArray[np.float64] = (1 - 0.13 * (rows**2 + columns**2) / 2)[..., None]
    return shares


def caption(image: Image.Image, words: str) -> None:
    """Write into the image's upper left corner, as cameras do."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(16)
    draw.rectangle((0, 0, 14 + draw.textlength(words, font), 26), fill=(18, 18, 20))
    draw.text((7, 4), words, font=font, fill=(230, 230, 226))
