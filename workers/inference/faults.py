"""Turns the errors of all runtimes for exhausted memory and for a broken device into two exceptions of our own.

After a lack of memory a smaller call may succeed. After most errors of CUDA no call does: the process's context
with the device is gone ("sticky" errors, CUDA Runtime API, section "Error Handling"), and only a new process gets
another. Errors are recognised by their words, so that no runtime has to be loaded for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from common.domain import MaskwatchError, first_line

T = TypeVar("T")

#: torch's and TensorFlow's own types; both also speak of memory in other errors, as ONNX Runtime and OpenCV do.
_MEMORY_TYPES = {"OutOfMemoryError", "ResourceExhaustedError"}
_MEMORY_WORDS = re.compile(
    r"out of memory|failed to allocate|can't allocate memory|insufficient memory|BFCArena|bad[_ ]alloc|_ALLOC_FAILED",
    re.IGNORECASE,
)
_BROKEN_WORDS = re.compile(
    # torch; ONNX Runtime; TensorFlow and the driver; what each says in longer words.
    r"CUDA (driver )?error|CUDA failure|CUDA_ERROR_|cudaError|device-side assert|illegal memory access"
    r"|(CUDNN|CUBLAS)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|NOT_INITIALIZED)",
    re.IGNORECASE,
)


class OutOfModelMemoryError(MaskwatchError):
    """The models need more memory for one call than is free."""


class BrokenDeviceError(Exception):
    """This process can no longer use the device; a new process may."""


class _Process:
    """State of this process, until it ends."""

    device_broken = False


def device_is_broken() -> bool:
    """Whether a call in this process has raised `BrokenDeviceError`: all later calls would fail, too."""
    return _Process.device_broken


def told(run: Callable[[], T]) -> T:
    """Call `run`, and translate its errors about memory or the device.

    Raises `OutOfModelMemoryError` and `BrokenDeviceError`, else the error of `run`.
    """
    try:
        return run()
    except Exception as error:
        fault = _fault(error)
        if fault is None:
            raise
    # Raised outside of the handler, because the original error keeps the tensors of the failed pass in memory.
    if isinstance(fault, BrokenDeviceError):
        _Process.device_broken = True
    raise fault


def in_parts(run: Callable[[slice], T], count: int, at_most: int) -> Iterator[T]:
    """The results of `run` for consecutive slices of `count` items, `at_most` in each. When the memory runs out, slices
    are half as long from there on.

    Raises as `told`, out of memory only for a single item.
    """
    start, size = 0, at_most
    while start < count:
        size = min(size, count - start)
        try:
            part = told(lambda: run(slice(start, start + size)))  # noqa: B023 - called at once
        except OutOfModelMemoryError:
            if size == 1:
                raise
            size //= 2
            continue
        yield part
        start += size


def _fault(error: Exception) -> OutOfModelMemoryError | BrokenDeviceError | None:
    if isinstance(error, MaskwatchError | BrokenDeviceError):
        return None
    text = str(error)
    words = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, MemoryError) or type(error).__name__ in _MEMORY_TYPES or _MEMORY_WORDS.search(text):
        return OutOfModelMemoryError(words)
    return BrokenDeviceError(words) if _BROKEN_WORDS.search(text) else None
