"""Runtimes that run out of memory or break: told apart by what they really say, and answered by smaller parts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef, SampleMode
from tests.pipelines import default_spec
from workers.analysis.analyzer import Analyzer
from workers.analysis.video import SampledFrame, analyze_frames
from workers.classification.network_classifier import MAX_BATCH, NetworkMaskClassifier
from workers.detection import Detections
from workers.inference import Runtime, faults
from workers.inference.faults import BrokenDeviceError, OutOfModelMemoryError, in_parts, told
from workers.inference.onnx_session import load_session
from workers.jobs import models

SPEC = default_spec()

ShipBrightness = Callable[..., ModelRef]


@pytest.fixture(autouse=True)
def _whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults._Process, "device_broken", False)


def raiser(error: Exception) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


# --- what runtimes say --------------------------------------------------------------------------------------


def of_type(name: str, text: str) -> Exception:
    error: Exception = type(name, (Exception,), {})(text)
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        of_type("ResourceExhaustedError", "OOM when allocating tensor with shape[32,728,38,38]"),
        of_type("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        of_type(
            "RuntimeException", "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0"
        ),
        of_type("Fail", "bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 81920000"),
    ],
)
def test_a_lack_of_memory_leaves_the_device_usable(error: Exception) -> None:
    with pytest.raises(OutOfModelMemoryError):
        told(raiser(error))
    assert not faults.device_is_broken()


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0",
        "CUDA failure 719: unspecified launch failure ; GPU=0",
        "Failed to synchronize: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
    ],
)
def test_what_breaks_the_context_is_remembered(text: str) -> None:
    with pytest.raises(BrokenDeviceError, match="RuntimeError"):
        told(raiser(RuntimeError(text)))
    assert faults.device_is_broken()


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        ValueError("operands could not be broadcast"),
        MaskwatchError("CUDA error"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        told(raiser(error))
    assert raised.value is error
    assert not faults.device_is_broken()


def test_what_a_failed_pass_has_made_is_not_kept() -> None:
    """A traceback holds the frames that it passed, and these hold what they made: gigabytes of a device's memory."""
    import weakref

    made: list[weakref.ref[Any]] = []

    def run() -> None:
        activations = np.zeros(10)
        made.append(weakref.ref(activations))
        raise MemoryError

    with pytest.raises(OutOfModelMemoryError) as raised:
        told(run)
    assert made[0]() is None and raised.value.__context__ is None
    # And it would be, were it raised inside of the handler.
    try:
        try:
            run()
        except MemoryError as error:
            raise OutOfModelMemoryError from error
    except OutOfModelMemoryError as error:
        assert made[1]() is not None, error


