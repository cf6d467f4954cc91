"""What this machine has for running models: runtimes, cores and NVIDIA GPUs. Standard library only, so that `maskwatch
doctor` can show it without any runtime; `workers.jobs.preflight` checks whether they really work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
from functools import lru_cache
from pathlib import Path

from common.domain import MaskwatchError

#: The file with a container's limit of processor time: "MAX PERIOD" in microseconds, or "max PERIOD"
#: (docs.kernel.org/admin-guide/cgroup-v2.html, "CPU Interface Files").
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


#: Runtime → the layer that installs it, and the packages that it needs.
RUNTIMES = {"onnx": ("worker", ("onnxruntime",)), "native": ("native", ("torch", "tensorflow"))}


def missing_for(runtime: str) -> str | None:
    """A sentence that says which packages a runtime lacks, and how to install them; None if none are missing."""
    layer, packages = RUNTIMES[runtime]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if not missing:
        return None
    return f"the {runtime} runtime needs {' and '.join(missing)}: pip install 'maskwatch[{layer}]'"


def usable_cores() -> int:
    """The cores this process may use: the machine's, or fewer if an affinity or a container's quota limits them."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return min(cores, max(1, math.floor(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups of version 2, or no quota ("max")
        return cores


def threads_per_process(processes: int) -> int:
    """Threads for the models of one worker process, so that `processes` of them don't exceed the cores.

    Oversubscribed threads make a forward pass several times slower, so this rounds down.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; valid: at least 1")
    return max(1, usable_cores() // processes)


def oversubscribed(processes: int, threads: int | None) -> str | None:
    """A warning if these processes with their threads exceed the cores; else None.

    threads: of each process; None: `threads_per_process`.
    """
    cores, threads = usable_cores(), threads or threads_per_process(processes)
    if processes * threads <= cores:
        return None
    return (
        f"{processes} process(es) × {threads} thread(s) exceed the {cores} core(s) here, which makes a forward pass "
        "several times slower: lower MASKWATCH_WORKER__PROCESSES or MASKWATCH_WORKER__THREADS"
    )


@lru_cache(maxsize=1)
def gpu_names() -> tuple[str, ...]:
    """The names of the NVIDIA GPUs that this process can see, in CUDA's order (CUDA_VISIBLE_DEVICES counts).

    Asks the driver (libcuda, which every CUDA runtime uses) and makes no context, so it takes no memory of the GPU.
    Functions: docs.nvidia.com/cuda/cuda-driver-api.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    names = []
    for number in range(count.value):
        device = ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        if driver.cuDeviceGet(ctypes.byref(device), number) != 0 or driver.cuDeviceGetName(name, 256, device) != 0:
            return ()
        names.append(name.value.decode(errors="replace"))
    return tuple(names)


def require_device(device: str) -> None:
    """Raises `MaskwatchError` for a GPU that isn't there. device: `cpu`, `cuda` or `cuda:n`."""
    if device == "cpu":
        return
    number = int(device.partition(":")[2] or "0")
    found = gpu_names()
    if not found:
        raise MaskwatchError(
            f"device {device} needs an NVIDIA GPU and its driver, and none is visible: check nvidia-smi, "
            "CUDA_VISIBLE_DEVICES, and --gpus all of a container; or choose --device cpu"
        )
    if number >= len(found):
        seen = ", ".join(f"cuda:{n} {name}" for n, name in enumerate(found))
        raise MaskwatchError(f"device {device} does not exist; choose one of: {seen}")
