"""Draws the empty scenes of the sample footage: each camera's view without people.

Plain geometry with two textures (brick, gravel: CC0, see SOURCES.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.sample.source_images import texture

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scene:
    """A fixed camera's view. `horizon`: the height of eye level, as a share of the image's height from its top."""

    width: int
    height: int
    horizon: float
    draw: Callable[[int, int], Image.Image]

    def empty(self) -> Image.Image:
        """The view without people, RGB."""
        return self.draw(self.width, self.height).filter(ImageFilter.GaussianBlur(0.7))


def _texture(name: Literal["brick", "gravel"], low: Colour, high: Colour) -> Image.Image:
    """A grey texture as RGB between two colours, 512×512."""
    grey = texture(name).astype(np.float32)
    share = np.clip((grey - grey.mean()) / (4 * grey.std()) + 0.5, 0, 1)[..., None]
    pixels = np.array(low, np.float32) * (1 - share) + np.array(high, np.float32) * share
    return Image.fromarray(pixels.astype(np.uint8))


def _tiled(texture: Image.Image, columns: int, rows: int) -> Image.Image:
    tiles = Image.new("RGB", (texture.width * columns, texture.height * rows))
    for column in range(columns):
        for row in range(rows):
            tiles.paste(texture, (column * texture.width, row * texture.height))
    return tiles


def _checkered(light: Colour, dark: Colour) -> Image.Image:
    tile = Image.new("RGB", (128, 128), light)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, 63, 63), fill=dark)
    draw.rectangle((64, 64, 127, 127), fill=dark)
    return tile


def _lay(image: Image.Image, texture: Image.Image, corners: Sequence[Point]) -> None:
    """Paint a texture onto a quadrilateral (top left, top right, bottom right, bottom left), in perspective."""
    width, height = texture.size
    source = ((0, 0), (width, 0), (width, height), (0, height))
    equations = []
    for (x, y), (u, v) in zip(corners, source, strict=True):
        equations += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    values = [value for point in source for value in point]
    coefficients: list[float] = np.linalg.solve(np.array(equations, float), np.array(values, float)).tolist()
    warped = texture.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
    shape = Image.new("L", image.size)
    ImageDraw.Draw(shape).polygon(list(corners), fill=255)
    image.paste(warped, (0, 0), shape)


def _gradient(width: int, height: int, top: Colour, bottom: Colour) -> Image.Image:
    share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    pixels = np.array(top, np.float32) * (1 - share) + np.array(bottom, np.float32) * share
    return Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).astype(np.uint8))


def _end_wall(width: int, height: int) -> tuple[float, float, float, float]:
    """The box of the wall at the far end of a room, xyxy."""
    return 0.34 * width, 0.06 * height, 0.66 * width, 0.58 * height


def _room(width: int, height: int, walls: tuple[Any, Any], floor: Any, ceiling: Image.Image) -> Image.Image:
    """A corridor in one-point perspective: ceiling, floor, side walls (left, right); the end wall is left open."""
    image = Image.new("RGB", (width, height))
    left, top, right, bottom = _end_wall(width, height)
    _lay(image, ceiling, [(0, -0.5 * height), (width, -0.5 * height), (right, top), (left, top)])
    _lay(image, walls[0], [(0, -0.5 * height), (left, top), (left, bottom), (0, 1.15 * height)])
    _lay(image, walls[1], [(right, top), (width, -0.5 * height), (width, 1.15 * height), (right, bottom)])
    _lay(image, floor, [(left, bottom), (right, bottom), (1.5 * width, 1.3 * height), (-0.5 * width, 1.3 * height)])
    return image


def lobby_door(width: int, height: int) -> Image.Image:
    """An entrance hall: glass doors with daylight at its end, a tiled floor."""
    plaster = _gradient(512, 512, (206, 204, 196), (176, 172, 162))
    floor = _tiled(_checkered((170, 166, 158), (146, 142, 136)), 8, 8)
    image = _room(width, height, (plaster, plaster), floor, _gradient(512, 512, (188, 188, 184), (216, 216, 210)))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = _end_wall(width, height)
    glass = _gradient(int(right - left), int(bottom - top), (214, 228, 238), (168, 186, 180))
    image.paste(glass, (int(left), int(top)))
    step = (right - left) / 4
    for index in range(5):
        x = left + index * step
        draw.line([(x, top), (x, bottom)], fill=(84, 90, 96), width=7 if index in (0, 2, 4) else 3)
    draw.line([(left, top + 40), (right, top + 40)], fill=(84, 90, 96), width=6)
    draw.line([(left, bottom), (right, bottom)], fill=(70, 74, 80), width=8)
    for x in (0.1, 0.22, 0.78, 0.9):  # pictures on the walls, nearer ones larger
        depth = abs(x - 0.5) * 2
        w, y, h = 0.05 * depth * width, (0.36 - 0.34 * depth) * height, 0.34 * depth * height
        frame = [(x * width - w, y), (x * width + w, y), (x * width + w, y + h), (x * width - w, y + h)]
        draw.polygon(frame, fill=(120, 132, 128) if x < 0.5 else (146, 128, 108), outline=(72, 66, 60))
    return image


def lobby_stairs(width: int, height: int) -> Image.Image:
    """A stairwell: a flight of steps between brick walls."""
    brick = _tiled(_texture("brick", (116, 92, 80), (176, 150, 134)), 2, 2)
    floor = _tiled(_texture("gravel", (116, 116, 116), (142, 142, 140)), 2, 2)
    image = _room(width, height, (brick, brick), floor, _gradient(512, 512, (150, 148, 144), (186, 184, 178)))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = _end_wall(width, height)
    draw.rectangle((left, top, right, bottom), fill=(204, 200, 190))
    steps = 9
    for index in range(steps):  # from the far top step to the near bottom one
        share = index / (steps - 1)
        y = top + 0.36 * (bottom - top) + share * 0.64 * (bottom - top)
        inset = (1 - share) * 0.055 * width
        rise = 0.64 * (bottom - top) / steps
        draw.rectangle((left + inset, y - rise, right - inset, y - rise * 0.35), fill=(160, 156, 150))
        draw.rectangle((left + inset, y - rise * 0.35, right - inset, y), fill=(112, 108, 104))
    for x, inset in ((left, 0.055 * width), (right, -0.055 * width)):
        rail = [(x + inset, top + 0.2 * (bottom - top)), (x, 0.8 * bottom)]
        draw.line(rail, fill=(58, 56, 56), width=5)
        for share in (0.0, 0.33, 0.66, 1.0):
            px, py = (rail[0][i] * (1 - share) + rail[1][i] * share for i in (0, 1))
            draw.line([(px, py), (px, py + 0.2 * (bottom - top))], fill=(58, 56, 56), width=3)
    return image


def market_gate(width: int, height: int) -> Image.Image:
    """A market street: a gate, stalls with awnings, sky above, gravel below."""
    image = _gradient(width, height, (176, 204, 226), (228, 222, 206))
    eye = 0.5 * height
    brick = _tiled(_texture("brick", (150, 116, 84), (206, 172, 130)), 3, 2)
    _lay(image, brick, [(0, -0.3 * height), (0.36 * width, 0.2 * height), (0.36 * width, eye), (0, 1.1 * height)])
    _lay(
        image, brick, [(0.64 * width, 0.2 * height), (width, -0.3 * height), (width, 1.1 * height), (0.64 * width, eye)]
    )
    gravel = _tiled(_texture("gravel", (150, 138, 118), (186, 174, 152)), 4, 4)
    ground = [(0.36 * width, eye), (0.64 * width, eye), (1.7 * width, 1.35 * height), (-0.7 * width, 1.35 * height)]
    _lay(image, gravel, ground)
    draw = ImageDraw.Draw(image)
    for side in (0.36, 0.6):
        draw.rectangle((side * width, 0.1 * height, (side + 0.04) * width, eye), fill=(188, 148, 104))
    draw.rectangle((0.36 * width, 0.1 * height, 0.64 * width, 0.18 * height), fill=(172, 132, 92))
    draw.arc((0.4 * width, 0.16 * height, 0.6 * width, 0.5 * height), 180, 360, fill=(172, 132, 92), width=8)
    _awnings(draw, width, height)
    return image


def _awnings(draw: ImageDraw.ImageDraw, width: int, height: int) -> None:
    for (x0, x1), colours in {
        (0.02, 0.15): ((178, 60, 54), (226, 214, 196)),
        (0.18, 0.31): ((48, 104, 112), (226, 214, 196)),
        (0.69, 0.82): ((198, 142, 52), (226, 214, 196)),
        (0.85, 0.98): ((70, 96, 66), (226, 214, 196)),
    }.items():
        near = abs((x0 + x1) / 2 - 0.5) * 2
        top, drop = (0.3 - 0.26 * near) * height, (0.05 + 0.07 * near) * height
        stripes = 6
        for index in range(stripes):
            a, b = (x0 + (x1 - x0) * (index + step) / stripes for step in (0, 1))
            stripe = [(a * width, top), (b * width, top), (b * width, top + drop), (a * width, top + drop)]
            draw.polygon(stripe, fill=colours[index % 2])
        draw.rectangle((x0 * width, top + drop, x1 * width, top + drop + 5), fill=(70, 60, 52))


@dataclass(frozen=True, slots=True)
class Corridor:
    """A straight corridor, seen from its middle at eye level; another one crosses its far end.

    Lengths are pixels of a whole figure (`people.FIGURE_SIZE`) from the camera's axis. Depth is given as the scale of a
    figure at that depth: (x, y) at scale s is the pixel (width / 2 + x * s, horizon * height + y * s).
    """

    half_width: float = 950
    floor: float = 880
    ceiling: float = -550
    #: The depths at which the side walls end, and at which the crossing's own wall stands.
    corner_scale: float = 0.25
    end_scale: float = 0.19

    def opening(self, width: int) -> tuple[int, int]:
        """The columns [left, right) in which the crossing is seen; outside them the side walls hide it."""
        reach = round(self.half_width * self.corner_scale)
        return width // 2 - reach, width // 2 + reach


CORRIDOR = Corridor()
CORRIDOR_HORIZON = 0.31


def lobby_corridor(width: int, height: int) -> Image.Image:
    """A corridor with doors on both sides, and notice boards on the wall at its end."""
    hall = CORRIDOR
    side, floor, ceiling, corner, end = hall.half_width, hall.floor, hall.ceiling, hall.corner_scale, hall.end_scale

    def seen(x: float, y: float, scale: float) -> Point:
        return width / 2 + x * scale, CORRIDOR_HORIZON * height + y * scale

    def on_wall(x: float, top: float, bottom: float, far: float, near: float) -> list[Point]:
        return [seen(x, top, near), seen(x, top, far), seen(x, bottom, far), seen(x, bottom, near)]

    def level(x: float, y: float, far: float, near: float) -> list[Point]:
        return [seen(-x, y, far), seen(x, y, far), seen(x, y, near), seen(-x, y, near)]

    image = Image.new("RGB", (width, height), (186, 184, 176))
    tiles = _checkered((158, 160, 158), (142, 145, 144))
    plaster = _gradient(512, 512, (214, 212, 202), (182, 178, 166))
    light = _gradient(512, 512, (222, 222, 216), (190, 190, 186))
    # The crossing: wider than its visible part.
    far_wall = [seen(-1600, ceiling, end), seen(1600, ceiling, end), seen(1600, floor, end), seen(-1600, floor, end)]
    _lay(image, _gradient(512, 512, (176, 186, 186), (160, 168, 166)), far_wall)
    _lay(image, light, level(1600, ceiling, end, corner))
    _lay(image, _tiled(tiles, 12, 2), level(1600, floor, end, corner))
    near = 0.6
    _lay(image, light, level(side, ceiling, corner, near))
    _lay(image, _tiled(tiles, 7, 10), level(side, floor, corner, near * 2))
    for x in (-side, side):
        _lay(image, plaster, on_wall(x, ceiling, floor, corner, near))
    draw = ImageDraw.Draw(image)
    for x, colour in ((-side, (112, 128, 134)), (side, (140, 118, 94))):
        draw.polygon(on_wall(x, -230, floor, 0.31, 0.4), fill=colour, outline=(86, 84, 80))
        draw.polygon(on_wall(x, floor - 60, floor, corner, 0.31), fill=(132, 130, 124))  # skirting boards
        draw.polygon(on_wall(x, floor - 60, floor, 0.4, near), fill=(132, 130, 124))
        draw.line([seen(x, ceiling, corner), seen(x, ceiling, near)], fill=(178, 176, 168), width=3)
        draw.line([seen(x, ceiling, corner), seen(x, floor, corner)], fill=(150, 148, 140), width=2)
    draw.rectangle((*seen(-420, -160, end), *seen(420, 330, end)), fill=(126, 100, 74), outline=(92, 76, 60), width=3)
    for x, y, colour in ((-340, -100, (224, 220, 206)), (-60, -90, (200, 212, 218)), (200, -110, (222, 206, 170))):
        draw.rectangle((*seen(x, y, end), *seen(x + 170, y + 240, end)), fill=colour)
    for near_edge, far_edge in ((0.45, 0.37), (0.31, 0.275)):
        draw.polygon(level(170, ceiling, far_edge, near_edge), fill=(250, 250, 244))  # lamps
    return image


#: The cameras that take images.
SCENES: dict[tuple[str, str], Scene] = {
    ("lobby", "door"): Scene(1280, 720, 0.2, lobby_door),
    ("lobby", "stairs"): Scene(960, 540, 0.2, lobby_stairs),
    ("market-street", "gate"): Scene(1120, 630, 0.22, market_gate),
}

#: The cameras that film. People walk through them as through a `Corridor`.
FILMED: dict[tuple[str, str], Scene] = {("lobby", "corridor"): Scene(960, 540, CORRIDOR_HORIZON, lobby_corridor)}