REAL = """
import resource, sys
import numpy as np
from common.models.pipeline import pipeline_spec
from common.settings import get_settings
from workers.inference import Runtime
from workers.inference.faults import OutOfModelMemoryError
from workers.analysis.load import load_analyzer

analyzer = load_analyzer(pipeline_spec(get_settings()), Runtime())
analyzer.analyze(np.zeros((200, 200, 3), np.uint8))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 120 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
large = np.zeros((1600, 1600, 3), np.uint8)
try:
    analyzer.analyze(large)
except OutOfModelMemoryError as error:
    print(error)
analyzer.analyze(np.zeros((200, 200, 3), np.uint8))
print("and goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts its memory by /proc")
def test_onnxruntime_really_out_of_memory_is_known_as_such_and_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told_, goes_on = done.stdout.splitlines()
    assert told_.startswith("a picture of 1600×1600 pixels doesn't fit the free memory, Fail: ")
    assert told_.endswith("lower MASKWATCH_PIPELINE__SHRINK_ABOVE_PX")
    assert goes_on == "and goes on"


# --- smaller parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fits", "sizes"), [(8, [8, 2]), (3, [8, 4, 2, 2, 2, 2, 2]), (1, [8, 4, 2, *[1] * 10])])
def test_parts_are_halved_until_they_fit(fits: int, sizes: list[int]) -> None:
    tried: list[int] = []

    def run(part: slice) -> list[int]:
        items = list(range(10))[part]
        tried.append(len(items))
        if len(items) > fits:
            raise MemoryError
        return items

    assert [item for part in in_parts(run, 10, 8) for item in part] == list(range(10))
    assert tried == sizes


def test_one_item_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(OutOfModelMemoryError):
        list(in_parts(lambda part: raiser(MemoryError())(), 4, 4))


class Limited:
    """A session whose memory holds so many items; says so as ONNX Runtime does."""

    def __init__(self, session: Any, fits: int) -> None:
        self.session, self.fits, self.batches = session, fits, list[int]()
        self.input_shape = session.input_shape

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        self.batches.append(len(batch))
        if len(batch) > self.fits:
            raise of_type("Fail", "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")
        found: list[NDArray[np.float32]] = self.session.run(batch)
        return found


def crops(count: int) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 256, (40, 40, 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize("fits", [16, 5, 1])
def test_crops_in_halves_get_the_same_answers_byte_for_byte(ship_brightness: ShipBrightness, fits: int) -> None:
    session = load_session(ship_brightness(), Runtime())
    whole = NetworkMaskClassifier(session).classify(crops(MAX_BATCH + 7))
    limited = Limited(session, fits)
    found = NetworkMaskClassifier(limited).classify(crops(MAX_BATCH + 7))  # type: ignore[arg-type]
    assert found.tobytes() == whole.tobytes()
    assert limited.batches[0] == MAX_BATCH and max(limited.batches[-2:]) <= fits


def test_the_shipped_classifier_answers_in_halves_what_it_answers_whole() -> None:
    from workers.classification.registry import load_classifier

    classifier = load_classifier(SPEC, Runtime())
    whole = classifier.classify(crops(MAX_BATCH))
    session = Limited(classifier._session, 4)  # type: ignore[attr-defined]
    found = NetworkMaskClassifier(session).classify(crops(MAX_BATCH))  # type: ignore[arg-type]
    print("largest difference", np.abs(found - whole).max())
    # Its kernels may add in another order for another batch.
    assert found == pytest.approx(whole, abs=1e-5)


class Crowd:
    """Finds the same boxes in each picture."""

    def detect(self, image_rgb: NDArray[np.uint8]) -> Detections:
        boxes = np.array([(x, y, x + 30, y + 40) for x in range(0, 300, 50) for y in range(0, 200, 50)], np.float32)
        return Detections(boxes, np.linspace(1, 0.5, len(boxes), dtype=np.float32))


def video_faces(classifier: NetworkMaskClassifier) -> list[object]:
    random = np.random.default_rng(4)
    frames = [
        SampledFrame(random.integers(0, 256, (240, 320, 3), np.uint8), Fraction(number), Fraction(1))
        for number in range(5)
    ]
    analyzer = Analyzer(SPEC, Crowd(), classifier)
    return list(analyze_frames(frames, analyzer, 1.0, buffer_bytes=2**30, batch=4))


def test_the_faces_of_a_video_are_the_same_whatever_fits(ship_brightness: ShipBrightness) -> None:
    session = load_session(ship_brightness(), Runtime())
    whole = video_faces(NetworkMaskClassifier(session))
    limited = Limited(session, 3)
    assert video_faces(NetworkMaskClassifier(limited)) == whole  # type: ignore[arg-type]
    assert limited.batches[:4] == [24, 12, 6, 3]
    assert len(whole) == 5 and len(whole[0].faces) == 24  # type: ignore[attr-defined]


def test_without_halving_the_video_fails(ship_brightness: ShipBrightness, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_only(run: Callable[[slice], Any], count: int, at_most: int) -> list[Any]:
        return [told(lambda: run(slice(0, count)))]

    monkeypatch.setattr("workers.classification.network_classifier.in_parts", whole_only)
    limited = Limited(load_session(ship_brightness(), Runtime()), 3)
    with pytest.raises(OutOfModelMemoryError, match="a picture of 320×240 pixels doesn't fit the free memory"):
        video_faces(NetworkMaskClassifier(limited))  # type: ignore[arg-type]


# --- loaded once --------------------------------------------------------------------------------------------


def test_pipelines_that_differ_in_sampling_alone_share_their_models(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []

    def load(spec: object, runtime: Runtime) -> object:
        loads.append(spec)
        return object()

    monkeypatch.setattr(models, "load_analyzer", load)
    models._loaded.cache_clear()
    try:
        specs: Sequence[Any] = [
            SPEC, replace(SPEC, sample_fps=5.0), replace(SPEC, sample=SampleMode.KEYFRAMES), replace(SPEC, revision=9)
        ]  # fmt: skip
        one, two, three, other = (models.analyzer(spec, Runtime()) for spec in specs)
    finally:
        models._loaded.cache_clear()
    assert one is two is three and other is not one
    assert len(loads) == 2
