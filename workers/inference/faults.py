"""What runtimes raise when memory runs out or a device breaks, in words of ours.

After a lack of memory the next, smaller call may succeed. After most errors of CUDA none does: the process's context
with the device is gone ("sticky" errors, CUDA Runtime API, section "Error Handling"), and only a new process gets
another. Runtimes are told apart by the words they use, so that none has to be loaded for it.
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
    """The models need more memory than is free for what they were given at once."""


class BrokenDeviceError(Exception):
    """Nothing runs on the device any more in this process; in a new one it may."""


class _Process:
    """What is true of this process until it ends."""

    device_broken = False


def device_is_broken() -> bool:
    """Whether a call in this process has raised `BrokenDeviceError`: all that come later would fail, too."""
    return _Process.device_broken


def told(run: Callable[[], T]) -> T:
    """What `run` returns; what it raises, in our words where it concerns memory or the device.

    Raises `OutOfModelMemoryError` and `BrokenDeviceError`, else whatever `run` raises.
    """
    try:
        return run()
    except Exception as error:
        fault = _fault(error)
        if fault is None:
            raise
    # Outside of the handler, whose error keeps alive all that the failed pass had made.
    if isinstance(fault, BrokenDeviceError):
        _Process.device_broken = True
    raise fault


def in_parts(run: Callable[[slice], T], count: int, at_most: int) -> Iterator[T]:
    """What `run` returns for one slice of `count` items after the other, `at_most` in each. When the memory runs out,
    half as many from there on.

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
