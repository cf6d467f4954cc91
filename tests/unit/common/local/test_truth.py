"""Matching stored faces to the truth, and what is counted."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.domain import MaskStatus, MaskwatchError, Reason
from common.local.truth import (
    BadObject,
    Box,
    StoredFace,
    TrueCamera,
    TrueFace,
    TruePicture,
    Truth,
    compare_with_truth,
    iou,
    match,
)

WITH, WITHOUT, UNCERTAIN = MaskStatus.WITH_MASK, MaskStatus.WITHOUT_MASK, MaskStatus.UNCERTAIN
KEY = "lobby/door/1.jpg"


def truth_of(*faces: TrueFace) -> Truth:
    picture = TruePicture(
        KEY, "lobby", "door", datetime(2026, 3, 28, 9), datetime(2026, 3, 28, 8, tzinfo=UTC), tuple(faces)
    )
    camera = TrueCamera("lobby", "door", "Europe/Berlin", "lobby/door/", "lobby/door/%H.jpg")
    bad = (BadObject("a.jpg", Reason.EMPTY_FILE, "empty"), BadObject("notes.txt", None, "no picture"))
    return Truth(7, (camera,), (picture,), bad)


def box(x: float, size: float = 40) -> Box:
    return (x, 0.0, x + size, size)


def test_iou() -> None:
    assert iou(box(0), box(0)) == 1
    assert iou(box(0), box(20)) == pytest.approx(1 / 3)
    assert iou(box(0), box(40)) == 0
    assert iou(box(0), (0, 50, 40, 90)) == 0


def test_match_is_greedy_and_one_to_one() -> None:
    # The stored box at 2 fits both true ones; the better pair wins, and the other true face stays unmatched.
    assert list(match([box(0), box(10)], [box(2)])) == [(0, 0)]
    assert sorted(match([box(0), box(10)], [box(9), box(1)])) == [(0, 1), (1, 0)]
    assert list(match([box(0)], [box(14)])) == []
    assert list(match([], [box(0)])) == list(match([box(0)], [])) == []


def test_counts() -> None:
    truth = truth_of(
        TrueFace(box(0), WITH), TrueFace(box(100), WITH), TrueFace(box(200), WITHOUT), TrueFace(box(300), WITHOUT),
        TrueFace(box(400, 20), WITH), TrueFace(box(500, 20), WITH),
    )  # fmt: skip
    stored = [
        StoredFace(KEY, box(1), WITH),
        StoredFace(KEY, box(101), UNCERTAIN),
        StoredFace(KEY, box(201), WITH),
        StoredFace(KEY, box(401, 20), WITHOUT),  # small: found, and its label is in no share
        StoredFace(KEY, box(700), WITH),
        StoredFace("lobby/door/unknown.jpg", box(0), WITH),
    ]
    report = compare_with_truth(stored, truth)
    assert (report.faces, report.found, report.labelled_right) == (4, 3, 1)
    assert (report.small_faces, report.small_found, report.extra) == (2, 1, 2)
    assert report.confusion == {
        "with_mask": {"with_mask": 1, "without_mask": 0, "uncertain": 1},
        "without_mask": {"with_mask": 1, "without_mask": 0, "uncertain": 0},
    }
    assert report.as_dict()["found_share"] == 0.75
    assert report.as_dict()["labelled_right_share"] == pytest.approx(1 / 3)
    assert ("found (IoU ≥ 0.5)", "3 of 4 (75.0%)") in report.table()
    assert ("  without mask, labelled with mask", "1") in report.table()


def test_nothing_to_find_is_no_share() -> None:
    report = compare_with_truth([], truth_of())
    assert (report.found_share, report.labelled_right_share) == (None, None)
    assert ("found (IoU ≥ 0.5)", "none to find") in report.table()


def test_truth_survives_its_file(tmp_path: Path) -> None:
    truth = truth_of(TrueFace((0.5, 1, 30, 40), WITHOUT))
    truth.save(tmp_path / "truth.json")
    assert Truth.load(tmp_path / "truth.json") == truth


def test_missing_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(MaskwatchError, match=r"no truth at .*truth\.json"):
        Truth.load(tmp_path / "truth.json")
