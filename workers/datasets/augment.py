"""Turns a labelled face into a random crop, as the pipeline would cut it from poor footage of a camera, and into the
fixed crops that validation uses. Pure numpy and OpenCV, one face at a time.
"""

from __future__ import annotations

import math
from enum import StrEnum

import cv2
import numpy as np
from numpy.typing import NDArray

from common.settings import PipelineSettings
from workers.classification import _ops
from workers.datasets.annotations import Box
from workers.datasets.dataset import FaceSample

#: How production cuts crops; training imitates it, and validation does exactly the same.
PRODUCTION = PipelineSettings()

#: Faces are scaled down to as little as this, longer side of the box.
SMALLEST_PX = 10.0

#: Fixed sizes at which faces of class folders are validated, besides their own size.
VALIDATION_SIZES_PX = (20.0, 32.0)

Pixels = NDArray[np.uint8]


class MaskPosition(StrEnum):
    """Where a drawn mask sits. All but the first are worn wrongly."""

    OVER_NOSE = "over_nose"
    UNDER_NOSE = "under_nose"
    AT_CHIN = "at_chin"


#: Ranges of heights, as fractions of the box: a drawn mask's upper edge at the nose and at the cheeks, its lower edge.
MASK_EDGES = {
    MaskPosition.OVER_NOSE: ((0.40, 0.54), (0.48, 0.62), (0.92, 1.04)),
    MaskPosition.UNDER_NOSE: ((0.70, 0.78), (0.66, 0.80), (1.02, 1.14)),
    MaskPosition.AT_CHIN: ((0.88, 0.94), (0.84, 0.94), (1.06, 1.16)),
}

#: A face put into other surroundings fades out from its box to this multiple of it: a little less than the margin of a
#: class folder's images (`FOLDER_MARGIN`).
FADED_AT = 1.28

#: Disposable, fabric and respirator masks as cameras see them, RGB.
MASK_COLOURS = (
    (170, 210, 235), (130, 180, 220), (240, 240, 240), (215, 220, 225), (30, 30, 32), (60, 62, 66),
    (120, 120, 125), (150, 205, 185), (40, 60, 110), (230, 180, 190), (150, 40, 45),
)  # fmt: skip


def random_crop(
    sample: FaceSample,
    rng: np.random.Generator,
    *,
    mask: MaskPosition | None = None,
    surroundings: FaceSample | None = None,
) -> Pixels:
    """A random view of the face, uint8 RGB of any size: size, surroundings, position, turn, light, blur, noise,
    compression.

    `mask`: first draw a mask there. With `surroundings` the face takes the place of that other face, so that the
    network can't learn from hair, collars and crowds.
    """
    pixels, box = sample.pixels, sample.box
    if mask is not None:
        pixels = with_drawn_mask(pixels, box, rng, mask)
    if surroundings is not None:
        pixels, box = placed_in(pixels, box, surroundings)
    native_px = max(box[2] - box[0], box[3] - box[1])
    # Many faces keep their size: faces of scenes are small already, and the network must see large ones, too.
    face_px = native_px if rng.random() < 0.4 else _log_uniform(rng, min(SMALLEST_PX, native_px), native_px)
    context = PRODUCTION.widen_factor if face_px < PRODUCTION.widen_below_px else 1.0
    if rng.random() < 0.25:
        context = float(rng.uniform(1.0, 1.6))
    crop = _cut(pixels, box, context, rng)
    crop = _scaled(crop, min(1.0, face_px / native_px), rng)
    if rng.random() < 0.5:
        crop = np.ascontiguousarray(crop[:, ::-1])
    return _degraded(crop, rng)


def placed_in(pixels: Pixels, box: Box, surroundings: FaceSample) -> tuple[Pixels, Box]:
    """The face in the place of the face of `surroundings`, which is scaled to fit; and its box there."""
    x1, y1, x2, y2 = box
    other_x1, other_y1, other_x2, other_y2 = surroundings.box
    scale_x, scale_y = (x2 - x1) / (other_x2 - other_x1), (y2 - y1) / (other_y2 - other_y1)
    other_h, other_w = surroundings.pixels.shape[:2]
    size = (max(2, round(other_w * scale_x)), max(2, round(other_h * scale_y)))
    interpolation = cv2.INTER_AREA if scale_x * scale_y < 1 else cv2.INTER_LINEAR
    canvas = cv2.resize(surroundings.pixels, size, interpolation=interpolation)

    shift_x, shift_y = round(other_x1 * scale_x - x1), round(other_y1 * scale_y - y1)
    left, right = max(0, shift_x), min(size[0], pixels.shape[1] + shift_x)
    top, bottom = max(0, shift_y), min(size[1], pixels.shape[0] + shift_y)
    across = (np.arange(left, right) + 0.5 - shift_x - (x1 + x2) / 2) / ((x2 - x1) / 2)
    down = (np.arange(top, bottom) + 0.5 - shift_y - (y1 + y2) / 2) / ((y2 - y1) / 2)
    # A square with round corners: 1 on the edges of the box.
    distance = (across[None, :] ** 4 + down[:, None] ** 4) ** 0.25
    opacity = np.clip((FADED_AT - distance) / (FADED_AT - 1), 0, 1).astype(np.float32)[..., None]
    face = pixels[top - shift_y : bottom - shift_y, left - shift_x : right - shift_x].astype(np.float32)
    below = canvas[top:bottom, left:right]
    canvas[top:bottom, left:right] = np.rint(below + opacity * (face - below)).astype(np.uint8)
    placed = (x1 + shift_x, y1 + shift_y, x2 + shift_x, y2 + shift_y)
    return np.asarray(canvas, dtype=np.uint8), placed


