"""Frames as players show them: colours by what the file says of them, and upright."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image

from tests.videos import Colours, make_video
from workers.media.frames import to_rgb

#: Skin, mask and light, some of them as far from grey as they come.
PATCHES = [(200, 140, 110), (90, 60, 40), (120, 180, 220), (235, 235, 235), (20, 20, 20), (220, 40, 40), (40, 160, 60)]
#: Rounding to 8 bits in YUV and back.
TOLERANCE = 4
LOSSLESS = {"qp": "0"}


def patches(width: int = 112, height: int = 48) -> NDArray[np.uint8]:
    """The patches as vertical stripes."""
    stripes = np.array(PATCHES, np.uint8)[np.arange(width) * len(PATCHES) // width]
    return np.broadcast_to(stripes, (height, width, 3)).copy()


def measured(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The mean of the middle of each stripe."""
    step = rgb.shape[1] // len(PATCHES)
    middle = slice(rgb.shape[0] // 4, -rgb.shape[0] // 4)
    return np.array([rgb[middle, n * step + 4 : (n + 1) * step - 4].mean((0, 1)) for n in range(len(PATCHES))])


def first_frame(content: bytes) -> Any:
    with av.open(io.BytesIO(content)) as file:
        return next(file.decode(video=0))


def error_of(rgb: NDArray[np.uint8]) -> float:
    return float(np.abs(measured(rgb) - np.array(PATCHES)).max())


def encoded(colours: Colours, *, height: int = 48, codec: str = "libx264", **options: Any) -> Any:
    image = patches(height=height)
    content = make_video(
        "mp4" if codec == "libx264" else "avi",
        codec,
        1,
        size=(image.shape[1], height),
        image=lambda _: image,
        colours=colours,
        **{"options": LOSSLESS, **options},
    )
    return first_frame(content)


BT709, BT601, BT2020 = Colorspace.ITU709, Colorspace.ITU601, Colorspace.BT2020


@pytest.mark.parametrize(
    ("colours", "height"),
    [
        pytest.param(Colours(BT709, 1, full_tag=1), 48, id="tagged 709"),
        pytest.param(Colours(BT709, 1, full_tag=1), 720, id="tagged 709, HD"),
        pytest.param(Colours(BT601, 5, full_tag=1), 48, id="tagged 601 (625 lines)"),
        pytest.param(Colours(BT601, 6, full_tag=1), 720, id="tagged 601 (525 lines), HD"),
        pytest.param(Colours(BT2020, 9, full_tag=1), 720, id="tagged 2020"),
        pytest.param(Colours(BT601), 48, id="untagged SD"),
        pytest.param(Colours(BT601), 576, id="untagged SD, 576 lines"),
        pytest.param(Colours(BT709), 720, id="untagged HD"),
        pytest.param(Colours(BT709), 1080, id="untagged HD, 1080 lines"),
        pytest.param(Colours(BT709, 1, full=True, full_tag=2), 48, id="tagged 709 in full range"),
        pytest.param(Colours(BT601, 6, full=True, full_tag=2), 48, id="tagged 601 in full range"),
        # A value that means nothing is one that says nothing.
        pytest.param(Colours(BT601, 3), 48, id="reserved, SD"),
    ],
)
def test_colours_are_those_that_players_show(colours: Colours, height: int) -> None:
    assert error_of(to_rgb(encoded(colours, height=height))) <= TOLERANCE


@pytest.mark.parametrize(
    ("written", "said"),
    [
        pytest.param(Colours(BT709, 6, full_tag=1), "709 that says 601", id="709 as 601"),
        pytest.param(Colours(BT601, 1, full_tag=1), "601 that says 709", id="601 as 709"),
        pytest.param(Colours(BT709), "untagged SD in HD's colours", id="untagged"),
        pytest.param(Colours(BT601, 6, full=True, full_tag=1), "full range that says otherwise", id="range"),
    ],
)
def test_the_tolerance_tells_the_colours_apart(written: Colours, said: str) -> None:
    assert error_of(to_rgb(encoded(written))) > 3 * TOLERANCE, said


@pytest.mark.parametrize("pixels", ["yuvj420p", "yuvj422p", "yuvj444p"])
def test_motion_jpeg_is_of_full_range(pixels: str) -> None:
    frame = encoded(Colours(BT601, full=True), codec="mjpeg", pixels=pixels, options={"qmin": "1", "qmax": "1"})
    # Lossy, if as little as can be.
    assert error_of(to_rgb(frame)) <= TOLERANCE + 2


def test_gif_is_rgb_already() -> None:
    content = make_video("gif", "gif", 1, size=(112, 720), image=lambda _: patches(height=720))
    # The palette is coarse: what another reader sees of it is what counts.
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(to_rgb(first_frame(content)), expected)


def ramp() -> NDArray[np.uint8]:
    """All greys from the left to the right."""
    return np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3)).copy()


def test_grey() -> None:
    buffer = io.BytesIO()
    Image.fromarray(ramp()[..., 0]).save(buffer, "JPEG", quality=95)
    buffer.seek(0)
    with av.open(buffer, format="mjpeg") as file:
        frame = next(file.decode(video=0))
    assert frame.format.name == "gray"
    assert np.abs(to_rgb(frame).astype(int) - ramp()).max() <= TOLERANCE


def test_ten_bits() -> None:
    frame = first_frame(make_video("mp4", "libx264", 1, image=lambda _: ramp(), pixels="yuv420p10le", options=LOSSLESS))
    assert frame.format.name == "yuv420p10le"
    assert np.abs(to_rgb(frame).astype(int) - ramp()).max() <= TOLERANCE


def asymmetric(width: int, height: int) -> NDArray[np.uint8]:
    """A picture that looks different from every side: its corners have their own levels."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[: height // 2, : width // 2] = 20
    image[: height // 2, width // 2 :] = 90
    image[height // 2 :, width // 2 :] = 235
    return image


def corners(rgb: NDArray[np.uint8]) -> list[int]:
    """The levels of the corners from the upper left, clockwise, rounded to tens."""
    return [round(float(rgb[y, x].mean()) / 10) for y, x in ((4, 4), (4, -5), (-5, -5), (-5, 4))]


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("size", [(64, 48), (48, 80), (66, 50)])
@pytest.mark.parametrize("turned", [0, 90, 180, 270, -90])
def test_rotated_recordings_come_out_upright(container: str, size: tuple[int, int], turned: int) -> None:
    upright = asymmetric(*size)
    # A camera that is turned clockwise sees the world turned the other way; players turn it back.
    stored = np.ascontiguousarray(np.rot90(upright, -turned // 90))
    height, width = stored.shape[:2]
    content = make_video(
        container, "libx264", 1, size=(width, height), rotation=turned, image=lambda _: stored, options=LOSSLESS
    )
    frame = first_frame(content)
    assert (frame.width, frame.height) == (width, height)
    rgb = to_rgb(frame)
    assert rgb.shape == upright.shape and rgb.dtype == np.uint8 and rgb.flags.c_contiguous
    assert corners(rgb) == corners(upright) == [2, 9, 24, 13]
    assert np.abs(rgb.astype(int) - upright)[4:-4, 4:-4].max() <= 40  # chroma and luma blur at the edges alone
    if turned:
        plain = frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG).to_ndarray()
        assert corners(plain) != corners(upright)


@pytest.mark.parametrize("size", [(65, 49), (17, 33), (2, 2)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    content = make_video("matroska", "libx264", 1, size=size, pixels="yuv444p", options=LOSSLESS)
    assert to_rgb(first_frame(content)).shape == (size[1], size[0], 3)
