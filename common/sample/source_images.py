"""The three images that the sample footage is drawn from: a photograph and two textures.

The files lie beside this module; SOURCES.md says where they come from and what their licences are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).parent


def astronaut() -> NDArray[np.uint8]:
    """The photograph of Eileen Collins with one face, hairline to chin and ear to ear in `people.FACE_BOX`.

    RGB, uint8 (512, 512, 3); a new array for each call.
    """
    return _pixels("astronaut")


def texture(name: Literal["brick", "gravel"]) -> NDArray[np.uint8]:
    """A section of a brick wall or of a gravel path: grey, uint8 (512, 512); a new array for each call."""
    return _pixels(name)


def _pixels(name: str) -> NDArray[np.uint8]:
    with Image.open(FOLDER / f"{name}.png", formats=["PNG"]) as image:
        return np.array(image, np.uint8)
