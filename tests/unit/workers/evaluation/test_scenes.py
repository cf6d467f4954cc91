from __future__ import annotations

import json

import numpy as np
import pytest

from common.domain import Face, MaskStatus, MaskwatchError
from workers.datasets.annotations import Box, LabelledBox
from workers.evaluation.faces import WORST
from workers.evaluation.scenes import SceneResults, evaluate_scenes

IMAGE = np.zeros((100, 700, 3), np.uint8)


def found(box: Box, p_face: float = 0.9, p_with_mask: float = 0.9) -> Face:
    larger = max(p_with_mask, 1 - p_with_mask)
    named = MaskStatus.WITH_MASK if p_with_mask >= 0.5 else MaskStatus.WITHOUT_MASK
    return Face(*box, p_face, p_with_mask, 1 - p_with_mask, MaskStatus.UNCERTAIN if larger < 0.6 else named)


@pytest.fixture
def results():
    results = SceneResults()
    results.add(
        "street.png",
        IMAGE,
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
            found((600, 0, 650, 50), p_face=0.3),  # no face there
        ],
    )
    return results


def test_a_summary_of_known_outcomes(results):
    summary = results.summary(0.6)
    assert summary["recall"] == pytest.approx(4 / 5)
    assert summary["precision"] == pytest.approx(4 / 5)
    assert summary["average_precision"] == pytest.approx(4 / 5)
    judged = summary["judged"]
    assert (judged["labelled"], judged["matched"]) == (4, 3)
    assert judged["confusion"] == [[1, 0], [1, 1]]
    assert judged["balanced_accuracy"] == pytest.approx(0.75)
    assert judged["uncertain_share"] == pytest.approx(1 / 3)
    assert judged["certain_balanced_accuracy"] == 1
    assert judged["worn_wrongly"] == {"labelled": 1, "matched": 1, "called_without_mask": 1}
    assert summary["sizes"]["<16"]["recall"] == 1
    assert summary["sizes"]["16–32"]["recall"] == pytest.approx(3 / 4)
    assert summary["sizes"]["≥32"]["recall"] is None
    json.dumps(summary)  # machines read it


def test_calibration_and_uncertain_faces_are_those_of_the_judged_size(results):
    summary = results.summary(0.6)
    # Two of them say 0.9 and are right, one says 0.55 and is wrong; the one of 10 px doesn't count.
    assert sum(row["count"] for row in summary["calibration"]["bins"]) == 3
    assert summary["calibration"]["expected_calibration_error"] == pytest.approx((2 * 0.1 + 0.55) / 3)
    assert summary["sizes"]["<16"]["expected_calibration_error"] == pytest.approx(0.9)
    (configured,) = (row for row in summary["uncertain"] if row["configured"])
    assert configured["uncertain_share"] == summary["judged"]["uncertain_share"]
    assert configured["balanced_accuracy"] == summary["judged"]["certain_balanced_accuracy"]


def test_what_went_wrong_is_kept_to_be_looked_at(results):
    assert [mistake.words for mistake in results.missed] == ["missed with_mask, 30 px: street.png"]
    assert [mistake.words for mistake in results.unlabelled] == ["no label, score 0.30, 50 px: street.png"]
    assert [mistake.words for mistake in results.mislabelled] == [
        "without_mask, called with_mask 0.90, 10 px: street.png",
        "without_mask, called with_mask 0.55, 30 px: street.png",
    ]
    # Half as much again, inside the picture; copied, so that the picture isn't kept.
    assert results.missed[0].crop.shape == (38, 46, 3)
    assert not np.shares_memory(results.missed[0].crop, IMAGE)


def test_only_the_worst_are_kept(results):
    for number in range(WORST + 8):
        results.add("x.png", IMAGE, [], [found((0, 0, 20, 20), p_face=0.4 + number / 100)])
    assert len(results.unlabelled) == WORST
    assert results.unlabelled[0].badness == pytest.approx(0.4 + (WORST + 7) / 100)


def test_a_summary_without_a_found_face_has_no_invented_figures():
    results = SceneResults()
    results.add("a.png", IMAGE, [LabelledBox((0, 0, 30, 30), 0)], [])
    summary = results.summary(0.6)
    assert (summary["recall"], summary["precision"], summary["average_precision"]) == (0, None, 0)
    assert summary["calibration"]["expected_calibration_error"] is None
    assert summary["judged"]["balanced_accuracy"] is None


def test_every_image_is_analysed_and_an_unreadable_one_named(tmp_path, write_scene):
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
    summary = results.summary(0.6)
    assert (summary["images"], summary["labelled_faces"], summary["recall"]) == (2, 2, 1)
    assert summary["judged"]["confusion"] == [[1, 0], [1, 0]]


def test_a_folder_that_is_no_scene_folder_is_one_line(tmp_path):
    with pytest.raises(MaskwatchError, match="is not a scene folder: it needs images/ and annotations/"):
        evaluate_scenes(tmp_path, lambda image_rgb: [], 10**6)


def test_an_empty_scene_folder_is_one_line(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    with pytest.raises(MaskwatchError, match="images holds no picture"):
        evaluate_scenes(tmp_path, lambda image_rgb: [], 10**6)


def test_nothing_readable_and_nothing_labelled_are_one_line_each(tmp_path, write_scene):
    write_scene(tmp_path / "empty", "a", [])
    with pytest.raises(MaskwatchError, match="labels no face in 1 pictures: nothing to measure"):
        evaluate_scenes(tmp_path / "empty", lambda image_rgb: [], 10**6)
    write_scene(tmp_path / "broken", "a", [("with_mask", (10, 10, 50, 50))])
    (tmp_path / "broken" / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(MaskwatchError, match=r"none of the 1 pictures in .* can be read; the first is a\.png: "):
        evaluate_scenes(tmp_path / "broken", lambda image_rgb: [], 10**6)
