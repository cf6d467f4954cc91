"""Networks under torch itself, on the CPU or a GPU.

Making the module and preparing it for inference is left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from workers.inference import Runtime


class TorchSession:
    """A module on its device, ready to be run. `run` may be called from several threads at once."""

    def __init__(self, module: Any, runtime: Runtime, input_shape: Sequence[int | str | None]) -> None:
        """module: takes one float32 batch of `input_shape`, gives a tensor or a tuple of tensors.

        Raises `MaskwatchError` if the device isn't there.
        """
        import torch

        self._device = torch_device(runtime)
        self._input_shape = tuple(input_shape)
        # For the whole process: torch has no other setting.
        torch.set_num_threads(runtime.threads)
        self.module = module.to(self._device).eval()

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """The shape of the only input; an axis of any length is a name or None."""
        return self._input_shape

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the network really runs."""
        return str(self._device.type)

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One forward pass: the network's outputs in their order."""
        import torch

        with torch.inference_mode():
            outputs = self.module(torch.from_numpy(np.ascontiguousarray(batch)).to(self._device))
            if isinstance(outputs, torch.Tensor):
                outputs = (outputs,)
            return [output.float().cpu().numpy() for output in outputs]


def torch_device(runtime: Runtime) -> Any:
    """The `torch.device` of a runtime. Raises `MaskwatchError` if torch or the device isn't there."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MaskwatchError("the native engine needs torch: pip install 'maskwatch[native]'") from error
    if runtime.device == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise MaskwatchError(
            f"device {runtime.device} needs a torch made for CUDA, this one is for the CPU only; "
            "install one as https://pytorch.org/get-started tells for your CUDA version"
        )
    if not torch.cuda.is_available():
        raise MaskwatchError(f"device {runtime.device} needs an NVIDIA GPU, torch finds none; check `nvidia-smi`")
    count = torch.cuda.device_count()
    if runtime.device_number >= count:
        raise MaskwatchError(f"device {runtime.device} isn't there: this machine has {count} GPU(s), from cuda:0")
    return torch.device("cuda", runtime.device_number)
