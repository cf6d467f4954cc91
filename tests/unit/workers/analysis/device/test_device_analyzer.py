"""The way of a frame on the device, run on the CPU: the same faces as the pipeline's, whatever fits the memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from common.domain import Face, MaskwatchError, ModelRef
from common.sample.source_images import astronaut
from tests.agreement import compare, scenes
from tests.pipelines import default_spec
from workers.analysis.analyzer import Analyzer
from workers.analysis.load import load_analyzer
from workers.detection.retinaface import RetinaFace, to_input
from workers.inference import Runtime, faults
from workers.inference.torch_session import TorchSession

torch = pytest.importorskip("torch", reason="the `native` layer is not installed")

from workers.analysis.device.analyzer import MAX_FRAMES, DeviceAnalyzer, load_device_analyzer  # noqa: E402
from workers.analysis.device.detectors import DeviceRetinaFace, folded, ready  # noqa: E402
from workers.classification.registry import load_classifier  # noqa: E402
from workers.detection.retinaface_network import RetinaFaceNetwork  # noqa: E402

SPEC = default_spec()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def analyzer() -> DeviceAnalyzer:
    return load_device_analyzer(SPEC, Runtime())


@pytest.fixture
def frames() -> list[NDArray[np.uint8]]:
    """Eight frames of one size with a face each, larger from frame to frame, and the fourth without one."""
    photograph = astronaut()
    found = []
    for number in range(8):
        frame = np.full((240, 320, 3), 90 + 10 * number, np.uint8)
        side = 120 + 15 * number
        if number != 3:
            frame[5 : 5 + side, 20 : 20 + side] = cv2.resize(photograph, (side, side), interpolation=cv2.INTER_AREA)
        found.append(frame)
    return found


def assert_alike(found: list[Face], expected: list[Face], *, px: float = 0.5, p: float = 0.02) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.x1, one.y1, one.x2, one.y2) == pytest.approx((other.x1, other.y1, other.x2, other.y2), abs=px)
        assert one.p_face == pytest.approx(other.p_face, abs=p)
        assert one.p_with_mask == pytest.approx(other.p_with_mask, abs=p)


def test_the_same_faces_as_the_cpu_finds(analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]]) -> None:
    pipeline = load_analyzer(SPEC, Runtime())
    found = analyzer.analyze_batch(frames)
    for faces, frame in zip(found, frames, strict=True):
        assert_alike(faces, pipeline.analyze(frame))
    assert [len(faces) for faces in found] == [1, 1, 1, 0, 1, 1, 1, 1]


def test_one_image_is_a_batch_of_one(analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]]) -> None:
    assert_alike(analyzer.analyze(frames[7]), analyzer.analyze_batch(frames)[7], px=1e-3, p=1e-4)
    assert analyzer.analyze(frames[3]) == []


def test_no_frames_are_no_faces(analyzer: DeviceAnalyzer) -> None:
    assert analyzer.analyze_batch([]) == []


def test_frames_of_several_sizes_come_back_in_their_order(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]]
) -> None:
    mixed = [frames[0], frames[6][:200, :250], frames[3], frames[5][:200, :250], frames[7]]
    found = analyzer.analyze_batch(mixed)
    for faces, frame in zip(found, mixed, strict=True):
        assert_alike(faces, analyzer.analyze(frame), px=1e-3, p=1e-4)


def test_a_image_that_numpy_holds_read_only_or_in_steps(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]]
) -> None:
    frozen = frames[7].copy()
    frozen.flags.writeable = False
    mirrored = frozen[:, ::-1]
    (one, other) = analyzer.analyze_batch([frozen, mirrored])
    assert len(one) == len(other) == 1
    assert other[0].x1 == pytest.approx(320 - one[0].x2, abs=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 3)])
def test_a_sliver_has_no_faces(analyzer: DeviceAnalyzer, size: tuple[int, int]) -> None:
    assert analyzer.analyze(np.full((*size, 3), 127, np.uint8)) == []


class Limited(torch.nn.Module):  # type: ignore[misc]
    """A network on a device whose memory holds so many frames; keeps the sizes of the batches it was given."""

    def __init__(self, network: torch.nn.Module, fits: int) -> None:
        super().__init__()
        self.network, self.fits, self.batches = network, fits, list[int]()

    def forward(self, batch: torch.Tensor) -> object:
        self.batches.append(len(batch))
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(batch)


@pytest.fixture
def limited(analyzer: DeviceAnalyzer, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Limited]:
    def limit(fits: int) -> Limited:
        network = Limited(analyzer.detector.network, fits)
        monkeypatch.setattr(analyzer.detector, "network", network)
        monkeypatch.setattr(analyzer, "_fitting", {})
        return network

    return limit


def test_out_of_memory_halves_the_batch_and_changes_nothing_else(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]], limited: Callable[[int], Limited]
) -> None:
    expected = analyzer.analyze_batch(frames)
    network = limited(2)
    found = analyzer.analyze_batch(frames)
    assert network.batches == [8, 4, 2, 2, 2, 2]
    for faces, others in zip(found, expected, strict=True):
        assert_alike(faces, others, px=1e-3, p=1e-4)
    # What fits is remembered, for this size alone.
    network.batches.clear()
    analyzer.analyze_batch([*frames[:3], frames[0][:200]])
    assert network.batches == [2, 1, 1]


def test_a_frame_that_does_not_fit_alone_is_an_error_that_says_what_to_do(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]], limited: Callable[[int], Limited]
) -> None:
    limited(0)
    with pytest.raises(MaskwatchError, match=r"320×240 pixels doesn't fit .* lower MASKWATCH_PIPELINE__SHRINK"):
        analyzer.analyze_batch(frames)


def test_another_error_is_not_taken_for_a_full_memory(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Limited):
        def forward(self, batch: torch.Tensor) -> object:
            raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(faults._Process, "device_broken", False)  # put back afterwards
    monkeypatch.setattr(analyzer.detector, "network", Broken(analyzer.detector.network, 0))
    with pytest.raises(faults.BrokenDeviceError, match="device-side"):
        analyzer.analyze_batch(frames)
    assert faults.device_is_broken()


def test_a_crowd_that_does_not_fit_is_classified_in_smaller_parts(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = analyzer.analyze_batch(frames)
    classifier = Limited(analyzer.classifier, 3)
    classifier.register_buffer("weight", torch.zeros(1))
    monkeypatch.setattr(analyzer, "classifier", classifier)
    found = analyzer.analyze_batch(frames)
    assert classifier.batches == [7, 3, 3, 1]
    for faces, others in zip(found, expected, strict=True):
        assert_alike(faces, others, px=0, p=1e-4)


def test_batches_are_bounded(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]], limited: Callable[[int], Limited]
) -> None:
    network = limited(MAX_FRAMES)
    small = frames[0][:40, :40]
    assert len(analyzer.analyze_batch([small] * (MAX_FRAMES + 3))) == MAX_FRAMES + 3
    assert network.batches == [MAX_FRAMES, 3]


def test_only_faces_come_back(
    analyzer: DeviceAnalyzer, frames: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read from tensors: one table of faces, and single numbers that tell how much there is."""
    rows: list[torch.Size] = []
    copied = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: rows.append(self.shape) or copied(self))
    for name in ("numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, _only_for_upload(getattr(torch.Tensor, name)))
    found = analyzer.analyze_batch(frames)
    assert rows == [(sum(len(faces) for faces in found), 7)]


def _only_for_upload(method: Callable[..., object]) -> Callable[..., object]:
    def guarded(self: torch.Tensor, *arguments: object) -> object:
        assert self.dtype == torch.uint8, f"a tensor of {self.dtype} {tuple(self.shape)} was read on the host"
        return method(self, *arguments)

    return guarded


@pytest.mark.parametrize("backbone", ["mobilenet", "resnet50"])
def test_retinaface_finds_the_same_faces_in_batches(backbone: str, ship_brightness: Callable[..., ModelRef]) -> None:
    """With random weights, on frames of the size they are, at a threshold that leaves a few hundred candidates."""
    torch.manual_seed(5)
    network = RetinaFaceNetwork(backbone).eval()  # type: ignore[arg-type]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    bright = ship_brightness()
    frames = [np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8) for seed in range(3)]
    spec = replace(SPEC, classifier=bright, enlarge_below_px=0)
    spec = replace(spec, detector_threshold=_threshold(network, frames))
    one_by_one = Analyzer(
        spec,
        RetinaFace(spec, TorchSession(network, Runtime(), ("n", 3, "height", "width"))),
        load_classifier(spec, Runtime()),
    )
    expected = [one_by_one.analyze(frame) for frame in frames]
    classifier = load_device_analyzer(replace(spec, detector=SPEC.detector), Runtime()).classifier
    detector = DeviceRetinaFace(spec, ready(folded(network), CPU, torch.float32))
    found = DeviceAnalyzer(spec, detector, classifier, 64, CPU).analyze_batch(frames)
    agreement = compare(found, expected)
    print(agreement)
    assert agreement.faces > 20
    # Random scores lie so close together that the last digit decides which of two boxes is the better one.
    assert agreement.matched > 0.97
    assert agreement.largest_px < 0.1
    assert agreement.p_of_99_percent < 0.01