def fixed_crop(sample: FaceSample, face_px: float | None) -> Pixels:
    """The crop for validation. A scene's face is cut as in production; a class folder's face is its whole image.

    face_px: scale the face down to this first (longer side); None keeps its size.
    """
    pixels, box = sample.pixels, sample.box
    crop: Pixels = (
        _ops.crop_for_classification(pixels, box, PRODUCTION.widen_below_px, PRODUCTION.widen_factor)
        if sample.from_scene
        else pixels
    )
    native_px = max(box[2] - box[0], box[3] - box[1])
    if face_px is not None and face_px < native_px:
        crop = _resized(crop, face_px / native_px, cv2.INTER_AREA)
    return crop


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _cut(pixels: Pixels, box: Box, context: float, rng: np.random.Generator) -> Pixels:
    """The box times `context`, as a detector might have placed it: shifted, of another size and shape, turned."""
    x1, y1, x2, y2 = box
    box_w, box_h = x2 - x1, y2 - y1
    centre = (
        (x1 + x2) / 2 + box_w * rng.normal(0, 0.05),
        (y1 + y2) / 2 + box_h * rng.normal(0, 0.05),
    )
    scale = context * math.exp(rng.normal(0, 0.1))
    shape = math.exp(rng.normal(0, 0.06))
    width, height = max(2, round(box_w * scale * shape)), max(2, round(box_h * scale / shape))
    angle = rng.normal(0, 8) if rng.random() < 0.5 else 0.0
    matrix = cv2.getRotationMatrix2D(centre, angle, 1.0)
    matrix[:, 2] += (width / 2 - centre[0], height / 2 - centre[1])
    # The pixels beyond the kept ones are unknown: fill them with the edge, a mirror image or a plain colour.
    border = (cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT_101, cv2.BORDER_CONSTANT)[int(rng.integers(3))]
    colour = rng.integers(0, 256, 3).tolist()
    crop = cv2.warpAffine(
        pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=border, borderValue=colour
    )
    crop = np.asarray(crop, dtype=np.uint8)
    if rng.random() < 0.06:
        crop = _cut_off_side(crop, rng)
    return _half_hidden(crop, rng) if rng.random() < 0.06 else crop


