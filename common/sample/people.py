"""Draws the people of the sample footage: one real face, with and without a mask, in coats of many colours.

The face is from the photograph `astronaut.png` (Eileen Collins, NASA, public domain; see SOURCES.md). Her head and
shoulders are cut out along hand-set outlines, the suit is dyed, and a coat and legs are drawn below.
All coordinates are pixels of that 512×512 photograph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from common.sample.source_images import astronaut

#: The face: fringe to chin, ear to ear.
FACE_BOX = (175.0, 68.0, 273.0, 180.0)
#: The whole head, with hair and collar: no other figure may cover it.
HEAD_BOX = (150.0, 12.0, 304.0, 200.0)
#: Width and height of a whole figure; the photograph ends at PHOTO_BOTTOM, below it is drawn.
FIGURE_SIZE = (400, 980)
PHOTO_BOTTOM = 336
NECK_BOTTOM = 190
COAT_BOTTOM = 640

Colour = tuple[int, int, int]
Points = tuple[tuple[float, float], ...]
#: float32 (height, width, channels) in [0, 255], or coverage (height, width) in [0, 1].
Pixels = NDArray[np.float32]

HEAD: Points = (
    (183, 150), (183, 140), (182, 131), (179, 130.5), (175, 128), (172, 122), (168, 116), (160, 108), (156, 100),
    (154.5, 80), (155, 68), (158, 58), (166, 49), (176, 43), (188, 38), (193, 32), (202, 26), (212, 22), (222, 19),
    (232, 17.5), (244, 18), (254, 22), (262, 26), (272, 32), (282, 39), (288, 47), (293, 58), (296, 68), (298.5, 80),
    (299, 87), (296, 100), (291, 112), (287, 119), (280, 126), (277, 131), (272, 135.5), (268, 136), (265, 141),
    (262, 149), (257, 158), (255, 170), (254, 190), (185, 190),
)  # fmt: skip
SHOULDERS: Points = (
    (186, 150), (170, 148.5), (158, 152), (145, 158), (134, 167), (128, 176), (124, 186), (114, 188), (116, 198),
    (112, 206), (100, 217), (85, 231), (73, 244), (61, 261), (50, 276), (43, 290), (37, 310), (30, 335), (30, 337),
    (361, 337), (359, 318), (356, 305), (351, 288), (346, 276), (339, 263), (327, 251), (314, 242), (302, 236),
    (298, 222), (291, 208), (281, 195), (270, 185), (258, 177), (252, 174),
)  # fmt: skip
#: A mask: over the bridge of the nose, along the cheekbones and round the chin.
MASK: Points = (
    (225, 111), (232, 114), (243, 119), (256, 125), (267, 134), (265.5, 144), (261, 155), (254, 167), (245, 176),
    (235, 181.5), (224, 183), (213, 181.5), (203, 175), (194, 166), (187, 153), (183.5, 143), (182.5, 133),
    (194, 124), (207, 119), (218, 114),
)  # fmt: skip
EAR_LOOPS: tuple[Points, ...] = (
    ((184, 135), (179, 127), (175, 118)),
    ((187, 151), (180, 141), (175, 126)),
    ((266, 136), (270, 129), (273, 121)),
    ((263, 151), (269, 142), (273, 131)),
)
TORSO: Points = ((70, 328), (322, 328), (308, 640), (84, 640))
ARMS: tuple[Points, ...] = (
    ((30, 328), (92, 328), (86, 470), (76, 588), (36, 588), (24, 470)),
    ((361, 328), (299, 328), (305, 470), (315, 588), (355, 588), (367, 470)),
)
HANDS: tuple[Points, ...] = (
    ((40, 584), (72, 584), (74, 606), (64, 626), (50, 628), (42, 610)),
    ((351, 584), (319, 584), (317, 606), (327, 626), (341, 628), (349, 610)),
)
SKIN = (196.0, 152.0, 128.0)
#: Outlines are drawn this many times larger and scaled down, for soft edges.
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class MaskStyle:
    """The appearance of a mask: its colour, and pleats (surgical) or a fold down the middle."""

    colour: Colour
    pleated: bool


MASK_STYLES = (
    MaskStyle((150, 196, 222), pleated=True),
    MaskStyle((150, 196, 222), pleated=True),
    MaskStyle((236, 237, 234), pleated=False),
    MaskStyle((34, 35, 39), pleated=False),
    MaskStyle((132, 190, 172), pleated=True),
    MaskStyle((44, 62, 104), pleated=False),
)
COAT_COLOURS: tuple[Colour, ...] = (
    (216, 100, 52), (70, 92, 132), (96, 108, 92), (128, 64, 70), (88, 90, 96), (176, 152, 116), (52, 116, 120),
    (150, 156, 164),
)  # fmt: skip
TROUSER_COLOURS: tuple[Colour, ...] = ((46, 50, 62), (60, 56, 52), (38, 38, 42), (74, 80, 92))


@dataclass(frozen=True, slots=True)
class Appearance:
    """One person: mask (None: without), clothes, and how the light falls (gain around 1)."""

    mask: MaskStyle | None
    coat: Colour
    trousers: Colour
    flipped: bool
    gain: float


@cache
def _photograph() -> Pixels:
    return astronaut().astype(np.float32)


def figure(appearance: Appearance) -> Image.Image:
    """A person from head to feet: RGBA of FIGURE_SIZE, transparent around."""
    image = Image.alpha_composite(_legs(appearance.trousers), _suit(appearance.coat))
    image.alpha_composite(_head(appearance.mask))
    lit = [min(255, round(level * appearance.gain)) for level in range(256)]
    image = image.point([*lit * 3, *range(256)])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if appearance.flipped else image


def flipped_box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Where a box of the figure lies once the figure is flipped."""
    return FIGURE_SIZE[0] - box[2], box[1], FIGURE_SIZE[0] - box[0], box[3]


