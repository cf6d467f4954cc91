"""On a GPU: the same faces and labels as on the CPU, no copy of a frame on the way, and room made where memory ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from common.models.manifest import MODELS
from common.sample.source_images import astronaut
from tests.agreement import compare, scenes
from tests.pipelines import default_spec
from workers.analysis.load import load_analyzer
from workers.detection import centerface
from workers.inference import Runtime
from workers.inference.onnx_session import load_session

pytestmark = pytest.mark.gpu

SPEC = default_spec()
#: The GPU reckons in half precision. Of faces that either way finds, the share that both do; of those, the share with
#: the same label; pixels, and the difference of P(mask) that 99 % of them stay within.
MATCHED, SAME_LABEL, BOX_PX, P_MASK = 0.97, 0.97, 3.0, 0.15


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    return load_analyzer(SPEC, Runtime(device="cuda"))


@pytest.fixture(scope="module")
def frames() -> list[NDArray[np.uint8]]:
    """Sixteen frames of 640×480 with four faces each."""
    photograph = astronaut()
    found = []
    for number in range(16):
        frame = np.full((480, 640, 3), 60 + 8 * number, np.uint8)
        for corner, (y, x) in enumerate([(0, 0), (0, 320), (240, 0), (240, 320)]):
            side = 150 + 5 * number + 2 * corner
            small = cv2.resize(photograph, (side, side), interpolation=cv2.INTER_AREA)
            frame[y : y + side, x : x + side] = small[: 480 - y, : 640 - x]
        found.append(frame)
    return found


def test_the_same_faces_and_labels_as_on_the_cpu(on_gpu: Any, frames: list[NDArray[np.uint8]]) -> None:
    on_cpu = load_analyzer(SPEC, Runtime())
    agreement = compare(on_gpu.analyze_batch(frames), [on_cpu.analyze(frame) for frame in frames])
    print(agreement)
    assert agreement.faces >= 60
    assert agreement.matched >= MATCHED
    assert agreement.same_label >= SAME_LABEL
    assert agreement.largest_px < BOX_PX
    assert agreement.p_of_99_percent < P_MASK


@pytest.mark.data
def test_the_same_faces_and_labels_on_the_test_scenes(data_dir: Path, on_gpu: Any) -> None:
    images = scenes(data_dir)
    on_cpu = load_analyzer(SPEC, Runtime())
    agreement = compare(on_gpu.analyze_batch(images), [on_cpu.analyze(image) for image in images])
    print(agreement)
    assert agreement.matched >= MATCHED
    assert agreement.same_label >= SAME_LABEL
    assert agreement.largest_px < BOX_PX
    assert agreement.p_of_99_percent < P_MASK


@pytest.mark.parametrize("backbone", ["mobilenet", "resnet50"])
def test_retinaface_in_half_precision_finds_what_it_finds_in_single(
    backbone: Any, frames: list[NDArray[np.uint8]]
) -> None:
    """With seeded random weights: what the network says of every prior box, and where it puts them."""
    import torch

    from workers.analysis.device.detectors import folded, ready
    from workers.detection.retinaface_network import RetinaFaceNetwork

    torch.manual_seed(5)
    network = folded(RetinaFaceNetwork(backbone).eval())
    device = torch.device("cuda")
    batch = (torch.from_numpy(np.stack(frames[:2])).permute(0, 3, 1, 2).flip(1) - 110.0).to(device)
    with torch.inference_mode():
        expected = ready(network, device, torch.float32)(batch)
        found = ready(network, device, torch.float16)(batch.half())
    locations, scores = (
        (one.float() - other).abs().max().item() for one, other in zip(found, expected[:2], strict=False)
    )
    print(f"largest differences: location {locations:.4f}, score {scores:.4f}")
    assert locations < 0.01  # at most a thousandth of a prior box's side
    assert scores < 0.005


def test_no_frame_is_copied_to_the_host(on_gpu: Any, frames: list[NDArray[np.uint8]]) -> None:
    """What the driver copied from the device during a batch: the faces' rows, and single numbers."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu.analyze_batch(frames)  # the libraries are loaded, and their own set-up is done
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        found = on_gpu.analyze_batch(frames)
    faces = sum(map(len, found))
    down = _copied(seen, "DtoH")
    up = _copied(seen, "HtoD")
    print(f"{faces} faces: {up} bytes up, {down} bytes down")
    assert 7 * 4 * faces <= down <= 7 * 4 * faces + 1024
    assert up >= sum(frame.nbytes for frame in frames)  # the profiler does see copies


def _copied(seen: Any, direction: str) -> int:
    """Bytes of all copies in that direction, as the profiler's trace tells them."""
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return sum(
        int(event["args"]["bytes"])
        for event in events
        if event.get("cat") == "gpu_memcpy" and direction in event["name"]
    )


def test_out_of_memory_halves_the_batch(on_gpu: Any, frames: list[NDArray[np.uint8]]) -> None:
    """The real thing: the process may take so little of the device's memory that sixteen frames don't fit."""
    import torch

    expected = on_gpu.analyze_batch(frames)
    batches: list[int] = []
    hook = on_gpu.detector.network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    on_gpu.analyze_batch(frames[:4])
    needed = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    batches.clear()
    try:
        torch.cuda.set_per_process_memory_fraction(1.5 * needed / total)
        found = on_gpu.analyze_batch(frames)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        hook.remove()
    print(f"batches: {batches}")
    assert batches[0] == 16
    assert min(batches) < 16
    agreement = compare(found, expected)
    assert agreement.matched == 1
    assert agreement.same_label == 1
    assert agreement.largest_px < 0.5


def test_onnx_runtime_agrees_on_the_gpu() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("no onnxruntime-gpu: pip uninstall onnxruntime; pip install 'maskwatch[gpu]'")
    batch = np.random.default_rng(1).uniform(0, 255, (1, 3, 96, 128)).astype(np.float32)
    model = MODELS["centerface"].ref
    maps = {
        device: load_session(model, Runtime(device=device), free_size_outputs=centerface.OUTPUTS).run(batch)
        for device in ("cpu", "cuda")
    }
    for one, other in zip(maps["cuda"], maps["cpu"], strict=True):
        assert one == pytest.approx(other, abs=0.01)  # TensorFloat-32 has ten bits