def _half_hidden(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """Cover one side or the forehead, as a shoulder, a post or a hat would. Half of the mouth stays free, because
    a face without it could not be labelled."""
    height, width = crop.shape[:2]
    hidden = crop.copy()
    match int(rng.integers(3)):
        case 0:
            part = hidden[:, : max(1, int(width * rng.uniform(0.15, 0.42)))]
        case 1:
            part = hidden[:, int(width * rng.uniform(0.58, 0.85)) :]
        case _:
            part = hidden[: max(1, int(height * rng.uniform(0.15, 0.4)))]
    colour = rng.uniform(0, 255, 3) + rng.normal(0, 6, part.shape)
    part[:] = np.clip(colour, 0, 255).astype(np.uint8)
    return hidden


def _cut_off_side(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """Cut off one side, as at the edge of an image, where the widened box can't grow."""
    height, width = crop.shape[:2]
    part = rng.uniform(0.05, 0.22)
    match int(rng.integers(3)):
        case 0:
            return crop[:, int(width * part) :]
        case 1:
            return crop[:, : max(1, math.ceil(width * (1 - part)))]
        case _:
            return crop[int(height * part) :]


def _scaled(crop: Pixels, scale: float, rng: np.random.Generator) -> Pixels:
    if scale >= 1:
        return crop
    # Cameras average pixels, phones sharpen, thumbnails skip pixels.
    interpolation = (cv2.INTER_AREA, cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)[int(rng.integers(4))]
    return _resized(crop, scale, interpolation)


def _resized(crop: Pixels, scale: float, interpolation: int) -> Pixels:
    height, width = crop.shape[:2]
    size = (max(2, round(width * scale)), max(2, round(height * scale)))
    return np.asarray(cv2.resize(crop, size, interpolation=interpolation), dtype=np.uint8)


def _degraded(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """Change light, blur, noise and compression, each with some probability."""
    if rng.random() < 0.3:
        crop = _blurred(crop, rng)
    if rng.random() < 0.8:
        crop = _relit(crop, rng)
    if rng.random() < 0.25:
        noise = rng.standard_normal(crop.shape, dtype=np.float32) * np.float32(rng.uniform(2, 12))
        crop = np.clip(crop + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        quality = int(rng.integers(25, 96))
        _, encoded = cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, quality])
        crop = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.uint8)
    return crop


def _blurred(crop: Pixels, rng: np.random.Generator) -> Pixels:
    if rng.random() < 0.6:
        sigma = rng.uniform(0.4, 0.03 * max(crop.shape[:2]) + 0.5)
        return np.asarray(cv2.GaussianBlur(crop, (0, 0), sigma), dtype=np.uint8)
    length = int(rng.integers(2, max(4, crop.shape[1] // 8)))
    # Motion blur: a line as kernel, horizontal or vertical.
    kernel = np.full((1, length) if rng.random() < 0.7 else (length, 1), 1 / length, np.float32)
    return np.asarray(cv2.filter2D(crop, -1, kernel), dtype=np.uint8)


def _relit(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """Change contrast, brightness, gamma and colour by one look-up table per channel; sometimes make it grey."""
    levels = np.linspace(0, 1, 256)
    levels = levels ** math.exp(rng.normal(0, 0.3))
    levels = (levels - 0.5) * rng.uniform(0.65, 1.25) + 0.5 + rng.normal(0, 0.08)
    tint = 1 + rng.normal(0, 0.06, 3)
    table = np.clip(levels[:, None] * tint * 255, 0, 255).astype(np.uint8)[None]
    lit = cv2.LUT(crop, table)
    if rng.random() < 0.08:
        lit = cv2.cvtColor(cv2.cvtColor(lit, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(lit, dtype=np.uint8)


def with_drawn_mask(pixels: Pixels, box: Box, rng: np.random.Generator, position: MaskPosition) -> Pixels:
    """The face with a mask drawn on it: a plain or shaded polygon with ear loops, sometimes folds.

    Proportions are those of an upright face in a class folder: eyes at 0.4 of the box, nose 0.65, mouth 0.83.
    """
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    left, right = rng.uniform(-0.02, 0.14), rng.uniform(0.86, 1.02)
    middle = rng.uniform(0.44, 0.56)
    top, cheek, chin = (rng.uniform(*span) for span in MASK_EDGES[position])
    jaw = cheek + (chin - cheek) * rng.uniform(0.5, 0.8)
    outline = np.array(
        [(left, cheek), ((left + middle) / 2, (top + cheek) / 2 - 0.02), (middle, top),
         ((right + middle) / 2, (top + cheek) / 2 - 0.02), (right, cheek), (right - 0.04, jaw),
         (middle + 0.2, chin), (middle - 0.2, chin), (left + 0.04, jaw)]
    )  # fmt: skip
    outline += rng.normal(0, 0.012, outline.shape)
    # In sixteenths of a pixel, OpenCV's fixed-point coordinates, so that edges on small faces aren't jagged.
    points = np.round((outline * (width, height) + (x1, y1)) * 16).astype(np.int32)
    colour = np.array(MASK_COLOURS[int(rng.integers(len(MASK_COLOURS)))]) + rng.normal(0, 12, 3)
    if rng.random() < 0.15:
        colour = rng.uniform(0, 255, 3)
    drawn = pixels.copy()
    loop = np.clip(colour * rng.uniform(0.7, 1.1), 0, 255).tolist()
    thickness = max(1, round(width * rng.uniform(0.01, 0.03)))
    for start, ear_x in ((points[0], -0.08), (points[4], 1.08), (points[8], -0.04), (points[5], 1.04)):
        ear = np.round(np.array((x1 + ear_x * width, y1 + rng.uniform(0.3, 0.5) * height)) * 16).astype(int)
        cv2.line(drawn, start.tolist(), ear.tolist(), loop, thickness, cv2.LINE_AA, shift=4)
    cv2.fillPoly(drawn, [points], np.clip(colour, 0, 255).tolist(), cv2.LINE_AA, shift=4)
    if rng.random() < 0.5:
        _draw_folds(drawn, box, (left, right, cheek, chin), colour, rng)
    if rng.random() < 0.5:
        # Some of the face's own shading shows through, as with cloth.
        through = rng.uniform(0.05, 0.25)
        drawn = cv2.addWeighted(drawn, 1 - through, pixels, through, 0)
    return np.asarray(drawn, dtype=np.uint8)


def _draw_folds(
    drawn: Pixels, box: Box, extent: tuple[float, float, float, float], colour: NDArray[np.float64],
    rng: np.random.Generator,
) -> None:  # fmt: skip
    x1, y1, x2, y2 = box
    left, right, cheek, chin = extent
    dark = np.clip(colour * rng.uniform(0.75, 0.95), 0, 255).tolist()
    for at in (0.3, 0.5, 0.7):
        y = round((y1 + (cheek + (chin - cheek) * at) * (y2 - y1)) * 16)
        ends = [round((x1 + edge * (x2 - x1)) * 16) for edge in (left + 0.08, right - 0.08)]
        cv2.line(drawn, (ends[0], y), (ends[1], y), dark, 1, cv2.LINE_AA, shift=4)