@cache
def outline(points: Points, width: int, height: int, blur: float) -> Pixels:
    """A polygon as coverage in [0, 1], float32 (height, width), with edges softened by `blur` pixels."""
    scale = SUPERSAMPLING
    mask = Image.new("L", (width * scale, height * scale))
    ImageDraw.Draw(mask).polygon([(x * scale, y * scale) for x, y in points], fill=255)
    mask = mask.resize((width, height), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(np.asarray(mask, np.float32) / 255, np.float32)


def _image(pixels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _over(below: Pixels, above: NDArray[Any]) -> None:
    """Lay RGBA `above` over RGBA `below`, in place."""
    share = above[..., 3:] / 255
    kept = below[..., 3:] / 255 * (1 - share)
    total = np.maximum(share + kept, 1e-6)
    below[..., :3] = (above[..., :3] * share + below[..., :3] * kept) / total
    below[..., 3:] = (share + kept) * 255


def _dyed(photograph: Pixels, colour: Colour) -> Pixels:
    """The photograph with the orange suit in another colour, its folds kept."""
    red, green, blue = photograph[..., 0], photograph[..., 1], photograph[..., 2]
    orange = np.clip((red - blue - 15) / 30, 0, 1) * np.clip((red - green - 8) / 25, 0, 1)
    orange[:200] = 0  # skin and hair are above, and of much the same hue
    light = (0.5 * red + 0.35 * green + 0.15 * blue)[..., None] / 150
    dyed = light * np.array(colour, np.float32)
    return np.asarray(photograph * (1 - orange[..., None]) + dyed * orange[..., None], np.float32)


@cache
def _head(mask: MaskStyle | None) -> Image.Image:
    """Head and neck, RGBA of the photograph's uppermost rows."""
    photograph = _photograph() if mask is None else _masked(_photograph(), mask)
    alpha = outline(HEAD, 512, 512, blur=0.8) * 255
    return _image(np.dstack([photograph, alpha])[: NECK_BOTTOM + 5, : FIGURE_SIZE[0]])


def _masked(photograph: Pixels, style: MaskStyle) -> Pixels:
    """The photograph with a mask over nose, mouth and chin, with the light of the face below it."""
    covered = outline(MASK, 512, 512, blur=0.6)
    rows, columns = np.mgrid[0:512, 0:512].astype(np.float32)
    grey = Image.fromarray(photograph.mean(axis=2).astype(np.uint8))
    light = np.asarray(grey.filter(ImageFilter.GaussianBlur(9)), np.float32) / 165
    # The cloth bulges over nose and chin, and its rim turns away from the light.
    bulge = np.exp(-(((columns - 223) / 34) ** 2) - ((rows - 142) / 40) ** 2)
    rim = np.clip(outline(MASK, 512, 512, blur=5.0) * 2 - 1, 0, 1)
    shade = (0.45 + 0.4 * light) * (0.78 + 0.2 * bulge) * (0.78 + 0.22 * rim) + 0.08
    shade += _folds(rows, columns, style.pleated)
    cloth = np.array(style.colour, np.float32) * shade[..., None] + 10 * bulge[..., None]
    result = photograph * (1 - 0.25 * outline(MASK, 512, 512, blur=3.0)[..., None])  # its soft shadow on the skin
    result = _with_loops(result, style)
    return np.asarray(result * (1 - covered[..., None]) + cloth * covered[..., None], np.float32)


def _folds(rows: Pixels, columns: Pixels, pleated: bool) -> Pixels:
    if not pleated:
        return np.asarray(-0.14 * np.exp(-(((columns - 223.5) / 1.4) ** 2)), np.float32)
    folds = np.zeros_like(rows)
    for height in (134, 146, 158):
        curve = height + 5 * ((columns - 224) / 40) ** 2  # pleats sag in the middle, seen from below
        folds += 0.07 * np.exp(-(((rows - curve + 1.6) / 1.4) ** 2)) - 0.16 * np.exp(-(((rows - curve) / 1.3) ** 2))
    return folds


def _with_loops(photograph: Pixels, style: MaskStyle) -> Pixels:
    scale = SUPERSAMPLING
    lines = Image.new("L", (512 * scale, 512 * scale))
    draw = ImageDraw.Draw(lines)
    for loop in EAR_LOOPS:
        draw.line([(x * scale, y * scale) for x, y in loop], fill=255, width=int(1.6 * scale), joint="curve")
    drawn = np.asarray(lines.resize((512, 512), Image.Resampling.BOX), np.float32)[..., None] / 255
    pale = np.array(style.colour, np.float32) * 0.5 + (110 if sum(style.colour) > 200 else 10)
    return np.asarray(photograph * (1 - 0.85 * drawn) + pale * 0.85 * drawn, np.float32)


@cache
def _suit(colour: Colour) -> Image.Image:
    """Shoulders and coat, RGBA of a whole figure."""
    width, height = FIGURE_SIZE
    photograph = _dyed(_photograph(), colour)
    pixels = np.zeros((height, width, 4), np.float32)
    _draw_coat(pixels, photograph)
    alpha = outline(SHOULDERS, 512, 512, blur=0.8) * 255
    _over(pixels[:PHOTO_BOTTOM], np.dstack([photograph, alpha])[:PHOTO_BOTTOM, :width])
    return _image(pixels)


def _draw_coat(pixels: Pixels, photograph: Pixels) -> None:
    """Continue the suit downwards as a coat: stretch its lowest rows, so that folds and colours continue."""
    top = PHOTO_BOTTOM - 8
    rows = COAT_BOTTOM - top
    strip = Image.fromarray(np.clip(photograph[PHOTO_BOTTOM - 14 : PHOTO_BOTTOM, :400], 0, 255).astype(np.uint8))
    cloth = np.asarray(strip.filter(ImageFilter.GaussianBlur(2)).resize((400, rows), Image.Resampling.BICUBIC))
    columns = np.arange(400, dtype=np.float32)
    folds = 0.05 * np.sin(columns / 11) + 0.04 * np.sin(columns / 4.7 + 1) - 0.25 * ((columns - 195) / 165) ** 2
    down = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    # The drawn folds begin gradually, so that no edge shows at the end of the photograph.
    shade = 1 + folds * np.minimum(1, down * 4) - 0.12 * down
    seam = np.exp(-(((np.abs(columns - 195.5) - 113 + 8 * down) / 4) ** 2)) * np.minimum(1, down * 3)
    coat = np.maximum.reduce([outline(part, *FIGURE_SIZE, blur=1.2)[top:COAT_BOTTOM] for part in (TORSO, *ARMS)])
    for hand in HANDS:
        skin = outline(hand, *FIGURE_SIZE, blur=2.0)[..., None]
        _over(pixels, np.concatenate([np.full((*skin.shape[:2], 3), SKIN), skin * 255], axis=2).astype(np.float32))
    _over(pixels[top:COAT_BOTTOM], np.dstack([cloth * (shade * (1 - 0.45 * seam))[..., None], coat * 255]))


@cache
def _legs(colour: Colour) -> Image.Image:
    """Trousers and shoes, RGBA of a whole figure."""
    width, height = FIGURE_SIZE
    pixels = np.zeros((height, width, 4), np.float32)
    columns = np.arange(width, dtype=np.float32)[None, :]
    for left, foot in ((90, 78), (200, 204)):
        leg = outline(((left, 620), (left + 104, 620), (left + 94, 940), (left + 22, 940)), width, height, blur=1.5)
        light = np.clip(1.1 - ((columns - left - 48) / 80) ** 2, 0.4, 1.1)[..., None]
        _over(pixels, np.dstack([np.broadcast_to(np.array(colour) * light, (height, width, 3)), leg * 255]))
        shoe = outline(((foot + 14, 935), (foot + 112, 935), (foot + 122, 975), (foot, 975)), width, height, blur=2)
        _over(pixels, np.dstack([np.full((height, width, 3), 28.0), shoe * 255]))
    return _image(pixels)
