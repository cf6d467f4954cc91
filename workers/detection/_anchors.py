"""The prior boxes of RetinaFace, and decoding the network's outputs for them into boxes. Pure functions over numpy.

Sizes, steps and variances are those the published weights were trained with (github.com/biubug6/Pytorch_Retinaface,
`cfg_mnet` and `cfg_re50`); the encoding is that of SSD (Liu et al., arXiv 1512.02325, section 2.2).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

#: Pixels of the input from one cell of a map to the next, and the sides of the boxes each cell proposes.
STEPS_PX = (8, 16, 32)
SIDES_PX = ((16, 32), (64, 128), (256, 512))
#: Factors of the network's outputs for a box's centre and for the logarithm of its size.
CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
#: e to this is 22,000: more than the size of any face, and without overflow.
MAX_LOG_SIZE = 10.0


@lru_cache(maxsize=64)
def priors(height: int, width: int) -> NDArray[np.float32]:
    """The prior boxes of an input: float32 (p, 3), each centre x, centre y and side, in pixels. Not to be written to.

    In the order of the network's rows: by map (the finest first), row, column, side. A map covers the input's last
    incomplete cell, too: it has ceil(side / step) cells along each side.
    """
    maps = []
    for step, sides in zip(STEPS_PX, SIDES_PX, strict=True):
        rows, columns = -(-height // step), -(-width // step)
        y, x, side = np.meshgrid(
            (np.arange(rows, dtype=np.float32) + 0.5) * step,
            (np.arange(columns, dtype=np.float32) + 0.5) * step,
            np.array(sides, np.float32),
            indexing="ij",
        )
        maps.append(np.stack([x, y, side], axis=-1).reshape(-1, 3))
    boxes: NDArray[np.float32] = np.concatenate(maps).astype(np.float32, copy=False)
    boxes.flags.writeable = False
    return boxes


def decode(locations: NDArray[np.float32], priors_px: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes (n, 4) xyxy in pixels of the input, from the network's locations (n, 4) for these priors (n, 3).

    A location is the centre's shift in parts of the prior's side, and the logarithm of the sides' growth, both
    divided by their variance. Not clipped.
    """
    sides = priors_px[:, 2:]
    centres = priors_px[:, :2] + locations[:, :2] * np.float32(CENTRE_VARIANCE) * sides
    halves = sides * np.exp(np.minimum(locations[:, 2:] * np.float32(SIZE_VARIANCE), np.float32(MAX_LOG_SIZE))) / 2
    return np.concatenate([centres - halves, centres + halves], axis=1).astype(np.float32, copy=False)
