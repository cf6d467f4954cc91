"""Decodes the untrusted bytes of an image file to pixels.

The content decides what a file is, never its name. Only the formats listed here are tried; the size in the
header is checked before anything is decoded.
"""

from __future__ import annotations

import io
import re
import struct
import threading
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from common.domain import PermanentJobError, Reason, first_line
from workers.media.sniffing import MAX_JPEG_SCANS, has_too_many_scans

#: The formats that Pillow may open. JPEG includes MPO: a JPEG followed by further images, as some phones write.
#: Named by their plugins, which this imports; otherwise Pillow would import all of its formats to find one.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)

#: What Pillow raises for damaged files: nearly anything. Not included: MemoryError and the exception of a worker's time
#: limit, which don't mean that the image is damaged.
_DAMAGE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)

#: How many rows are converted to RGB at a time: putting transparency on white takes four copies of them.
_ROWS = 256

# Numbers of EXIF tags: EXIF 2.32, section 4.6.
_EXIF_IFD = 0x8769
_ORIENTATION = 0x0112
_DATETIME_ORIGINAL = 0x9003
_OFFSET_TIME_ORIGINAL = 0x9011
_SUBSEC_TIME_ORIGINAL = 0x9291

#: EXIF orientation → what turns the image upright (EXIF 2.32, section 4.6.4, tag 274).
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own limit is for the whole process. It is off, because every image is checked against `max_pixels`.
Image.MAX_IMAGE_PIXELS = None

#: Filters of warnings belong to the process, so only one thread at a time may change them.
_WARNINGS_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image, upright.

    rgb: uint8 (height, width, 3).
    exif_time: when it was taken, by the camera. Aware if the file names its offset from UTC; else naive, the local time
    of the place (which the caller knows); None if the file has no time.
    """

    rgb: NDArray[np.uint8]
    exif_time: datetime | None


def decode_image(data: bytes, *, max_pixels: int) -> DecodedImage:
    """Decodes the first frame of a JPEG, PNG, WebP, BMP or TIFF file.

    The EXIF orientation is applied, transparency is put on white, 16-bit grey becomes 8-bit. Invalid metadata are
    ignored.

    Raises `PermanentJobError` with empty_file, unreadable_image, truncated_image or image_too_large; its
    sentence doesn't name the file, the caller does.
    """
    if not data:
        raise PermanentJobError(Reason.EMPTY_FILE, "the file is empty; upload it again")
    # Pillow warns of damaged metadata, which are ignored.
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except _DAMAGE as error:
            raise _cannot_read(data, error) from error
        with image:
            _check_size(image, max_pixels)
            if image.format in ("JPEG", "MPO") and has_too_many_scans(data):
                raise PermanentJobError(
                    Reason.IMAGE_TOO_LARGE,
                    f"the picture takes more than {MAX_JPEG_SCANS} passes over all of its pixels; save it anew",
                )
            # A TIFF's metadata are gone once its pixels are read; a PNG's may come after its pixels.
            early = _time_taken(_exif(image)) if image.format == "TIFF" else None
            try:
                image.load()
                upright = _upright(image)
                rgb = _to_array(upright)
            except _DAMAGE as error:
                raise _cannot_read(data, error) from error
            exif_time = early or _time_taken(_exif(image))
    return DecodedImage(rgb, exif_time)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise PermanentJobError(
            Reason.IMAGE_TOO_LARGE,
            f"the picture has {width} × {height} pixels, the limit is {max_pixels} in all; "
            "scale it down or raise MASKWATCH_WORKER__MAX_IMAGE_PIXELS",
        )


def _cannot_read(data: bytes, error: Exception) -> PermanentJobError:
    if _is_cut_off(data, str(error)):
        return PermanentJobError(
            Reason.TRUNCATED_IMAGE, f"the picture is cut off after {len(data)} bytes; upload it again, whole"
        )
    if isinstance(error, UnidentifiedImageError):
        detail = "the content is not a JPEG, PNG, WebP, BMP or TIFF picture; convert it to one of these"
    else:
        detail = f"the picture is damaged and can't be decoded ({first_line(error)}); upload it again"
    return PermanentJobError(Reason.UNREADABLE_IMAGE, detail)


def _is_cut_off(data: bytes, message: str) -> bool:
    """Whether a file that can't be decoded ends earlier than its own header or markers say."""
    if data.startswith(b"\xff\xd8\xff"):
        # The end marker after the last scan; a thumbnail before it has one of its own.
        return data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[:2] == b"BM":
        return len(data) < 14 or int.from_bytes(data[2:6], "little") > len(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        # The header points to the directory, which is often at the end: a count and 12 bytes for each tag.
        order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
        start = int.from_bytes(data[4:8], order)
        end = start + 2 + 12 * int.from_bytes(data[start : start + 2], order)
        return end > len(data) or "truncated" in message
    return False


def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    """The image as RGB, uint8 (height, width, 3), converted a few rows at a time."""
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _ROWS):
        bottom = min(height, top + _ROWS)
        rgb[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, width, bottom))))
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. Raises `ValueError` for pixels of unknown range."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no known range, save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    if image.format == "TIFF":
        return image  # Pillow turns TIFF images while it loads them
    orientation = _exif(image).get(_ORIENTATION)
    transposition = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _exif(image: Image.Image) -> Image.Exif:
    """The EXIF tags of an image; none if they are damaged."""
    with suppress(*_DAMAGE):
        return image.getexif()
    return Image.Exif()


def _time_taken(exif: Image.Exif) -> datetime | None:
    """DateTimeOriginal with its fraction of a second and its offset, as far as they are there and valid."""
    with suppress(*_DAMAGE):
        tags = exif.get_ifd(_EXIF_IFD)
        return _parse_time(
            _text(tags.get(_DATETIME_ORIGINAL)),
            _text(tags.get(_SUBSEC_TIME_ORIGINAL)),
            _text(tags.get(_OFFSET_TIME_ORIGINAL)),
        )
    return None


def _parse_time(moment: str, fraction: str, offset: str) -> datetime | None:
    found = re.fullmatch(r"(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)", moment, re.ASCII)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in found.groups())
    if not 1 < year < 9999:
        return None  # at the limits of datetime, where a conversion to UTC would overflow
    micros = int(fraction[:6].ljust(6, "0")) if re.fullmatch(r"\d+", fraction, re.ASCII) else 0
    return datetime(year, month, day, hour, minute, second, micros, tzinfo=_parse_offset(offset))


def _parse_offset(offset: str) -> timezone | None:
    found = re.fullmatch(r"([+-])(\d\d):([0-5]\d)", offset, re.ASCII)
    if found is None:
        return None
    sign, hours, minutes = found.groups()
    # Real offsets lie between -12:00 and +14:00; others are invalid, and the location's zone is used instead.
    delta = timedelta(hours=int(hours), minutes=int(minutes)) * (-1 if sign == "-" else 1)
    return timezone(delta) if timedelta(hours=-12) <= delta <= timedelta(hours=14) else None


def _text(value: object) -> str:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip("\0 ")
