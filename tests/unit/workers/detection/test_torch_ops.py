"""Boxes on the device: the same numbers as over numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.detection import _anchors, _ops, torch_ops

seeds = st.integers(0, 2**32 - 1)


def crowd(seed: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes that overlap a lot, best first, with scores that tie."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 20, (count, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 15, (count, 2))], axis=1).astype(np.float32)
    return boxes, -np.sort(-rng.integers(1, 9, count).astype(np.float32) / 10)


@given(seeds, st.integers(1, 80), st.sampled_from([0.1, 0.4, 0.7]))
def test_suppression_keeps_what_numpy_keeps(seed: int, count: int, max_iou: float) -> None:
    """A batch of two pictures, the second with fewer candidates."""
    images = [crowd(seed, count), crowd(seed + 1, count)]
    taking_part = torch.ones(2, count, dtype=torch.bool)
    taking_part[1, count // 2 :] = False
    boxes = torch.from_numpy(np.stack([boxes for boxes, _ in images]))
    kept = torch_ops.nms(boxes, taking_part, max_iou)
    for index, candidates in enumerate((count, count // 2)):
        expected = _ops.nms(*(part[:candidates] for part in images[index]), max_iou)
        assert torch.nonzero(kept[index])[:, 0].tolist() == sorted(expected.tolist())


def test_a_chain_of_boxes_needs_many_rounds_and_gets_them() -> None:
    """Each overlaps only its neighbours: every second one stays. The last is known only after all the others."""
    left = torch.arange(50, dtype=torch.float32) * 4
    chain = torch.stack([left, torch.zeros(50), left + 10, torch.full((50,), 10.0)], dim=-1)[None]
    kept = torch_ops.nms(chain, torch.ones(1, 50, dtype=torch.bool), 0.4)
    assert kept[0].tolist() == [index % 2 == 0 for index in range(50)]


def test_nothing_to_suppress() -> None:
    assert torch_ops.nms(torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.bool), 0.4).shape == (3, 0)


@given(seeds, st.integers(1, 60), st.integers(1, 90))
def test_the_best_are_those_of_a_stable_sort(seed: int, count: int, limit: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 10, (2, count)).astype(np.float32) / 10
    found, where = torch_ops.best(torch.from_numpy(scores), 0.45, limit)
    assert found.shape[1] == min(limit, int((scores >= 0.45).sum(axis=1).max()))
    for index in range(2):
        expected = np.argsort(-scores[index], kind="stable")[: found.shape[1]]
        assert where[index].tolist() == expected.tolist()
        assert found[index].tolist() == scores[index][expected].tolist()


@given(seeds, st.integers(1, 70), st.integers(1, 70))
def test_decoding_and_priors_are_those_of_numpy(seed: int, height: int, width: int) -> None:
    prior = _anchors.priors(height, width)
    locations = np.random.default_rng(seed).normal(0, 5, (len(prior), 4)).astype(np.float32)
    on_device = torch_ops.priors(height, width, torch.device("cpu"))
    assert np.array_equal(on_device.numpy(), prior)
    boxes = torch_ops.decode(torch.from_numpy(locations)[None], on_device)[0].numpy()
    assert boxes == pytest.approx(_anchors.decode(locations, prior), rel=1e-5, abs=1e-3)


@given(seeds, st.integers(1, 30), st.integers(1, 30))
def test_clipping_is_that_of_numpy(seed: int, width: int, height: int) -> None:
    boxes = np.random.default_rng(seed).normal(10, 20, (2, 6, 4)).astype(np.float32)
    clipped = torch_ops.clip(torch.from_numpy(boxes), width, height).numpy()
    assert np.array_equal(clipped.reshape(-1, 4), _ops.clip(boxes.reshape(-1, 4), width, height))
