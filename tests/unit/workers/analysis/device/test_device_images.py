"""Frames resized and faces cut in torch: the pixels that OpenCV and the CPU pipeline give, to within one level."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from workers.classification._ops import crop_for_classification, prepare_crop

torch = pytest.importorskip("torch", reason="the `native` layer is not installed")

from workers.analysis.device.images import face_crops, resized  # noqa: E402

#: Levels of 255: OpenCV reckons with 11 bits, torch with floats.
ONE_LEVEL = 1.001


def photographs(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Frames with structure at every scale, edges included."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 9, 12, 3), dtype=np.uint8)
    frames = np.stack([cv2.resize(each, (width, height), interpolation=cv2.INTER_CUBIC) for each in coarse])
    noise = rng.integers(-20, 21, frames.shape)
    return (frames.astype(int) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("width", "height"), [(120, 90), (240, 180), (150, 113), (119, 89), (60, 45), (40, 30), (47, 35), (7, 5), (1, 1)]
)
def test_frames_are_resized_as_opencv_does(width: int, height: int) -> None:
    frames = photographs(2, 90, 120)
    interpolation = cv2.INTER_AREA if width < 120 else cv2.INTER_LINEAR
    expected = np.stack([cv2.resize(frame, (width, height), interpolation=interpolation) for frame in frames])
    found = resized(torch.from_numpy(frames), height, width)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected.transpose(0, 3, 1, 2)).max() <= ONE_LEVEL


@st.composite
def boxes(draw: st.DrawFn) -> list[tuple[float, float, float, float]]:
    """Up to six boxes in a picture of 160 × 120 pixels, some at its edges, some very thin, with odd fractions."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        x1, y1 = draw(st.floats(0, 158)), draw(st.floats(0, 118))
        x2 = draw(st.floats(x1 + 1, 160) | st.just(160.0))
        y2 = draw(st.floats(y1 + 1, 120) | st.just(120.0))
        # Detectors give single precision, and both ways must start from the very same box.
        x1, y1, x2, y2 = (float(np.float32(value)) for value in (x1, y1, x2, y2))
        found.append((x1, y1, x2, y2))
    return found


@settings(max_examples=150)
@given(boxes(), st.sampled_from([16, 24, 64]), st.sampled_from([0, 30, 90]), st.sampled_from([1.0, 1.25, 2.0]))
def test_faces_are_cut_as_the_cpu_does(
    given_boxes: list[tuple[float, float, float, float]], side: int, below_px: int, factor: float
) -> None:
    frames = photographs(2, 120, 160)
    which = [index % 2 for index in range(len(given_boxes))]
    found = face_crops(
        torch.from_numpy(frames), torch.tensor(which), torch.tensor(given_boxes), below_px, factor, side
    ).numpy()
    assert found.shape == (len(which), side, side, 3)
    for crop, index, box in zip(found, which, given_boxes, strict=True):
        expected = prepare_crop(crop_for_classification(frames[index], box, below_px, factor), side)
        assert np.abs(crop - expected).max() * 127.5 <= ONE_LEVEL


def test_a_long_crop_that_is_averaged_across_only() -> None:
    """136 × 88 to 96 × 96: OpenCV's INTER_AREA has a rule of its own where one side grows, with jumps."""
    frames = photographs(1, 200, 200)
    found = face_crops(torch.from_numpy(frames), torch.tensor([0]), torch.tensor([[20.0, 30, 108, 166]]), 0, 1.0, 96)
    expected = prepare_crop(frames[0, 30:166, 20:108], 96)
    assert np.abs(found[0].numpy() - expected).max() * 127.5 <= ONE_LEVEL


def test_sums_of_large_bright_frames_are_exact() -> None:
    """In float32 they would not be: 255 · 2000 · 2000 needs 30 bits."""
    frame = np.full((1, 2000, 2000, 3), 255, np.uint8)
    box = torch.tensor([[1700.0, 1700, 1995, 1995]])
    found = face_crops(torch.from_numpy(frame), torch.tensor([0]), box, 0, 1.0, 64)
    assert (found == 1).all()
