"""What the detectors do on an NVIDIA GPU: frames per second in batches that stay on the device, against fdet's way.

The goal on one H200: RetinaFace-ResNet50 at 640×480 with at least 2,000 frames/s and 30 times fdet's loop, which takes
one frame per call and makes its prior boxes in Python each time. Frames start in pinned host memory and only boxes
come back. Like fdet, all detectors see a frame with at most 1000 pixels along its longer side here. RetinaFace has
seeded random weights and a threshold that `CANDIDATES` prior boxes of a frame reach.

    python -m benchmarks.gpu [--device cuda:0] [--seconds 3] [--json]

Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from benchmarks.models import CANDIDATES, FDET_NAMES, images, write_weights
from common.models.pipeline import spec_of

DETECTORS = ("retinaface-resnet50", "retinaface-mobilenet", "centerface")
SIZES = ((640, 480), (1920, 1080))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
#: fdet's own limit for the longer side.
LONGER_PX = 1000
GOAL_PER_S, GOAL_TIMES_FDET = 2000, 30
#: Side of the matrices whose product shows what the chip can do; large enough to be bound by arithmetic.
MATRIX = 8192


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:n.")
@click.option("--seconds", default=3.0, show_default=True, help="How long each figure is measured.")
@click.option("--json", "as_json", is_flag=True)
def main(device: str, seconds: float, as_json: bool) -> None:
    """Measure the detectors on a GPU."""
    from common.domain import MaskwatchError
    from workers.inference import Runtime
    from workers.inference.torch_session import torch_device

    try:
        if device == "cpu":
            raise MaskwatchError("this benchmark is about GPUs; for the CPU there is `python -m benchmarks.models`")
        found = torch_device(Runtime(device=device))
    except MaskwatchError as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        sys.exit(2)
    result = measure(found, DETECTORS, SIZES, BATCHES, seconds)
    print(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = [
        f"{result['device']}, torch {result['torch']}",
        f"a matrix product in half precision runs at {result['matrix_tflops']:.0f} TFLOP/s",
    ]
    for row in result["detectors"]:
        text += [
            f"{row['name']} at {row['width']}×{row['height']}",
            f"  {row['per_s']:.0f} frames/s in batches of {row['batch']}",
            f"  network {100 * row['network_share']:.1f} %, before it {100 * row['before_share']:.1f} %, "
            f"after it {100 * row['after_share']:.1f} %; {row['gflop']:.0f} GFLOP a frame, "
            f"{100 * row['share_of_matrix_rate']:.1f} % of the matrix rate",
        ]
        if row["fdet_per_s"] is not None:
            text.append(
                f"  fdet {row['fdet_per_s']:.1f} frames/s: {row['per_s'] / row['fdet_per_s']:.1f} times as fast"
            )
        if (row["name"], row["width"]) == (DETECTORS[0], SIZES[0][0]):
            text.append(f"  the goal on one H200: {GOAL_PER_S} frames/s and {GOAL_TIMES_FDET} times fdet")
    return text


def measure(
    device: Any, names: Sequence[str], sizes: Sequence[tuple[int, int]], batches: Sequence[int], seconds: float
) -> dict[str, Any]:
    """All figures on a `torch.device`."""
    import torch

    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    os.environ["MASKWATCH_MODELS_DIR"] = str(folder)
    matrix_flops = matrix_rate(device, seconds)
    try:
        rows = [figures(folder, name, size, device, batches, seconds, matrix_flops) for name in names for size in sizes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "matrix_tflops": matrix_flops / 1e12, "detectors": rows}


def figures(
    folder: Path,
    name: str,
    size: tuple[int, int],
    device: Any,
    batches: Sequence[int],
    seconds: float,
    matrix_flops: float,
) -> dict[str, Any]:
    """One detector at one size of frames, in the batch that is fastest."""
    width, height = size
    detector = load(folder, name, images(1, width, height), device)
    per_s = {}
    for batch in batches:
        rate = frames_per_second(detector, images(batch, width, height), device, seconds)
        if rate is None:  # does not fit the memory
            break
        per_s[batch] = rate
    best = max(per_s, key=per_s.__getitem__)
    gflop = flops(detector, images(1, width, height), device) / 1e9
    return {
        "name": name,
        "width": width,
        "height": height,
        "batch": best,
        "per_s": per_s[best],
        "per_s_by_batch": per_s,
        **shares(detector, images(best, width, height), device),
        "gflop": gflop,
        "share_of_matrix_rate": gflop * 1e9 * per_s[best] / matrix_flops,
        "fdet_per_s": fdet_per_second(folder, name, detector, images(1, width, height)[0], device, seconds),
    }


def load(folder: Path, name: str, frames: Any, device: Any) -> Any:
    """The detector on the device: in half precision, on a CPU in single."""
    import torch

    from common.settings import PipelineSettings, get_settings
    from workers.analysis.device.detectors import DeviceRetinaFace, folded, load_device_detector, ready
    from workers.detection.retinaface import BACKBONES
    from workers.detection.retinaface_network import load_weights

    precision = torch.float32 if device.type == "cpu" else torch.float16
    spec = replace(
        spec_of(PipelineSettings(), get_settings().models_dir), enlarge_below_px=0, shrink_above_px=LONGER_PX
    )
    if name == "centerface":
        return load_device_detector(spec, device, precision)
    path = weights_of(folder, BACKBONES[name])
    network = folded(load_weights(path.read_bytes(), BACKBONES[name]))
    # Scores of random weights crowd around a half: the threshold is where so many of this frame's reach it.
    detector = DeviceRetinaFace(spec, ready(network, device, precision))
    seen: list[Any] = []
    hook = detector.network.register_forward_hook(lambda _, __, outputs: seen.append(outputs[1]))
    with torch.inference_mode():
        detector.detect(torch.from_numpy(frames).to(device))
    hook.remove()
    scores = seen[0][0].float().sort(descending=True).values
    threshold = float(scores[min(CANDIDATES, len(scores)) - 1])
    return DeviceRetinaFace(replace(spec, detector_threshold=threshold), detector.network)


def weights_of(folder: Path, backbone: str) -> Path:
    """The file of seeded random weights, where fdet's model of the manifest looks for it."""
    from common.models.manifest import MODELS

    path = folder / MODELS[FDET_NAMES[backbone]].files[0].name
    if not path.exists():
        write_weights(backbone, path)
    return path


