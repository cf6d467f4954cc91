"""Small videos for the tests, made on the spot: each frame tells its number, whatever a codec does to it."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

#: A number is written as this many blocks, rows by columns, dark or light, the highest bit first.
_ROWS, _COLUMNS = 3, 4
_DARK, _LIGHT = 40, 215
_BT601 = Colorspace.ITU601
#: Numbers that a frame can tell are below this one.
NUMBERS = 2 ** (_ROWS * _COLUMNS)

#: The fastest that each encoder offers, and silent.
_OPTIONS: dict[str, dict[str, str]] = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libsvtav1": {"preset": "8", "crf": "5"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}
_SOUND = {"matroska": "libopus", "webm": "libopus", "avi": "pcm_s16le"}
_PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p"}
#: Encoders that can have B-frames.
_BIDIRECTIONAL = {"libx264", "libx265", "mpeg2video", "mpeg4", "mpeg1video"}

# This library logs to stderr by itself.
os.environ.setdefault("SVT_LOG", "1")


def numbered(number: int, size: tuple[int, int] = (64, 48)) -> NDArray[np.uint8]:
    """A picture of this number, RGB uint8 (height, width, 3). size: (width, height)."""
    if not 0 <= number < NUMBERS:
        raise ValueError(f"{number} can't be told by a frame; valid: 0 to {NUMBERS - 1}")
    bits = [number >> place & 1 for place in reversed(range(_ROWS * _COLUMNS))]
    blocks = np.where(np.array(bits).reshape(_ROWS, _COLUMNS), _LIGHT, _DARK).astype(np.uint8)
    width, height = size
    rows = np.arange(height) * _ROWS // height
    columns = np.arange(width) * _COLUMNS // width
    return np.repeat(blocks[rows][:, columns, None], 3, axis=2)


def number_of(rgb: NDArray[np.uint8]) -> int:
    """The number that a picture of `numbered` tells, of any size and after any codec. Raises `ValueError` where the
    picture is not clearly one."""
    height, width = rgb.shape[:2]
    number = 0
    for row in range(_ROWS):
        for column in range(_COLUMNS):
            # The middle of the block: its edges are blurred.
            top, bottom = (height * (4 * row + 1) // (4 * _ROWS), height * (4 * row + 3) // (4 * _ROWS))
            left, right = (width * (4 * column + 1) // (4 * _COLUMNS), width * (4 * column + 3) // (4 * _COLUMNS))
            level = float(rgb[top:bottom, left:right].mean())
            if abs(level - (_DARK + _LIGHT) / 2) < (_LIGHT - _DARK) / 4:
                raise ValueError(f"block ({row}, {column}) is neither dark nor light: {level:.0f}")
            number = number << 1 | (level > (_DARK + _LIGHT) / 2)
    return number


@dataclass(frozen=True)
class Colours:
    """How the frames are encoded and labelled.

    matrix, full: what the RGB is converted with (`av.video.reformatter.Colorspace`), to the full range or not.
    tag, full_tag: what the file says, by FFmpeg's numbers (AVColorSpace and AVColorRange, libavutil/pixfmt.h):
    2 and 0 say nothing.
    """

    matrix: Any = Colorspace.ITU601
    tag: int = 2
    full: bool = False
    full_tag: int = 0


def make_video(
    container: str = "mp4",
    codec: str = "libx264",
    frames: int = 10,
    *,
    fps: Fraction | int = 10,
    size: tuple[int, int] = (64, 48),
    gop: int = 12,
    bframes: int = 0,
    times: Sequence[Fraction | float] | None = None,
    start: Fraction | float = 0,
    rotation: int = 0,
    audio: bool = False,
    video: bool = True,
    image: Callable[[int], NDArray[np.uint8]] | None = None,
    pixels: str | None = None,
    colours: Colours | None = None,
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
    muxer: Mapping[str, str] | None = None,
) -> bytes:
    """A video file of frames that tell their numbers, 0 to `frames` - 1.

    container: FFmpeg's name (mp4, mov, matroska, webm, avi, mpegts, gif). codec: FFmpeg's encoder. size: (width,
    height). gop: frames from one keyframe to the next. bframes: at most this many in a row, where the encoder has
    them. times: of each frame in seconds, rising, for a variable rate, instead of `frames`; rounded to ms. start: the
    time of the first frame (added to `times`), for which the container must have a place. rotation: degrees
    counter-clockwise by which a player turns it. audio: a second stream of silence. video False: nothing else.
    picture: other pictures than those of `numbered`. options, muxer: for the encoder and the container.
    """
    # Not in memory: where FFmpeg moves an index to the front, it opens the file once more.
    with tempfile.TemporaryDirectory() as folder, _ordinary_priority():
        path = Path(folder, "video")
        with av.open(str(path), "w", format=container, options=dict(muxer or {})) as file:
            file.metadata.update(metadata or {})
            stream = None
            if video:
                uniform = times is None and (Fraction(start) * Fraction(fps)).denominator == 1
                stream = file.add_stream(
                    codec, rate=Fraction(fps), options={**_OPTIONS.get(codec, {}), **(options or {})}
                )
                stream.width, stream.height = size
                stream.pix_fmt = pixels or _PIXELS.get(codec, "yuv420p")
                encoder = stream.codec_context
                encoder.time_base = 1 / Fraction(fps) if uniform else Fraction(1, 1000)
                encoder.gop_size = gop
                if codec in _BIDIRECTIONAL:
                    encoder.max_b_frames = bframes
                encoder.thread_count = 1
                if colours is not None:
                    encoder.colorspace, encoder.color_range = colours.tag, colours.full_tag
                if rotation:
                    stream.set_display_rotation(rotation)
            sound = file.add_stream(_SOUND.get(container, "aac"), rate=48000, layout="mono") if audio else None
            if not frames:
                # The header, which comes with the first packet otherwise.
                file.start_encoding()
            if stream is not None:
                seconds = times if times is not None else [Fraction(number) / Fraction(fps) for number in range(frames)]
                for number, at in enumerate(seconds):
                    rgb = image(number) if image is not None else numbered(number, size)
                    frame = _converted(av.VideoFrame.from_ndarray(rgb, format="rgb24"), stream.pix_fmt, colours)
                    frame.pts = round((Fraction(at) + Fraction(start)) / encoder.time_base)
                    frame.time_base = encoder.time_base
                    file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
            if sound is not None:
                _write_silence(file, sound, Fraction(len(times) if times is not None else frames) / Fraction(fps))
        return path.read_bytes()


@contextmanager
def _ordinary_priority() -> Iterator[None]:
    """As root, SVT-AV1 makes the thread that calls it a real-time one, and with it every process it starts later."""
    yield
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def index_first(mp4: bytes) -> bytes:
    """The MP4 with its index (the moov box) before its frames, as for the web."""
    with tempfile.TemporaryDirectory() as folder, av.open(io.BytesIO(mp4)) as source:
        # FFmpeg reads the file again to move the index, which it can't in memory.
        path = Path(folder, "video.mp4")
        with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    file.mux(packet)
        return path.read_bytes()


def _converted(frame: Any, pixels: str, colours: Colours | None) -> Any:
    """The RGB frame in the encoder's format; where nothing is said, as for SDTV and in the format's own range."""
    matrix, full, tag, full_tag = _BT601, pixels.startswith("yuvj"), 2, 0
    if colours is not None:
        matrix, full, tag, full_tag = colours.matrix, colours.full, colours.tag, colours.full_tag
    converted = frame.reformat(
        format=pixels, dst_colorspace=matrix, src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
    )  # fmt: skip
    converted.colorspace, converted.color_range = tag, full_tag
    return converted


def _write_silence(file: Any, stream: Any, seconds: Fraction) -> None:
    size = stream.codec_context.frame_size or 1024
    layout = stream.codec_context.format.name
    for start in range(0, int(seconds * 48000), size):
        frame = av.AudioFrame(format=layout, layout="mono", samples=size)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))
