"""Matching stored faces to the truth, and what is counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.domain import MaskStatus, MaskwatchError, Reason
from common.sample.ground_truth import (
    BadObject,
    Box,
    GroundTruth,
    StoredFace,
    TrueCamera,
    TrueFace,
    TrueImage,
    TrueVideo,
    compare_with_ground_truth,
    iou,
    match,
)

WITH, WITHOUT, UNCERTAIN = MaskStatus.WITH_MASK, MaskStatus.WITHOUT_MASK, MaskStatus.UNCERTAIN
KEY = "lobby/door/1.jpg"


def ground_truth_of(*faces: TrueFace) -> GroundTruth:
    image = TrueImage(
        KEY, "lobby", "door", datetime(2026, 3, 28, 9), datetime(2026, 3, 28, 8, tzinfo=UTC), tuple(faces)
    )
    camera = TrueCamera("lobby", "door", "Europe/Berlin", "lobby/door/", "lobby/door/%H.jpg")
    bad = (BadObject("a.jpg", Reason.EMPTY_FILE, "empty"), BadObject("notes.txt", None, "no picture"))
    return GroundTruth(7, (camera,), (image,), bad)


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
    ground_truth = ground_truth_of(
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
    report = compare_with_ground_truth(stored, ground_truth)
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


FILM = "lobby/corridor/1.mp4"


def film_of(*frames: TrueImage) -> GroundTruth:
    return GroundTruth(7, (), frames, (), (TrueVideo(FILM, 32.0, 10.0, visits=6),))


def frame(offset_seconds: float, *faces: TrueFace, ignored: tuple[Box, ...] = ()) -> TrueImage:
    start = datetime(2026, 3, 28, 9, tzinfo=UTC) + timedelta(seconds=offset_seconds)
    return TrueImage(
        FILM, "lobby", "corridor", start.replace(tzinfo=None), start, faces, offset_seconds, ignored
    )  # fmt: skip


def test_frames_are_known_by_key_and_time() -> None:
    ground_truth = film_of(frame(0.0, TrueFace(box(0), WITH)), frame(1.0, TrueFace(box(0), WITH)), frame(2.0))
    stored = [
        StoredFace(FILM, box(0), WITH, 1.0000004),
        StoredFace(FILM, box(0), WITH, 2.0),  # has left by then
        StoredFace(FILM, box(0), WITH, 0.5),  # a frame that the truth does not know
        StoredFace(KEY, box(0), WITH),
    ]
    report = compare_with_ground_truth(stored, ground_truth)
    assert (report.images, report.frames) == (0, 3)
    assert (report.faces, report.found, report.extra) == (2, 1, 3)
    assert compare_with_ground_truth([StoredFace(FILM, box(0), WITH)], ground_truth).found == 1


def test_faces_that_are_hidden_in_part_count_neither_way() -> None:
    ground_truth = film_of(frame(0.0, TrueFace(box(0), WITH), ignored=(box(100, 10), box(200))))
    nothing = compare_with_ground_truth([], ground_truth)
    assert (nothing.faces, nothing.found, nothing.extra) == (1, 0, 0)
    stored = [
        StoredFace(FILM, box(0), WITH),
        StoredFace(FILM, box(205), WITHOUT),
        StoredFace(FILM, box(100, 8), WITHOUT),
        StoredFace(FILM, box(100, 40), WITH),  # far larger than what is ignored there
    ]
    report = compare_with_ground_truth(stored, ground_truth)
    assert (report.faces, report.found, report.labelled_right, report.extra) == (1, 1, 1, 1)


def test_visits_are_compared() -> None:
    report = compare_with_ground_truth([], film_of(), counted_visits={FILM: 7, "lobby/corridor/other.mp4": 2})
    assert (report.visits, report.visits_counted) == (6, 7)
    assert ("visits in videos", "6, counted 7") in report.table()
    assert ("visits in videos", "6, counted 0") in compare_with_ground_truth([], film_of(), counted_visits={}).table()
    assert ("visits in videos", "6") in compare_with_ground_truth([], film_of()).table()
    assert not [row for row in compare_with_ground_truth([], ground_truth_of()).table() if row[0].startswith("visits")]


def test_nothing_to_find_is_no_share() -> None:
    report = compare_with_ground_truth([], ground_truth_of())
    assert (report.found_share, report.labelled_right_share) == (None, None)
    assert ("found (IoU ≥ 0.5)", "none to find") in report.table()


def test_ground_truth_survives_its_file(tmp_path: Path) -> None:
    image = ground_truth_of(TrueFace((0.5, 1, 30, 40), WITHOUT))
    film = film_of(frame(1.0, TrueFace((0.5, 1, 30, 40), WITH), ignored=((1.5, 2, 3, 4),)))
    for ground_truth in (image, film):
        ground_truth.save(tmp_path / "truth.json")
        assert GroundTruth.load(tmp_path / "truth.json") == ground_truth


def test_missing_ground_truth_is_named(tmp_path: Path) -> None:
    with pytest.raises(MaskwatchError, match=r"no ground truth at .*truth\.json"):
        GroundTruth.load(tmp_path / "truth.json")