def frames_per_second(detector: Any, frames: Any, device: Any, seconds: float) -> float | None:
    """From pinned host memory to boxes in host memory; None if the batch doesn't fit the device's."""
    import torch

    staged = torch.from_numpy(frames)
    if device.type == "cuda":
        staged = staged.pin_memory()

    def detect() -> None:
        boxes, scores, kept = detector.detect(staged.to(device, non_blocking=True))
        torch.cat([boxes[kept], scores[kept][:, None]], dim=1).cpu()

    try:
        return len(frames) * calls_per_second(detect, device, seconds)
    except torch.OutOfMemoryError:
        return None


def calls_per_second(call: Callable[[], object], device: Any, seconds: float) -> float:
    """After a few calls to warm up; the device has finished them all."""
    import torch

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.inference_mode():
        for _ in range(3):
            call()
        started, count = finished(), 0
        while time.perf_counter() - started < seconds:
            call()
            count += 1
        return count / (finished() - started)


def shares(detector: Any, frames: Any, device: Any) -> dict[str, float]:
    """How the time of a batch divides: before the network (conversion, resizing), the network, and after it."""
    import torch

    moments: list[float] = []

    def now(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.perf_counter())

    on_device = torch.from_numpy(frames).to(device)
    hooks = [detector.network.register_forward_pre_hook(now), detector.network.register_forward_hook(now)]
    best = [float("inf")] * 3
    with torch.inference_mode():
        for _ in range(10):
            moments.clear()
            now()
            detector.detect(on_device)
            now()
            parts = [after - before for before, after in pairwise(moments)]
            best = [min(pair) for pair in zip(best, parts, strict=True)]
    for hook in hooks:
        hook.remove()
    return dict(zip(("before_share", "network_share", "after_share"), (part / sum(best) for part in best), strict=True))


def flops(detector: Any, frames: Any, device: Any) -> float:
    """Floating point operations of the network for one frame; a multiplication with its addition counts as two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        detector.detect(torch.from_numpy(frames).to(device))
    return float(counter.get_total_flops())


def matrix_rate(device: Any, seconds: float) -> float:
    """Operations per second of a large matrix product in half precision (on a CPU a small one, in single)."""
    import torch

    side, precision = (MATRIX, torch.float16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(side, side, device=device, dtype=precision)
    return 2 * side**3 * calls_per_second(lambda: matrix @ matrix, device, seconds)


def fdet_per_second(folder: Path, name: str, detector: Any, frame: Any, device: Any, seconds: float) -> float | None:
    """fdet's own loop with the same weights on the same device, one frame per call; None: fdet has no such detector."""
    from common.domain import ModelRef
    from common.models.manifest import MODELS
    from workers.detection.fdet_package import load_fdet_retinaface
    from workers.detection.retinaface import BACKBONES
    from workers.inference import Runtime

    if name not in BACKBONES:
        return None
    path = weights_of(folder, BACKBONES[name])
    model = MODELS[FDET_NAMES[BACKBONES[name]]]
    pinned = ModelRef(model.name, str(model.sha256_with([hashlib.sha256(path.read_bytes()).hexdigest()])))
    runtime = Runtime(device=str(device))
    fdet = load_fdet_retinaface(replace(detector.spec, detector=pinned), runtime)
    return calls_per_second(lambda: fdet.detect(frame), device, seconds)


if __name__ == "__main__":
    main()
