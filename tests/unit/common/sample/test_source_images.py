"""The images that the sample footage is drawn from: exactly these pixels, and part of what is installed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from common.sample import people
from common.sample.source_images import FOLDER, astronaut, texture
from tests import ROOT

#: Of the decoded pixels: the demo's figures are equal to the last digit only with exactly these.
PIXELS = {
    astronaut: "a8c429c18afa7b0fd5673e598d73a21225d94c864a71bbb3885126fdecb41071",
    partial(texture, "brick"): "664a145c5253f0d66db1a12776785f0ea35a44cc7447ffc933f6d6118dc58643",
    partial(texture, "gravel"): "3d51ad45f789cd8b98534b7af6bce774e499ead45421135afd757358c7230009",
}
PACKAGE_DATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]


def digest(pixels: NDArray[np.uint8]) -> str:
    return sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


@pytest.mark.parametrize(("read", "expected"), PIXELS.items())
def test_the_decoded_pixels_are_these(read: Callable[[], NDArray[np.uint8]], expected: str) -> None:
    pixels = read()
    assert pixels.dtype == np.uint8 and pixels.shape[:2] == (512, 512)
    assert digest(pixels) == expected
    # One step of one pixel is seen. The array is the caller's own: the next one is as before.
    pixels[300, 200] += 1
    assert digest(pixels) != expected
    assert digest(read()) == expected


def test_the_photograph_is_in_colour_and_holds_the_whole_figure() -> None:
    assert astronaut().shape == (512, 512, 3)
    assert texture("brick").ndim == texture("gravel").ndim == 2
    assert max(people.HEAD_BOX) < 512 > people.PHOTO_BOTTOM


def left_out(names: set[str]) -> set[str]:
    """The files that are in the folder, but in no wheel."""
    return {name for name in names if not any(Path(name).match(pattern) for pattern in ["*.py", *PACKAGE_DATA])}


def test_a_wheel_contains_the_images_and_their_licences() -> None:
    names = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert {"astronaut.png", "brick.png", "gravel.png", "SOURCES.md"} <= names
    assert left_out(names) == set()
    assert left_out({*names, "photograph.tiff"}) == {"photograph.tiff"}


def test_the_source_and_licence_of_each_image_are_written_beside_it() -> None:
    sources = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in sources.splitlines() if line.startswith("| `")}
    assert set(rows) == {path.name for path in FOLDER.glob("*.png")}
    assert all("https://" in row and ("public domain" in row or "CC0 |" in row) for row in rows.values())
