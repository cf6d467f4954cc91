"""The notebook's loop does what its description says, and Maskwatch with the same models finds and labels as it does.

How often the two agree on all shared pictures belongs in docs/performance.md; here are a few of them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import notebook_baseline
from benchmarks.agreement import Agreement, as_faces, frames_rgb_of, label_of, twin_spec
from benchmarks.notebook_baseline import CLASSES, NotebookFace, NotebookLoop, models_from, run_video
from common.domain import MaskStatus, MaskwatchError
from workers.analysis.load import load_analyzer
from workers.classification.verdict import face_of
from workers.inference import Runtime
from workers.media.images import decode_image

Pixels = NDArray[np.uint8]


def made_up_loop(monkeypatch: pytest.MonkeyPatch, boxes: list[list[int]], p_with_mask: float = 0.9) -> NotebookLoop:
    """The loop with a detector that finds these boxes in any frame, and a classifier that says this of any crop."""

    def predict(batch: Any, verbose: int) -> NDArray[np.float32]:
        assert batch.shape == (1, 128, 128, 3)
        assert -1 <= batch.min() <= batch.max() <= 1
        return np.array([[p_with_mask, 1 - p_with_mask]], np.float32)

    detector = SimpleNamespace(detect=lambda image: [{"box": box, "confidence": 0.95} for box in boxes])
    tf = SimpleNamespace(image=SimpleNamespace(resize=lambda crop, size: cv2.resize(crop, size).astype(np.float32)))
    monkeypatch.setattr(notebook_baseline, "load_fdet", lambda backbone, threads: detector)
    monkeypatch.setattr(notebook_baseline, "load_keras", lambda mirrored: (SimpleNamespace(predict=predict), tf))
    return NotebookLoop()


def test_boxes_are_sliced_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that begins outside is lost, one that ends outside is kept with what is there of it."""
    loop = made_up_loop(monkeypatch, [[-3, 5, 20, 20], [10, -1, 20, 20], [90, 40, 30, 20], [10, 10, 0, 5]], 0.2)
    image = np.zeros((60, 100, 3), np.uint8)
    (face,) = loop.frame(image)
    assert face.box_xyxy == (90, 40, 120, 60)
    assert face.label is MaskStatus.WITHOUT_MASK
    assert loop.skipped == 3
    (ours,) = as_faces([face], image)
    assert (ours.x1, ours.y1, ours.x2, ours.y2) == (90, 40, 100, 60)
    assert ours.status is MaskStatus.WITHOUT_MASK


def test_a_video_is_read_drawn_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, drawn = tmp_path / "source.avi", tmp_path / "drawn.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for _ in range(5):
        writer.write(np.full((120, 160, 3), 128, np.uint8))
    writer.release()
    loop = made_up_loop(monkeypatch, [[20, 30, 40, 40], [-5, 30, 40, 40]])
    run = run_video(source, loop, limit=3, draw_to=drawn)
    assert (run.frames, run.faces_per_frame, run.skipped) == (3, (1, 1, 1), 3)
    assert run.seconds >= run.detecting_seconds + run.classifying_seconds
    frames = list(frames_rgb_of(drawn, every=1, limit=None))
    assert len(frames) == 3
    # A small face's box is drawn half as large again, to the right and down; compression blurs its colour.
    for x, y in ((20, 50), (80, 50), (50, 30), (50, 90)):
        red, green, blue = (int(value) for value in frames[0][y, x])
        assert green > red + 40
        assert green > blue + 40
    assert run_video(source, loop).frames == 5
    with pytest.raises(MaskwatchError, match=r"\.mp4 or \.avi"):
        run_video(source, loop, draw_to=tmp_path / "drawn.txt")
    with pytest.raises(MaskwatchError, match="OpenCV can't read"):
        run_video(tmp_path / "none.avi", loop)


def test_agreement_counts_what_only_one_found_and_what_is_labelled_otherwise() -> None:
    notebook = [
        NotebookFace((10, 10, 30, 30), 0.9, CLASSES[0], 0.7),
        NotebookFace((50, 10, 70, 30), 0.9, CLASSES[1], 0.4),
        NotebookFace((90, 10, 110, 30), 0.9, CLASSES[1], 0.1),
    ]
    maskwatch = [
        # Not sure enough for a label of its own: the larger probability counts.
        face_of((51.0, 10.0, 71.0, 30.0), 0.9, 0.55, uncertain_below=0.6),
        face_of((10.5, 10.5, 30.5, 30.5), 0.9, 0.8, uncertain_below=0.6),
        face_of((10.0, 60.0, 30.0, 80.0), 0.9, 0.8, uncertain_below=0.6),
    ]
    assert label_of(maskwatch[0]) is MaskStatus.WITH_MASK
    agreement = Agreement()
    agreement.add(notebook, maskwatch)
    figures = agreement.figures()
    assert (figures["both"], figures["only_notebook"], figures["only_maskwatch"]) == (2, 1, 1)
    assert figures["same_faces"] == 0.5
    assert figures["same_labels"] == 0.5
    assert figures["p_apart_largest"] == pytest.approx(0.15)
    assert figures["px_apart_largest"] == 1
    assert Agreement().figures()["same_faces"] is None


@pytest.mark.bench
@pytest.mark.data
@pytest.mark.skipif(find_spec("fdet") is None or find_spec("keras") is None, reason="the layer `native` is missing")
def test_with_the_notebooks_models_maskwatch_says_what_the_notebook_says(data_dir: Path) -> None:
    paths = sorted((data_dir / "scenes" / "images").iterdir())
    images = [decode_image(paths[number].read_bytes(), max_pixels=10**7).rgb for number in (3, 5, 11)]
    images += frames_rgb_of(data_dir / "video" / "face-demographics-walking.gif", every=1, limit=1)
    with models_from(data_dir / "weights"):
        loop = NotebookLoop()
        analyzer = load_analyzer(twin_spec(), Runtime())
    notebook = [loop.frame(image) for image in images]

    def agreement_of(images_seen: list[Pixels]) -> dict[str, Any]:
        agreement = Agreement()
        for image, faces in zip(images_seen, notebook, strict=True):
            agreement.add(faces, analyzer.analyze(image))
        return agreement.figures()

    found = agreement_of(images)
    assert found["frames"] == 4
    assert found["faces"] >= 10
    assert found["same_faces"] == 1
    assert found["same_labels"] == 1
    assert found["p_apart_median"] < 0.02
    assert found["px_apart_median"] < 2
    # The control: with red and blue exchanged, the same comparison fails.
    exchanged = agreement_of([np.ascontiguousarray(image[:, :, ::-1]) for image in images])
    assert exchanged["same_faces"] < 0.9
    assert exchanged["same_labels"] < 0.9
