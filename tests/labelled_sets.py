"""Small data sets on disk, made of noise: only the paths of the pictures matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteFaces = Callable[[Path, dict[str, int]], Path]
WriteScene = Callable[..., Path]


def noise(seed: int, width: int = 40, height: int = 48) -> Image.Image:
    """A picture unlike every other one, even after scaling down."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def write_faces() -> WriteFaces:
    def write(folder: Path, counts: dict[str, int]) -> Path:
        for kind, (label, count) in enumerate(counts.items()):
            (folder / label).mkdir(parents=True)
            for number in range(count):
                noise(1000 * kind + number).save(folder / label / f"face{number:03}.png")
        return folder

    return write


@pytest.fixture
def write_scene() -> WriteScene:
    def write(
        folder: Path,
        name: str,
        faces: Sequence[tuple[str, tuple[int, int, int, int]]],
        size: tuple[int, int] = (200, 120),
    ) -> Path:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "annotations").mkdir(exist_ok=True)
        noise(sum(name.encode()), *size).save(folder / "images" / f"{name}.png")
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            "</bndbox></object>"
            for label, (x1, y1, x2, y2) in faces
        )
        (folder / "annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        return folder

    return write
