"""Runs networks with an engine, on a device, with a number of threads. The only package that knows ONNX Runtime, CUDA
and how to limit a framework's threads.

The meaning of a network's inputs and outputs is left to the detectors and classifiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.domain import MaskwatchError
from common.machine import require_device, threads_per_process
from common.settings import Settings


class Engine(StrEnum):
    """The software that runs a network: ONNX Runtime, or the framework it was made with (torch, TensorFlow)."""

    ONNX = "onnx"
    NATIVE = "native"


@dataclass(frozen=True, slots=True)
class Runtime:
    """How networks run in this process. device: `cpu`, `cuda` or `cuda:n`; threads: of each network."""

    engine: Engine = Engine.ONNX
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; valid: at least 1")
        kind, _, number = self.device.partition(":")
        if not (self.device == "cpu" or (kind == "cuda" and (number.isdecimal() or self.device == "cuda"))):
            raise MaskwatchError(f"unknown device {self.device!r}; valid: cpu, cuda, cuda:0, cuda:1, ...")

    @property
    def device_number(self) -> int:
        """The number of the GPU; 0 if none is named."""
        return int(self.device.partition(":")[2] or "0")


class Session(Protocol):
    """A network that is loaded and ready. `run` may be called from several threads at once."""

    @property
    def input_shape(self) -> tuple[int | str | None, ...]:
        """The shape of the only input; an axis of any length is a name or None."""
        ...

    @property
    def device(self) -> str:
        """`cpu` or `cuda`: where the network actually runs."""
        ...

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """One forward pass: the network's outputs in their order."""
        ...


def runtime_of(settings: Settings, processes: int | None = None) -> Runtime:
    """The runtime of the settings, for one of `processes` processes (None: a worker's number).

    Raises `MaskwatchError` for a missing GPU: all commands that run models call this.
    """
    worker = settings.worker
    require_device(worker.device)
    threads = worker.threads or threads_per_process(processes or worker.processes)
    return Runtime(Engine(worker.runtime), worker.device, threads)


def limit_opencv_threads(threads: int) -> None:
    """Limits OpenCV, which resizes crops, to the same number of threads as the models. For the whole process."""
    import cv2

    cv2.setNumThreads(threads)
