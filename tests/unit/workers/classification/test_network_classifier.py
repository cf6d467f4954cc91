"""The classifier: crops of any size and number in, probabilities in the same order out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef
from tests.pipelines import default_spec
from workers.classification.network_classifier import MAX_BATCH, NetworkMaskClassifier
from workers.classification.registry import load_classifier
from workers.inference import Runtime
from workers.inference.onnx_session import load_session

ShipBrightness = Callable[..., ModelRef]


def grey(level: int, height: int = 20, width: int = 30) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


class Recording:
    """Passes on to a session and keeps the sizes of the batches."""

    def __init__(self, session: object) -> None:
        self.session, self.batches = session, list[int]()

    @property
    def input_shape(self) -> object:
        return self.session.input_shape  # type: ignore[attr-defined]

    def run(self, batch: NDArray[np.float32]) -> object:
        self.batches.append(len(batch))
        return self.session.run(batch)  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [0, 1, MAX_BATCH, MAX_BATCH + 1, 2 * MAX_BATCH + 5])
def test_every_crop_gets_its_own_answer(ship_brightness: ShipBrightness, count: int) -> None:
    session = Recording(load_session(ship_brightness(), Runtime()))
    levels = np.random.default_rng(7).integers(0, 256, count)
    sizes = np.random.default_rng(8).integers(1, 200, (count, 2))
    crops = [grey(int(level), int(h), int(w)) for level, (h, w) in zip(levels, sizes, strict=True)]
    found = NetworkMaskClassifier(session).classify(crops)  # type: ignore[arg-type]
    assert found.shape == (count, 2)
    assert found.dtype == np.float32
    assert found[:, 0] == pytest.approx(1 / (1 + np.exp(-4 * (levels / 127.5 - 1))), abs=1e-5)
    assert found.sum(axis=1) == pytest.approx(1)
    assert sum(session.batches) == count
    assert max(session.batches, default=0) <= MAX_BATCH


def test_the_side_is_the_networks(ship_brightness: ShipBrightness) -> None:
    ref = ship_brightness(128)
    assert NetworkMaskClassifier(load_session(ref, Runtime())).side == 128


def test_a_network_of_another_shape_is_refused() -> None:
    class ChannelsFirst:
        input_shape = ("n", 3, 64, 64)

    with pytest.raises(MaskwatchError, match=r"valid: \(n, side, side, 3\)"):
        NetworkMaskClassifier(ChannelsFirst())  # type: ignore[arg-type]


def test_a_pipeline_names_its_classifier(ship_brightness: ShipBrightness) -> None:
    ship_brightness(16)
    spec = default_spec(classifier="bright")
    assert load_classifier(spec, Runtime()).classify([grey(0)]).shape == (1, 2)


def test_a_detector_is_no_classifier() -> None:
    with pytest.raises(MaskwatchError, match="unknown classifier 'centerface'"):
        default_spec(classifier="centerface")
