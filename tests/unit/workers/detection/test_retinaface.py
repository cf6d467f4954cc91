"""RetinaFace around its network: what goes in, what comes out, how much work a hostile picture makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.domain import MaskwatchError, ModelRef, PermanentJobError
from common.models.manifest import MODELS
from common.sample.source_images import astronaut
from common.settings import get_settings
from tests.detector_files import put_in_cache, saved, spec_of, use_cache
from workers.detection._anchors import priors
from workers.detection._ops import iou
from workers.detection.retinaface import EXPORT_VERSION, MAX_CANDIDATES, RetinaFace, find, load_retinaface, to_input
from workers.detection.retinaface_network import MobileNet, ResNet50, export_onnx
from workers.inference import Engine, Runtime
from workers.inference.derived import derived_path
from workers.inference.onnx_session import make_session

NATIVE = Runtime(Engine.NATIVE)
MODEL = MODELS["retinaface-mobilenet"].ref


class Session:
    """Stands in for the network: random numbers for every prior box, the same for the same size."""

    input_shape, device = ("n", 3, "height", "width"), "cpu"

    def __init__(self, seed: int, spread: float) -> None:
        self._seed, self._spread = seed, spread

    def run(self, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        count = len(priors(*batch.shape[2:]))
        rng = np.random.default_rng(self._seed)
        locations = rng.normal(0, self._spread, (1, count, 4)).astype(np.float32)
        return [locations, rng.random((1, count), np.float32) ** 6, np.zeros((1, count, 10), np.float32)]


def test_the_input_is_bgr_minus_the_mean() -> None:
    image = np.zeros((2, 3, 3), np.uint8)
    image[1, 2] = (250, 130, 110)  # red, green, blue
    batch = to_input(image)
    assert (batch.shape, batch.dtype) == ((1, 3, 2, 3), np.float32)
    assert batch[0, :, 0, 0].tolist() == [-104, -117, -123]
    assert batch[0, :, 1, 2].tolist() == [110 - 104, 130 - 117, 250 - 123]


def test_the_backbones_have_as_many_weights_as_in_their_papers() -> None:
    """ResNet-50 has 25,557,032, 2,049,000 of them in its top."""
    assert sum(weight.numel() for weight in ResNet50().parameters()) == 25_557_032 - 2_049_000
    assert [each.shape[1:] for each in MobileNet().eval()(torch.zeros(1, 3, 33, 64))] == [
        (64, 5, 8), (128, 3, 4), (256, 2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (1, 47), (33, 2), (61, 95)])
def test_there_is_a_row_for_every_prior_whatever_the_size(size: tuple[int, int], random_mobilenet: Any) -> None:
    with torch.no_grad():
        locations, scores, landmarks = random_mobilenet(torch.zeros(2, 3, *size))
    count = len(priors(*size))
    assert (locations.shape, scores.shape, landmarks.shape) == ((2, count, 4), (2, count), (2, count, 10))


def test_the_onnx_file_is_of_any_size_and_batch(random_mobilenet: Any) -> None:
    session = make_session(export_onnx(random_mobilenet), Runtime())
    assert session.input_shape == ("n", 3, "height", "width")
    rng = np.random.default_rng(2)
    for shape in ((1, 3, 1, 1), (2, 3, 45, 70), (3, 3, 128, 31)):
        batch = rng.normal(0, 60, shape).astype(np.float32)
        with torch.no_grad():
            expected = random_mobilenet(torch.from_numpy(batch))
        for found, wanted in zip(session.run(batch), expected, strict=True):
            assert found == pytest.approx(wanted.numpy(), abs=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.floats(0, 40))
def test_boxes_always_lie_inside_and_have_area(width: int, height: int, seed: int, spread: float) -> None:
    """Whatever the network says, also at the edges and at absurd sizes."""
    found = RetinaFace(spec_of(MODEL), Session(seed, spread)).detect(np.zeros((height, width, 3), np.uint8))
    boxes = found.boxes_xyxy
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 1).all()
    assert (np.diff(found.scores) <= 0).all()
    assert (found.scores >= 0.5).all()


def test_of_candidates_by_the_thousand_only_the_best_are_looked_at() -> None:
    """A picture of 1600 × 1600 that is all face: 105,000 prior boxes reach the threshold."""
    prior = priors(1600, 1600)
    scores = np.linspace(0.6, 0.9, len(prior), dtype=np.float32)
    assert len(prior) > 20 * MAX_CANDIDATES
    boxes, found = find(np.zeros((len(prior), 4), np.float32), scores, prior, 0.5)
    assert 0 < len(boxes) <= MAX_CANDIDATES
    assert found.min() >= np.sort(scores)[-MAX_CANDIDATES]
    overlaps = iou(boxes, boxes)
    np.fill_diagonal(overlaps, 0)
    assert overlaps.max() < 0.4


def test_both_engines_load_the_pinned_file(mobilenet: ModelRef) -> None:
    image = np.random.default_rng(5).integers(0, 255, (90, 131, 3), np.uint8)
    spec = spec_of(mobilenet, 0.7)
    under_torch = load_retinaface(spec, NATIVE).detect(image)
    under_onnx = load_retinaface(spec, Runtime()).detect(image)
    assert len(under_torch) == len(under_onnx) > 0
    # Not in their order: scores may tie.
    pairs = iou(under_onnx.boxes_xyxy, under_torch.boxes_xyxy).argmax(axis=1)
    assert under_onnx.boxes_xyxy == pytest.approx(under_torch.boxes_xyxy[pairs], abs=0.05)
    assert under_onnx.scores == pytest.approx(under_torch.scores[pairs], abs=1e-4)
    assert derived_path(mobilenet, EXPORT_VERSION).is_file()


def test_once_made_the_onnx_file_needs_no_weights(cache: Path, random_mobilenet: Any) -> None:
    model = ModelRef("retinaface-mobilenet", "12" * 32)
    with pytest.raises(MaskwatchError, match="maskwatch models import"):
        load_retinaface(spec_of(model), Runtime())
    path = derived_path(model, EXPORT_VERSION)
    path.parent.mkdir()
    path.write_bytes(export_onnx(random_mobilenet))
    with pytest.raises(MaskwatchError, match="maskwatch models import"):  # nothing vouches for it
        load_retinaface(spec_of(model), Runtime())
    from workers.weights.files import sha256_of

    path.with_name(path.name + ".sha256").write_text(sha256_of(path))
    assert len(load_retinaface(spec_of(model, 0.99), Runtime()).detect(np.zeros((20, 30, 3), np.uint8))) < 99


def test_another_file_than_the_pinned_one_is_refused(cache: Path, random_mobilenet: Any) -> None:
    name = "retinaface_mobilenet0.25_Final.pth"
    content = saved(random_mobilenet.state_dict(), prefix="")
    model = put_in_cache(cache, "retinaface-mobilenet", {name: content})
    (cache / name).write_bytes(content + b"\0")
    for runtime in (NATIVE, Runtime()):
        with pytest.raises(PermanentJobError, match=model.sha256[:12]):
            load_retinaface(spec_of(model), runtime)


def test_the_other_backbones_file_is_refused_by_name(cache: Path, random_mobilenet: Any) -> None:
    content = saved(random_mobilenet.state_dict())
    model = put_in_cache(cache, "retinaface-resnet50", {"retinaface_resnet50_final.pt": content})
    for runtime in (NATIVE, Runtime()):
        with pytest.raises(MaskwatchError, match=r"the file of retinaface-resnet50 is of another network; missing: "):
            load_retinaface(spec_of(model), runtime)
    assert not (cache / "derived").exists()


@pytest.fixture
def detector(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RetinaFace]:
    """With the real weights."""
    cache = use_cache(tmp_path / "models", monkeypatch)
    name = "retinaface_mobilenet0.25_Final.pth"
    model = put_in_cache(cache, "retinaface-mobilenet", {name: (data_dir / "weights" / name).read_bytes()})
    yield load_retinaface(spec_of(model, MODELS["retinaface-mobilenet"].threshold or 0), Runtime())
    get_settings.cache_clear()


@pytest.mark.data
def test_it_finds_the_face_of_the_photograph_and_none_on_walls(detector: RetinaFace) -> None:
    found = detector.detect(astronaut())
    assert iou(found.boxes_xyxy, np.array([[178, 72, 272, 186]], np.float32))[0, 0] > 0.7
    for image in [np.zeros((480, 640, 3)), np.full((33, 1, 3), 255), np.zeros((1, 1, 3)), np.full((97, 301, 3), 127)]:
        assert len(detector.detect(image.astype(np.uint8))) == 0
