"""Decoding: every format and orientation gives the same upright picture; what can't be read gives a reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin

from common.domain import PermanentJobError, Reason
from tests import ROOT
from workers.media.images import decode_image

MEGAPIXEL = 1_000_000


def quadrants(width: int = 60, height: int = 40) -> Image.Image:
    """Red, green, blue and white quarters: any turn or flip shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif_with(**tags: Any) -> bytes:
    exif = Image.Exif()
    if "orientation" in tags:
        exif[0x0112] = tags["orientation"]
    camera = exif.get_ifd(0x8769)
    for name, number in (("time", 0x9003), ("offset", 0x9011), ("fraction", 0x9291)):
        if name in tags:
            camera[number] = tags[name]
    return exif.tobytes()


def failure(data: bytes, max_pixels: int = MEGAPIXEL) -> PermanentJobError:
    with pytest.raises(PermanentJobError) as caught:
        decode_image(data, max_pixels=max_pixels)
    return caught.value


ENCODED = {
    "jpeg": encode(quadrants(), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": encode(quadrants(), "JPEG", quality=95, subsampling=0, progressive=True),
    "png": encode(quadrants(), "PNG"),
    "webp": encode(quadrants(), "WEBP", quality=95),
    "lossless webp": encode(quadrants(), "WEBP", lossless=True),
    "bmp": encode(quadrants(), "BMP"),
    "tiff": encode(quadrants(), "TIFF"),
    "tiff lzw": encode(quadrants(), "TIFF", compression="tiff_lzw"),
    "mpo": encode(quadrants(), "MPO", save_all=True, append_images=[Image.new("RGB", (60, 40))], quality=95),
}


def assert_shows_quadrants(rgb: np.ndarray[Any, np.dtype[np.uint8]], tolerance: int = 12) -> None:
    assert rgb.dtype == np.uint8
    assert rgb.shape == (40, 60, 3)
    expected = np.asarray(quadrants())
    # Away from the edges between the quarters, where lossy formats blur.
    for y in (5, 34):
        for x in (5, 54):
            assert np.abs(rgb[y, x].astype(int) - expected[y, x].astype(int)).max() <= tolerance


@pytest.mark.parametrize("name", ENCODED)
def test_every_format_gives_the_same_image(name: str) -> None:
    assert_shows_quadrants(decode_image(ENCODED[name], max_pixels=MEGAPIXEL).rgb)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(file_format: str, orientation: int) -> None:
    # What a camera held that way stores: the inverse of what the orientation asks for (EXIF 2.32, tag 274).
    flip, turn = Image.Transpose, quadrants()
    stored = {
        1: turn,
        2: turn.transpose(flip.FLIP_LEFT_RIGHT),
        3: turn.transpose(flip.ROTATE_180),
        4: turn.transpose(flip.FLIP_TOP_BOTTOM),
        5: turn.transpose(flip.TRANSPOSE),
        6: turn.transpose(flip.ROTATE_90),
        7: turn.transpose(flip.TRANSVERSE),
        8: turn.transpose(flip.ROTATE_270),
    }[orientation]
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    data = encode(stored, file_format, exif=exif_with(orientation=orientation), **options)
    assert_shows_quadrants(decode_image(data, max_pixels=MEGAPIXEL).rgb)


@pytest.mark.parametrize(
    ("image", "file_format", "expected"),
    [
        (Image.new("L", (4, 4), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)), "PNG", (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)), "TIFF", (128, 128, 128)),
        (Image.new("P", (4, 4), 1), "PNG", None),
        (Image.new("LA", (4, 4), (10, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "WEBP", (255, 127, 127)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF", (0, 0, 0)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (Image.new("YCbCr", (4, 4), (128, 128, 128)), "JPEG", (128, 128, 128)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_kind_of_pixel_becomes_rgb(
    image: Image.Image, file_format: str, expected: tuple[int, int, int] | None
) -> None:
    if expected is None:
        image.putpalette([0, 0, 0, 9, 99, 199])
        expected = (9, 99, 199)
    rgb = decode_image(encode(image, file_format), max_pixels=MEGAPIXEL).rgb
    assert rgb.shape == (4, 4, 3)
    assert np.abs(rgb[0, 0].astype(int) - expected).max() <= 2


def test_transparent_palette_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0])
    rgb = decode_image(encode(image, "PNG", transparency=0), max_pixels=MEGAPIXEL).rgb
    assert (rgb == 255).all()


def test_of_several_frames_the_first_is_taken() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for file_format in ("TIFF", "WEBP", "PNG"):
        data = encode(red, file_format, save_all=True, append_images=[blue])
        with Image.open(io.BytesIO(data)) as check:
            assert getattr(check, "n_frames", 1) == 2
        r, _, b = decode_image(data, max_pixels=MEGAPIXEL).rgb[4, 4]
        assert r > 200 > 60 > b


def test_pixels_without_a_known_range_are_refused_in_words() -> None:
    for array in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        error = failure(encode(Image.fromarray(array), "TIFF"))
        assert error.reason is Reason.UNREADABLE_IMAGE
        assert "8 or 16 bits" in error.detail


def test_an_empty_file_says_so() -> None:
    error = failure(b"")
    assert error.reason is Reason.EMPTY_FILE
    assert error.detail == "the file is empty; upload it again"


@pytest.mark.parametrize(
    "data",
    [b"\0", b"hello", b"\0" * 1000, b"<html>404</html>", encode(quadrants(), "GIF"), encode(quadrants(), "PPM")],
    ids=["a zero", "text", "zeros", "html", "gif", "ppm"],
)
def test_what_is_no_image_is_unreadable(data: bytes) -> None:
    error = failure(data)
    assert error.reason is Reason.UNREADABLE_IMAGE
    assert error.detail == "the content is not a JPEG, PNG, WebP, BMP or TIFF picture; convert it to one of these"


@pytest.mark.parametrize("name", sorted(ENCODED.keys() - {"mpo"}))  # an MPO cut in its second picture is whole
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
def test_a_cut_off_image_says_so(name: str, share: float) -> None:
    data = ENCODED[name][: int(len(ENCODED[name]) * share)]
    error = failure(data)
    assert error.reason is Reason.TRUNCATED_IMAGE
    assert f"cut off after {len(data)} bytes" in error.detail


def test_a_damaged_image_is_not_called_cut_off() -> None:
    data = bytearray(ENCODED["png"])
    start = data.index(b"IDAT") + 6
    data[start : start + 20] = bytes(20)
    error = failure(bytes(data))
    assert error.reason is Reason.UNREADABLE_IMAGE
    assert "damaged" in error.detail


def test_the_limit_is_on_pixels() -> None:
    data = ENCODED["png"]
    assert decode_image(data, max_pixels=60 * 40).rgb.shape == (40, 60, 3)
    error = failure(data, max_pixels=60 * 40 - 1)
    assert error.reason is Reason.IMAGE_TOO_LARGE
    assert "60 × 40" in error.detail
    assert "2399" in error.detail


@pytest.mark.parametrize("name", ENCODED)
def test_a_large_image_is_refused_before_its_pixels_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the pixels were read")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    monkeypatch.setattr("PIL.Image.Image.load", never)
    assert failure(ENCODED[name], max_pixels=100).reason is Reason.IMAGE_TOO_LARGE


def test_a_decompression_bomb_is_too_large_and_not_a_warning() -> None:
    # 400 million pixels in half a megabyte: more than twice the limit Pillow has of its own.
    bomb = encode(Image.new("1", (20_000, 20_000)), "PNG")
    assert failure(bomb, max_pixels=100 * MEGAPIXEL).reason is Reason.IMAGE_TOO_LARGE


@given(st.sampled_from(sorted(ENCODED)), st.data())
def test_damage_anywhere_gives_an_image_or_a_reason(name: str, data: st.DataObject) -> None:
    """Nothing but `PermanentJobError` ever leaves, and no warning: those are errors in tests."""
    damaged = bytearray(ENCODED[name])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(1, len(damaged))) :]
    try:
        rgb = decode_image(bytes(damaged), max_pixels=MEGAPIXEL).rgb
    except PermanentJobError as error:
        assert error.detail
        assert "\n" not in error.detail
    else:
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3
        assert rgb.shape[2] == 3


