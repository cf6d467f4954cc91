"""Networks under torch: numbers in, numbers out, and a device that is there."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from common.domain import MaskwatchError
from workers.inference import Engine, Runtime
from workers.inference.torch_session import TorchSession, torch_device

CPU = Runtime(Engine.NATIVE)


class Twice(nn.Module):
    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return batch * 2, batch.double().sum(dim=1)


def test_outputs_come_in_their_order_as_float32() -> None:
    session = TorchSession(Twice(), CPU, ("n", 3))
    assert (session.input_shape, session.device) == (("n", 3), "cpu")
    doubled, sums = session.run(np.array([[1, 2, 3]], np.float32))
    assert doubled.tolist() == [[2, 4, 6]]
    assert sums.tolist() == [6]
    assert doubled.dtype == sums.dtype == np.float32


def test_one_output_and_a_batch_that_is_a_view() -> None:
    """Torch takes no negative strides."""
    (out,) = TorchSession(nn.ReLU(), CPU, ("n", 3)).run(np.array([[1, 2, -3]], np.float32)[:, ::-1])
    assert out.tolist() == [[0, 2, 1]]


def test_nothing_is_kept_for_training() -> None:
    session = TorchSession(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).train(), CPU, ("n", 3))
    batch = np.ones((4, 3), np.float32)
    assert np.array_equal(session.run(batch)[0], session.run(batch)[0])


def test_threads_are_those_of_the_runtime() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            TorchSession(nn.ReLU(), Runtime(Engine.NATIVE, threads=threads), ("n",))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(MaskwatchError, match=r"device cuda:1 needs .*(CPU only|nvidia-smi)"):
        TorchSession(nn.ReLU(), Runtime(Engine.NATIVE, "cuda:1"), ("n",))


def test_torch_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MaskwatchError, match=r"pip install 'maskwatch\[native\]'"):
        torch_device(CPU)
