"""The same weights find the same faces: our RetinaFace and fdet's own, and every detector under both engines.

Each test prints the largest difference it saw. Where the comparison itself could be blind, a control shows that it
isn't: a network or a decoding that is slightly wrong must fail it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from common.domain import ModelRef, PipelineSpec
from common.sample.source_images import astronaut
from common.settings import get_settings
from tests.detector_files import put_in_cache, random_retinaface, saved, spec_of, use_cache
from workers.detection import Detections, FaceDetector, _anchors, retinaface
from workers.detection._ops import iou
from workers.detection.fdet_package import load_fdet_mtcnn, load_fdet_retinaface
from workers.detection.mtcnn import load_mtcnn
from workers.detection.retinaface import RetinaFace, load_retinaface
from workers.inference import Engine, Runtime
from workers.media.images import decode_image

torch = pytest.importorskip("torch", reason="the layer `native` is not installed")

from workers.detection import mtcnn_network, retinaface_network  # noqa: E402  (they need torch)
from workers.inference.torch_session import TorchSession  # noqa: E402

# Not imported: fdet needs what `fdet_package` gives it.
pytestmark = pytest.mark.skipif(find_spec("fdet") is None, reason="the layer `native` is not installed")

MOBILENET_FILE = "retinaface_mobilenet0.25_Final.pth"
RESNET50_FILE = "retinaface_resnet50_final.pt"
ONNX, NATIVE = Runtime(Engine.ONNX), Runtime(Engine.NATIVE)
#: What two ways may differ by. fdet cuts its boxes' corners and sides to whole pixels, and so are ours before.
BOX_PX, SCORE = 1.0, 1e-3

RgbImage = NDArray[np.uint8]


@dataclass
class Difference:
    """The largest differences between the finds of two detectors, in pixels of an edge and in a score."""

    faces: int = 0
    box_px: float = 0.0
    score: float = 0.0

    def add(self, ours: Detections, theirs: Detections) -> None:
        assert len(ours) == len(theirs), f"{len(ours)} faces against {len(theirs)}"
        if len(ours):
            pairs = iou(ours.boxes_xyxy, theirs.boxes_xyxy).argmax(axis=1)
            assert sorted(pairs) == list(range(len(ours))), "a face has no counterpart of its own"
            self.faces += len(ours)
            self.box_px = max(self.box_px, float(np.abs(ours.boxes_xyxy - theirs.boxes_xyxy[pairs]).max()))
            self.score = max(self.score, float(np.abs(ours.scores - theirs.scores[pairs]).max()))

    def check(self, at_least_faces: int) -> None:
        assert self.faces >= at_least_faces
        assert self.box_px <= BOX_PX
        assert self.score <= SCORE


Report = Callable[[str, Difference], None]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]) -> Report:
    """Prints a difference and keeps it with the test's result."""

    def tell(what: str, difference: Difference) -> None:
        line = (
            f"{difference.faces} faces, at most {difference.box_px:.2g} px and a score of {difference.score:.2g} apart"
        )
        record_property(what, line)
        with capsys.disabled():
            print(f"\n  {what}: {line}")

    return tell


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield use_cache(tmp_path / "models", monkeypatch)
    get_settings.cache_clear()


@pytest.fixture
def scenes(data_dir: Path) -> list[RgbImage]:
    """The 57 test scenes."""
    paths = sorted((data_dir / "scenes" / "images").iterdir())
    return [decode_image(path.read_bytes(), max_pixels=10**7).rgb for path in paths]


@pytest.fixture
def mobilenet_file(data_dir: Path) -> bytes:
    return (data_dir / "weights" / MOBILENET_FILE).read_bytes()


def finds(detector: FaceDetector, images: Sequence[RgbImage]) -> list[Detections]:
    return [detector.detect(image) for image in images]


def difference_of(ours: Sequence[Detections], theirs: Sequence[Detections]) -> Difference:
    difference = Difference()
    for our_faces, their_faces in zip(ours, theirs, strict=True):
        difference.add(our_faces, their_faces)
    return difference


def whole_pixels(found: Detections) -> Detections:
    """The finds with corner and sides cut to whole pixels, as fdet gives its own."""
    corners = np.trunc(found.boxes_xyxy[:, :2])
    sides = np.trunc(found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2])
    return Detections(np.concatenate([corners, corners + sides], axis=1), found.scores)


def unscaled(detector: ModelRef, threshold: float) -> PipelineSpec:
    """A pipeline that looks at pictures as they are, as fdet does up to 1000 pixels."""
    return spec_of(detector, threshold, enlarge_below_px=0)


def compare_with_fdet(
    name: str, ours: PipelineSpec, theirs: PipelineSpec, images: Sequence[RgbImage], report: Report, at_least: int
) -> None:
    expected = finds(load_fdet_retinaface(theirs, NATIVE), images)
    found = {runtime.engine: finds(load_retinaface(ours, runtime), images) for runtime in (NATIVE, ONNX)}
    against_fdet = {
        engine: difference_of([whole_pixels(each) for each in faces], expected) for engine, faces in found.items()
    }
    engines = difference_of(found[Engine.ONNX], found[Engine.NATIVE])
    for engine, difference in against_fdet.items():
        report(f"{name}, {engine} against fdet", difference)
        difference.check(at_least)
    report(f"{name}, onnx against native", engines)
    engines.check(at_least)


