"""Films the corridor of the sample footage: people come round a corner, walk past the camera and leave.

This module decides who walks where and when, so every face of every frame is known. `common/sample/compositing.py`
tells where a figure's face lies, `common/sample/scenes.py` draws the corridor. Needs the layer `worker` (PyAV).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.sample import people
from common.sample.compositing import Person, caption, hides, vignette
from common.sample.ground_truth import Box, TrueFace
from common.sample.scenes import CORRIDOR, Scene

SECONDS = 32
FRAMES_PER_SECOND = 10
#: Frames per second that the ground truth describes: those analysed by the default of `PipelineSettings.sample_fps`.
TOLD_PER_SECOND = 1

#: When people come, in seconds, and on which side of the corridor (-1 left) they walk towards the camera.
TOWARDS = ((0.0, -1), (2.2, 1), (6.0, -1), (8.5, 1), (13.0, -1))
#: When a person crosses the view before the camera, from right to left.
ACROSS = 18.5
VISITS = len(TOWARDS) + 1

#: A face is not in full view if another figure is closer to it than this share of its height.
CLEARANCE = 0.1
#: Least distance of a face in full view from the image's edge, pixels.
EDGE = 2
#: The middle of a figure, and the row of its eyes.
MIDDLE, EYES = people.FIGURE_SIZE[0] / 2, 100
#: The noise of a frame, in steps of luma. Luma of limited range has more than twice as many steps below black.
NOISE, NOISE_LIMIT = 1.3, 6


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a person is at a time. x: from the middle of the corridor, as in `scenes.Corridor`; scale: how near."""

    seconds: float
    x: float
    scale: float


@dataclass(frozen=True, slots=True)
class Walker:
    """A walking person. lift: the height of their eyes above the camera, in pixels of the figure."""

    appearance: people.Appearance
    way: tuple[Stop, ...]
    lift: float

    def at(self, seconds: float, scene: Scene) -> Person | None:
        """Where the figure is in the frame; None before the first stop and after the last."""
        for a, b in pairwise(self.way):
            if a.seconds <= seconds < b.seconds:
                share = (seconds - a.seconds) / (b.seconds - a.seconds)
                x = a.x + (b.x - a.x) * share
                # The scale grows by equal factors in equal times.
                scale = a.scale * (b.scale / a.scale) ** share
                stride = math.pi * 1.7 * (seconds - self.way[0].seconds)
                up = self.lift + 6 * abs(math.sin(stride))
                return Person(
                    self.appearance,
                    scene.width / 2 + (x + 4 * math.sin(stride) - MIDDLE) * scale,
                    scene.horizon * scene.height - (EYES + up) * scale,
                    scale,
                )
        return None


@dataclass(frozen=True, slots=True)
class Shown:
    """The contents of one frame. ignored: the parts inside the frame of faces that are partly hidden or cut off."""

    offset_seconds: float
    faces: tuple[TrueFace, ...]
    ignored: tuple[Box, ...]


