"""Small pictures for the tests: faces from the sample footage's photograph, and files that are none."""

from __future__ import annotations

import io
from functools import lru_cache

from PIL import Image, ImageDraw

from common.sample.source_images import astronaut


@lru_cache
def portrait(width: int = 256) -> Image.Image:
    """The sample footage's photograph with one face, at another size."""
    return Image.fromarray(astronaut()).resize((width, width), Image.Resampling.LANCZOS)


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@lru_cache
def face_jpeg(number: int = 0) -> bytes:
    """A JPEG with one face; different bytes for different numbers."""
    image = portrait().copy()
    ImageDraw.Draw(image).rectangle((0, 0, 8, 8), fill=(number % 256, number // 256 % 256, 99))
    return jpeg(image)


@lru_cache
def empty_jpeg() -> bytes:
    """A JPEG of nobody."""
    return jpeg(Image.new("RGB", (160, 120), (90, 110, 130)))