@pytest.mark.data
def test_mobilenet_finds_what_fdet_finds(
    scenes: list[RgbImage], mobilenet_file: bytes, cache: Path, report: Report
) -> None:
    """Far below the usual threshold, so that doubtful faces are compared, too."""
    contents = {MOBILENET_FILE: mobilenet_file}
    ours = unscaled(put_in_cache(cache, "retinaface-mobilenet", contents), 0.3)
    theirs = unscaled(put_in_cache(cache, "fdet-retinaface-mobilenet", contents), 0.3)
    assert len(scenes) == 57
    compare_with_fdet("RetinaFace-mobilenet", ours, theirs, scenes, report, at_least=150)


@pytest.mark.bench
def test_resnet50_of_random_weights_finds_what_fdet_finds(cache: Path, report: Report) -> None:
    contents = {RESNET50_FILE: saved(random_retinaface("resnet50").state_dict(), prefix="")}
    ours = unscaled(put_in_cache(cache, "retinaface-resnet50", contents), 0.8)
    theirs = unscaled(put_in_cache(cache, "fdet-retinaface", contents), 0.8)
    photograph = astronaut()
    # Sizes that no stride divides, small enough for 25 million weights on a CPU.
    images = [photograph[100:351, 60:361], photograph[::3, ::2], photograph[40:240, 150:251]]
    compare_with_fdet("RetinaFace-ResNet50 of random weights", ours, theirs, images, report, at_least=100)


@pytest.mark.data
@pytest.mark.parametrize("fault", ["slope", "size variance", "mean"])
def test_a_slight_fault_would_be_noticed(
    fault: str, scenes: list[RgbImage], mobilenet_file: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {MOBILENET_FILE: mobilenet_file}
    if fault == "slope":  # that of the variant of the file which loads as well
        monkeypatch.setattr(retinaface_network, "SLOPE", 0.0)
    elif fault == "size variance":
        monkeypatch.setattr(_anchors, "SIZE_VARIANCE", 0.25)
    else:
        monkeypatch.setattr(retinaface, "MEAN_BGR", (123, 117, 104))
    network = retinaface_network.load_weights(mobilenet_file, "mobilenet")
    ours = unscaled(put_in_cache(cache, "retinaface-mobilenet", contents), 0.3)
    theirs = unscaled(put_in_cache(cache, "fdet-retinaface-mobilenet", contents), 0.3)
    faulty = RetinaFace(ours, TorchSession(network, NATIVE, ("n", 3, "height", "width")))
    some = scenes[:6]
    with pytest.raises(AssertionError):
        difference_of(
            [whole_pixels(found) for found in finds(faulty, some)], finds(load_fdet_retinaface(theirs, NATIVE), some)
        ).check(at_least_faces=1)


@pytest.mark.data
def test_mtcnn_finds_the_same_under_both_engines(
    scenes: list[RgbImage], data_dir: Path, cache: Path, report: Report
) -> None:
    nets = sorted((data_dir / "weights" / "mtcnn").glob("*.pt"))
    spec = unscaled(put_in_cache(cache, "mtcnn", {path.name: path.read_bytes() for path in nets}), 0.5)
    some = scenes[::4]
    difference = difference_of(*(finds(load_mtcnn(spec, runtime), some) for runtime in (ONNX, NATIVE)))
    report("MTCNN, onnx against native", difference)
    difference.check(at_least_faces=30)


@pytest.mark.data
def test_fdets_networks_of_mtcnn_say_what_ours_say(data_dir: Path, cache: Path) -> None:
    """fdet's have the dense layers' inputs in another order: what is rewritten for them must mean the same."""
    contents = {path.name: path.read_bytes() for path in (data_dir / "weights" / "mtcnn").glob("*.pt")}
    fdets = load_fdet_mtcnn(unscaled(put_in_cache(cache, "fdet-mtcnn", contents), 0.7), NATIVE)
    generator = torch.Generator().manual_seed(3)
    for name, side in (("pnet", 40), ("rnet", 24), ("onet", 48)):
        batch = torch.rand(5, 3, side, side, generator=generator) * 2 - 1
        with torch.no_grad():
            scores, shifts = mtcnn_network.load_weights(contents[f"{name}.pt"], name)(batch)
            *_, their_shifts, their_scores = getattr(fdets._detector, f"_{name}")(batch)
        assert torch.allclose(scores, their_scores[:, 1], atol=1e-5)
        assert torch.allclose(shifts, their_shifts, atol=1e-5)
        assert shifts.std() > 0.01  # there is something to differ


@pytest.mark.data
def test_fdets_mtcnn_and_ours_find_mostly_the_same(scenes: list[RgbImage], data_dir: Path, cache: Path) -> None:
    """Not all: they scale pictures and round boxes differently between the networks."""
    contents = {path.name: path.read_bytes() for path in (data_dir / "weights" / "mtcnn").glob("*.pt")}
    ours = load_mtcnn(unscaled(put_in_cache(cache, "mtcnn", contents), 0.9), ONNX)
    theirs = load_fdet_mtcnn(unscaled(put_in_cache(cache, "fdet-mtcnn", contents), 0.9), NATIVE)
    found, expected, both = 0, 0, 0
    for image in scenes[::6]:
        our_faces, their_faces = ours.detect(image), theirs.detect(image)
        found, expected = found + len(our_faces), expected + len(their_faces)
        both += int((iou(our_faces.boxes_xyxy, their_faces.boxes_xyxy).max(axis=1, initial=0) > 0.6).sum())
    assert expected > 10
    assert both >= 0.75 * max(found, expected)
