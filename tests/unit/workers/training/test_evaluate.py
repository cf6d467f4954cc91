from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from common.domain import Face, MaskStatus, MaskwatchError
from workers.training.dataset import Box, LabelledBox, load
from workers.training.evaluate import (
    SceneResults,
    balanced_accuracy,
    evaluate_faces,
    evaluate_scenes,
    match,
    size_bin,
)


def found(box: Box, p_face: float = 0.9, p_with_mask: float = 0.9) -> Face:
    larger = max(p_with_mask, 1 - p_with_mask)
    named = MaskStatus.WITH_MASK if p_with_mask >= 0.5 else MaskStatus.WITHOUT_MASK
    return Face(*box, p_face, p_with_mask, 1 - p_with_mask, MaskStatus.UNCERTAIN if larger < 0.6 else named)


def test_two_detections_of_one_face_count_once_and_the_surer_one_counts():
    labelled = [LabelledBox((0, 0, 10, 10), 0)]
    assert match(labelled, [found((0, 0, 10, 9), 0.6), found((0, 0, 10, 8), 0.8)]) == [1]


def test_one_detection_matches_one_face_only():
    labelled = [LabelledBox((0, 0, 10, 10), 0), LabelledBox((0, 0, 10, 9), 0)]
    assert match(labelled, [found((0, 0, 10, 10))]) == [0, None]


def test_a_detection_takes_the_free_face_it_overlaps_next_best():
    labelled = [LabelledBox((0, 0, 10, 10), 0), LabelledBox((2, 0, 12, 10), 0)]
    assert match(labelled, [found((0, 0, 10, 10), 0.9), found((1, 0, 10, 10), 0.8)]) == [0, 1]


def test_less_than_half_an_overlap_is_no_match():
    assert match([LabelledBox((0, 0, 10, 10), 0)], [found((0, 0, 10, 4.9))]) == [None]
    assert match([LabelledBox((0, 0, 10, 10), 0)], [found((0, 0, 10, 5))]) == [0]


def test_pictures_without_labels_or_without_detections_match_nothing():
    assert match([], [found((0, 0, 10, 10))]) == []
    assert match([LabelledBox((0, 0, 10, 10), 0)], []) == [None]


@pytest.mark.parametrize(
    ("size_px", "name"), [(8, "<16"), (16, "16–24"), (23.9, "16–24"), (24, "24–32"), (32, "32–64"), (64, "≥64")]
)
def test_size_bins_are_half_open(size_px, name):
    assert size_bin(size_px) == name


def test_balanced_accuracy_counts_classes_alike():
    assert balanced_accuracy([[9, 1], [1, 1]]) == pytest.approx(0.7)
    assert balanced_accuracy([[9, 1], [0, 0]]) is None


def test_a_summary_of_known_outcomes():
    results = SceneResults()
    results.add(
        [
            LabelledBox((0, 0, 30, 30), 0),
            LabelledBox((100, 0, 130, 30), 1),
            LabelledBox((200, 0, 230, 30), 1, worn_wrongly=True),
            LabelledBox((300, 0, 330, 30), 0),
            LabelledBox((400, 0, 410, 10), 1),
        ],
        [
            found((0, 0, 30, 30), p_with_mask=0.9),
            found((100, 0, 130, 30), p_with_mask=0.55),  # uncertain, and wrong by its larger probability
            found((200, 0, 230, 30), p_with_mask=0.1),
            found((400, 0, 410, 10), p_with_mask=0.9),  # wrong, but too small to judge by
            found((600, 0, 650, 50)),  # no face there
        ],
    )
    summary = results.summary()
    assert summary["recall"] == pytest.approx(4 / 5)
    assert summary["precision"] == pytest.approx(4 / 5)
    judged = summary["judged"]
    assert (judged["labelled"], judged["matched"]) == (4, 3)
    assert judged["confusion"] == [[1, 0], [1, 1]]
    assert judged["balanced_accuracy"] == pytest.approx(0.75)
    assert judged["uncertain_share"] == pytest.approx(1 / 3)
    assert judged["certain_balanced_accuracy"] == 1
    assert judged["worn_wrongly"] == {"matched": 1, "called_without_mask": 1}
    assert summary["sizes"]["<16"]["recall"] == 1
    assert summary["sizes"]["16–32"]["recall"] == pytest.approx(3 / 4)
    assert summary["sizes"]["≥32"]["recall"] is None
    json.dumps(summary)  # machines read it


def test_every_picture_is_analysed_and_an_unreadable_one_named(tmp_path, write_scene):
    write_scene(tmp_path, "a", [("with_mask", (10, 10, 50, 50))])
    write_scene(tmp_path, "b", [("without_mask", (10, 10, 50, 50))])
    write_scene(tmp_path, "broken", [("without_mask", (10, 10, 50, 50))])
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG nothing more")
    shapes, steps = [], []

    def analyze(image_rgb):
        shapes.append((image_rgb.shape, image_rgb.dtype))
        return [found((10, 10, 50, 50))]

    results = evaluate_scenes(tmp_path, analyze, 10**6, on_image=lambda done, total: steps.append((done, total)))
    assert shapes == [((120, 200, 3), np.uint8)] * 2
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert [name for name, _ in results.unreadable] == ["broken.png"]
    summary = results.summary()
    assert (summary["images"], summary["labelled_faces"], summary["recall"]) == (2, 2, 1)
    assert summary["judged"]["confusion"] == [[1, 0], [1, 0]]


def test_a_folder_that_is_no_scene_folder_is_one_line(tmp_path):
    with pytest.raises(MaskwatchError, match="is no scene folder: it needs images/ and annotations/"):
        evaluate_scenes(tmp_path, lambda image_rgb: [], 10**6)


def test_figures_of_a_classifier_alone(tmp_path, write_faces, write_scene):
    pytest.importorskip("sklearn", reason="the `train` layer is not installed")
    write_faces(tmp_path / "faces", {"with_mask": 3, "without_mask": 2})
    write_scene(
        tmp_path / "scenes", "a", [("without_mask", (10, 10, 30, 30)), ("mask_weared_incorrect", (60, 10, 84, 36))]
    )
    samples = load([tmp_path / "faces", tmp_path / "scenes"]).samples
    sizes: list[tuple[int, ...]] = []

    def always_with_mask(crops):
        sizes.extend(crop.shape[:2] for crop in crops)
        return np.tile(np.float32([0.9, 0.1]), (len(crops), 1))

    figures = evaluate_faces(samples, always_with_mask)
    # Pictures of class folders whole, faces of scenes widened by a quarter, to whole pixels.
    assert sizes == [(48, 40)] * 5 + [(26, 26), (34, 30)]
    assert figures["all"] == {"faces": 7, "balanced_accuracy": 0.5, "confusion": [[3, 0], [4, 0]]}
    assert figures["sizes"]["16–24"] == {"faces": 1, "balanced_accuracy": None, "confusion": [[0, 0], [1, 0]]}
    assert figures["report"]["with_mask"]["precision"] == pytest.approx(3 / 7)
    assert "without_mask" in figures["report_text"]
    json.dumps(figures)


@pytest.mark.parametrize("command", ["train", "evaluate scenes", "evaluate faces"])
def test_help_loads_no_model_runtime(command):
    code = (
        "import sys; from common.cli import cli; "
        f"cli({command.split()!r} + ['--help'], standalone_mode=False); "
        "sys.exit(sorted({'tensorflow', 'onnxruntime', 'cv2', 'sklearn'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Example:" in result.stdout