def film(path: Path, scene: Scene, title: Callable[[float], str], rng: np.random.Generator) -> list[Shown]:
    """Write the video, H.264 in MP4 without a creation time, and return the contents of its frames at whole seconds.

    title: the text that the camera writes into the frame at a time in the video.
    """
    walkers = cast(rng)
    cut_outs = {walker.appearance: _CutOut.of(walker.appearance) for walker in walkers}
    empty = Image.fromarray((np.asarray(scene.empty()) * vignette(scene.width, scene.height)).astype(np.uint8))
    shown = []

    def canvases() -> Iterator[Image.Image]:
        for number in range(SECONDS * FRAMES_PER_SECOND):
            seconds = number / FRAMES_PER_SECOND
            persons = _present(walkers, seconds, scene)
            if number % (FRAMES_PER_SECOND // TOLD_PER_SECOND) == 0:
                shown.append(_told(seconds, persons, scene))
            canvas = empty.copy()
            for person in persons:
                cut_outs[person.appearance].paste(canvas, person, _columns(person, scene))
            caption(canvas, title(seconds))
            yield canvas

    _encode(path, canvases(), rng)
    return shown


def cast(rng: np.random.Generator) -> list[Walker]:
    """The people of a video, half of them with a mask, each in another coat."""
    coats = rng.permutation(len(people.COAT_COLOURS))
    styles = rng.permutation(len(people.MASK_STYLES))
    masked = rng.permutation(VISITS) < VISITS // 2
    ways = [_towards(start, side, float(rng.uniform(350, 410))) for start, side in TOWARDS] + [_across(ACROSS)]
    return [
        Walker(
            people.Appearance(
                mask=people.MASK_STYLES[styles[number]] if masked[number] else None,
                coat=people.COAT_COLOURS[coats[number]],
                trousers=people.TROUSER_COLOURS[rng.integers(len(people.TROUSER_COLOURS))],
                flipped=bool(rng.random() < 0.5),
                gain=float(rng.uniform(0.88, 1.04)),
            ),
            way,
            lift=float(np.clip(rng.normal(0, 25), -45, 45)),
        )
        for number, way in enumerate(ways)
    ]


def _towards(start: float, side: int, lane: float) -> tuple[Stop, ...]:
    """Round the corner, along one side of the corridor, and out of the frame beside the camera."""
    corner = CORRIDOR.corner_scale
    return tuple(
        Stop(start + seconds, side * x, scale)
        for seconds, x, scale in (
            (0.0, 1300, 0.86 * corner),
            (1.3, 960, 0.92 * corner),
            (2.2, 775, corner),
            (5.2, lane, 0.43),
            (10.2, lane, 1.05),
            (11.8, 700, 1.3),
        )
    )


def _across(start: float) -> tuple[Stop, ...]:
    return Stop(start, 810, 0.75), Stop(start + 13, -745, 0.85)


def _present(walkers: Sequence[Walker], seconds: float, scene: Scene) -> list[Person]:
    persons = [person for walker in walkers if (person := walker.at(seconds, scene)) is not None]
    return sorted(persons, key=lambda person: person.scale)


def _columns(person: Person, scene: Scene) -> tuple[int, int]:
    """The columns of the frame in which this person may be seen; behind the corner, those between the walls."""
    return CORRIDOR.opening(scene.width) if person.scale < CORRIDOR.corner_scale else (0, scene.width)


def _told(seconds: float, persons: Sequence[Person], scene: Scene) -> Shown:
    """persons: the farthest first."""
    faces, ignored = [], []
    for number, person in enumerate(persons):
        face = person.face
        left, right = _columns(person, scene)
        x1, y1, x2, y2 = face.box
        whole = x1 >= left + EDGE and x2 <= right - EDGE and y1 >= EDGE and y2 <= scene.height - EDGE
        if whole and not any(hides(near, person, CLEARANCE) for near in persons[number + 1 :]):
            faces.append(face)
        elif x1 < right and x2 > left:
            ignored.append((max(x1, left), y1, min(x2, right), y2))
    return Shown(seconds, tuple(faces), tuple(ignored))


@dataclass(frozen=True, slots=True)
class _CutOut:
    """A figure prepared for scaling many times: colours multiplied by coverage, and margins all around.

    half: the figure at half the size, from which a small one is made in a third of the time.
    """

    whole: Image.Image
    half: Image.Image
    pad: int

    @classmethod
    def of(cls, appearance: people.Appearance) -> _CutOut:
        pad = 24
        width, height = people.FIGURE_SIZE
        padded = Image.new("RGBA", (width + 2 * pad, height + 2 * pad))
        padded.paste(people.figure(appearance), (pad, pad))
        whole = padded.convert("RGBa")
        return cls(whole, whole.reduce(2), pad)

    def paste(self, canvas: Image.Image, person: Person, columns: tuple[int, int]) -> None:
        """Draw the part of the figure that lies in the frame and in these columns, [left, right)."""
        x, y = person.x - self.pad * person.scale, person.y - self.pad * person.scale
        image, scale = (self.whole, person.scale) if person.scale > 0.5 else (self.half, person.scale * 2)
        left, top = max(math.ceil(x), columns[0]), max(math.ceil(y), 0)
        right = min(math.floor(x + image.width * scale), columns[1])
        bottom = min(math.floor(y + image.height * scale), canvas.height)
        if left >= right or top >= bottom:
            return
        inverse = 1 / scale
        # At the exact fraction of a pixel, so that the box of its face is exact too.
        box = ((left - x) * inverse, (top - y) * inverse, (right - x) * inverse, (bottom - y) * inverse)
        seen = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box).convert("RGBA")
        canvas.paste(seen, (left, top), seen)


def _encode(path: Path, canvases: Iterator[Image.Image], rng: np.random.Generator) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    first = next(canvases)
    with av.open(str(path), "w", format="mp4") as file:
        # With mbtree, which this preset turns off: without it, a view that hardly changes takes four times the bytes.
        # Without B-frames, because with them and mbtree the output of x264's AVX-512 code differs from run to run.
        options = {"preset": "superfast", "crf": "25", "x264-params": "mbtree=1:rc-lookahead=10:bframes=0"}
        stream = file.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options=options)
        stream.width, stream.height = first.size
        stream.pix_fmt = "yuv420p"
        encoder = stream.codec_context
        encoder.gop_size = 2 * FRAMES_PER_SECOND
        # With one thread the same frames give the same bytes on any machine.
        encoder.thread_count = 1
        # BT.709, limited range: AVCOL_*_BT709 and AVCOL_RANGE_MPEG (FFmpeg, libavutil/pixfmt.h).
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = encoder.color_range = 1
        noise = _noise(first.size, rng)
        for number, canvas in enumerate(chain([first], canvases)):
            frame = av.VideoFrame.from_image(canvas).reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
            )
            _add_noise(frame, noise, rng)
            frame.pts, frame.time_base = number, Fraction(1, FRAMES_PER_SECOND)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def _noise(size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A sheet of noise larger than a frame; negative values as their complement to 256."""
    sheet = np.clip(rng.normal(0, NOISE, (size[1] + 64, size[0] + 64)), -NOISE_LIMIT, NOISE_LIMIT)
    return np.round(sheet).astype(np.int8).view(np.uint8)


def _add_noise(frame: Any, noise: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Add a random part of the sheet to the luma of a frame."""
    down, right = (int(shift) for shift in rng.integers(64, size=2))
    plane = frame.planes[0]
    luma = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    # Adding the complement subtracts; limited range leaves room, so that no value overflows.
    luma += noise[down : down + frame.height, right : right + frame.width]