def _threshold(network: torch.nn.Module, frames: list[NDArray[np.uint8]]) -> float:
    with torch.inference_mode():
        scores = [network(torch.from_numpy(to_input(frame)))[1].numpy() for frame in frames]
    return float(np.sort(np.concatenate(scores, axis=None))[-300])


def test_a_folded_network_is_the_same_network() -> None:
    torch.manual_seed(6)
    network = RetinaFaceNetwork("mobilenet").eval()
    batch = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = network(batch)
        found = folded(network)(batch)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    for one, other in zip(found, expected, strict=True):
        assert one.numpy() == pytest.approx(other.numpy(), abs=1e-4)


def test_a_detector_without_a_way_on_the_device_is_refused() -> None:
    spec = replace(SPEC, detector=default_spec(detector="haar").detector)
    with pytest.raises(MaskwatchError, match="haar runs on the CPU only; on a GPU: centerface, retinaface-resnet50"):
        load_device_analyzer(spec, Runtime())


def test_a_classifier_of_another_shape_is_refused(ship_model: Callable[..., ModelRef]) -> None:
    from onnx import TensorProto, helper

    node = helper.make_node("Relu", ["x"], ["y"])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3, 64, 64))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "channels first", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    ref = ship_model("channels-first", "classifier", model.SerializeToString())
    with pytest.raises(MaskwatchError, match=r"valid: \(n, side, side, 3\)"):
        load_device_analyzer(replace(SPEC, classifier=ref), Runtime())


def test_a_gpu_that_is_not_there_is_an_error_and_not_a_slow_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MaskwatchError, match="device cuda needs"):
        load_analyzer(SPEC, Runtime(device="cuda"))


def test_the_cpu_pipeline_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom common.models.pipeline import pipeline_spec\nfrom common.settings import get_settings\n"
        "from workers.inference import Runtime\n"
        "from workers.analysis.load import load_analyzer\n"
        "load_analyzer(pipeline_spec(get_settings()), Runtime())\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.bench
@pytest.mark.data
def test_the_same_faces_on_the_test_scenes(data_dir: Path, analyzer: DeviceAnalyzer) -> None:
    """Both ways in single precision on the CPU. OpenCV's rounding moves a box by a pixel here and there, and the
    classifier answers differences of one level of 255 in a small crop with a few hundredths of a probability."""
    images = scenes(data_dir)[::3]  # torch prepares its CPU kernels anew for each size, which takes most of the time
    agreement = compare(analyzer.analyze_batch(images), [load_analyzer(SPEC, Runtime()).analyze(p) for p in images])
    print(agreement)
    assert agreement.matched >= 0.98
    assert agreement.same_label >= 0.98
    assert agreement.largest_px < 2
    assert agreement.p_of_99_percent < 0.1