@given(st.binary(max_size=400))
def test_arbitrary_exif_never_fails_an_image(noise: bytes) -> None:
    data = encode(quadrants(), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0" + noise)
    assert decode_image(data, max_pixels=MEGAPIXEL).rgb.shape[2] == 3


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_time_with_its_offset_is_aware(file_format: str) -> None:
    exif = exif_with(time="2026:05:01 12:34:56", offset="+05:30", fraction="25")
    when = decode_image(encode(quadrants(), file_format, exif=exif), max_pixels=MEGAPIXEL).exif_time
    assert when == datetime(2026, 5, 1, 12, 34, 56, 250_000, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert when is not None
    assert when.astimezone(UTC).hour == 7


def test_exif_time_of_a_tiff() -> None:
    # Pillow does not write the camera's tags into a TIFF: they are put behind the picture by hand.
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[0x8769] = 0xABCDEF
    data = encode(quadrants(), "TIFF", tiffinfo=directory)
    pointer = struct.pack("<HHII", 0x8769, 4, 1, 0xABCDEF)
    assert data.count(pointer) == 1
    text = b"2026:05:01 12:34:56\0"
    tags = struct.pack("<HHHII", 1, 0x9003, 2, len(text), len(data) + 18) + struct.pack("<I", 0) + text
    data = data.replace(pointer, struct.pack("<HHII", 0x8769, 4, 1, len(data))) + tags
    when = decode_image(data, max_pixels=MEGAPIXEL).exif_time
    assert when == datetime(2026, 5, 1, 12, 34, 56)


def test_exif_time_without_an_offset_is_local() -> None:
    exif = exif_with(time="2026:05:01 12:34:56")
    when = decode_image(encode(quadrants(), "JPEG", exif=exif), max_pixels=MEGAPIXEL).exif_time
    assert when == datetime(2026, 5, 1, 12, 34, 56)


@pytest.mark.parametrize("offset", ["   :  ", "Z", "+5", "+25:00", "-13:00", "+05:99", "٠٥:٠٠"])
def test_a_bad_offset_leaves_the_local_time(offset: str) -> None:
    exif = exif_with(time="2026:05:01 12:34:56", offset=offset)
    when = decode_image(encode(quadrants(), "JPEG", exif=exif), max_pixels=MEGAPIXEL).exif_time
    assert when is not None
    assert when.tzinfo is None


@pytest.mark.parametrize(
    "time",
    [
        "0000:00:00 00:00:00",
        "2026:13:01 00:00:00",
        "2026:02:30 00:00:00",
        "    :  :     :  :  ",
        "2026-05-01 12:34:56",
        "0001:01:01 00:00:00",
        "9999:12:31 23:59:59",
        "yesterday",
        "",
    ],
)
def test_a_senseless_time_is_no_time(time: str) -> None:
    decoded = decode_image(encode(quadrants(), "JPEG", exif=exif_with(time=time)), max_pixels=MEGAPIXEL)
    assert decoded.exif_time is None
    assert decoded.rgb.shape == (40, 60, 3)


def test_a_image_without_metadata_has_no_time() -> None:
    assert decode_image(ENCODED["jpeg"], max_pixels=MEGAPIXEL).exif_time is None


def test_what_stops_a_worker_is_not_mistaken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    class TimeIsUp(Exception):
        """Like Celery's soft time limit: raised anywhere, and a plain Exception."""

    def interrupted(*_: object) -> None:
        raise TimeIsUp

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", interrupted)
    with pytest.raises(TimeIsUp):
        decode_image(ENCODED["jpeg"], max_pixels=MEGAPIXEL)


def in_passes(count: int) -> bytes:
    """A progressive JPEG of so many passes over its pixels, most of them without any effect."""
    whole = encode(Image.new("L", (64, 48)), "JPEG", progressive=True)
    last, end = whole.rfind(b"\xff\xda"), whole.rfind(b"\xff\xd9")
    return whole[:end] + whole[last:end] * (count - whole.count(b"\xff\xda")) + whole[end:]


def test_a_jpeg_in_very_many_passes_is_refused() -> None:
    refused = failure(in_passes(101))
    assert refused.reason is Reason.IMAGE_TOO_LARGE and "100 passes" in refused.detail
    assert decode_image(in_passes(100), max_pixels=MEGAPIXEL).rgb.shape == (48, 64, 3)
    # What only looks like passes is none: a comment, and what phones put behind a picture.
    comment = encode(quadrants(), "JPEG", comment=b"\xff\xda" * 500)
    assert decode_image(comment + b"\xff\xda" * 500, max_pixels=MEGAPIXEL).rgb.shape == (40, 60, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("mode", "file_format"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("P", "PNG")])
def test_a_image_takes_a_bounded_memory_per_pixel(mode: str, file_format: str, tmp_path: Path) -> None:
    """16 bytes per pixel, which the limit on pixels counts on; transparency done at once would take 23."""
    side = 4000
    options = {"lossless": True} if file_format == "WEBP" else {}
    (tmp_path / "bomb").write_bytes(encode(Image.new(mode, (side, side)), file_format, **options))
    code = (
        "import sys, pathlib; from workers.media.images import decode_image\n"
        "most = lambda: int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes(); before = most()\n"
        "decode_image(data, max_pixels=10**8); print(most() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb")], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    assert int(done.stdout) * 1024 < 17 * side * side


def test_rows_are_done_in_parts_that_fit_together() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (700, 30, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    at_once = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    found = decode_image(encode(image, "PNG"), max_pixels=MEGAPIXEL).rgb
    assert np.array_equal(found, np.asarray(at_once))
