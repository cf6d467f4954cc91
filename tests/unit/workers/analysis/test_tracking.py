"""Faces become tracks: whose face goes on as whose, for how long, and when it is somebody else's."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain import Face, MaskStatus
from workers.analysis.tracking import LONGEST_GAP_SECONDS, FaceTracker

SIZE = 60.0
#: Pixels per second of someone who walks at 1.4 m/s across the view, by a face of 0.22 m.
WALK = SIZE * 1.4 / 0.22

places = st.tuples(st.floats(0, 1920), st.floats(0, 1080), st.floats(0, 300))
videos = st.lists(st.lists(places, max_size=6), max_size=12)


def face(x: float, y: float = 300.0, size: float = SIZE) -> Face:
    """A face by its middle and its height, pixels."""
    w, h = size * 0.75 / 2, size / 2
    return Face(x - w, y - h, x + w, y + h, 0.9, 0.5, 0.5, MaskStatus.UNCERTAIN)


def track(frames: list[list[Face]], per_second: float = 1.0) -> list[list[int]]:
    tracker = FaceTracker(per_second)
    return [tracker.update(faces, number / per_second) for number, faces in enumerate(frames)]


@pytest.mark.parametrize("per_second", [0.1, 1, 2, 10, 30])
def test_who_stands_keeps_one_track(per_second: float) -> None:
    wobble = [0, 2, -1, 1, -2]
    assert track([[face(500 + dx, size=SIZE + dx)] for dx in wobble], per_second) == [[1]] * 5


@pytest.mark.parametrize("per_second", [1, 2, 10])
def test_two_that_stand_apart_keep_two_whatever_their_order(per_second: float) -> None:
    near, far = face(300), face(900)
    assert track([[near, far], [far, near], [near, far]], per_second) == [[1, 2], [2, 1], [1, 2]]


@pytest.mark.parametrize("per_second", [1, 2, 5, 10])
def test_who_walks_across_the_view_is_one(per_second: int) -> None:
    frames = [[face(100 + WALK * n / per_second)] for n in range(4 * per_second)]
    assert track(frames, per_second) == [[1]] * len(frames)


def test_nobody_runs_that_fast() -> None:
    """The negative control: what links a walker at one frame a second doesn't at ten."""
    frames = [[face(100)], [face(100 + WALK)]]
    assert track(frames, 1) == [[1], [1]]
    assert track(frames, 10) == [[1], [2]]


@pytest.mark.parametrize("per_second", [1, 2, 5, 10])
def test_who_comes_to_the_camera_is_one(per_second: int) -> None:
    """From 10 m to 3 m at 1.4 m/s: the face grows to more than three times its size."""
    frames = [
        [face(960, 540 - 600 / away, 300 / away)] for n in range(5 * per_second) for away in [10 - 1.4 * n / per_second]
    ]
    assert track(frames, per_second) == [[1]] * len(frames)


@pytest.mark.parametrize("per_second", [1, 2, 10])
def test_a_leaver_and_a_later_comer_are_two(per_second: int) -> None:
    frames = [[face(500)], *([[]] * (4 * per_second)), [face(500)]]
    assert track(frames, per_second) == [[1], *([[]] * (4 * per_second)), [2]]


def test_who_comes_in_where_someone_just_walked_out_is_another() -> None:
    out = [[face(1800 + WALK * n / 10)] for n in range(4)]
    assert track([*out, *([[]] * 10), [face(1850)]], 10)[-1] == [2]


@pytest.mark.parametrize("per_second", [0.5, 1, 2, 5, 10])
def test_a_gap_is_bridged_as_long_as_allowed_and_no_longer(per_second: float) -> None:
    # So many frames later the face may be there again; one frame may be missed at any rate.
    frames = max(int(LONGEST_GAP_SECONDS * per_second), 2)
    here = [face(500)]
    assert track([here, *([[]] * (frames - 1)), here], per_second)[-1] == [1]
    assert track([here, *([[]] * frames), here], per_second)[-1] == [2]


def test_who_is_missed_while_walking_is_found_where_they_would_be() -> None:
    frames = [[face(100 + WALK * n)] for n in range(5)]
    frames[3] = []
    assert track(frames) == [[1], [1], [1], [], [1]]


def test_two_that_cross_keep_their_tracks() -> None:
    """Each goes on as they went, though at the middle the other is as near as they are."""
    frames = [[face(300 + 50 * n, 300), face(900 - 50 * n, 320)] for n in range(12)]
    assert track(frames, 10) == [[1, 2]] * 12


def test_a_face_of_another_size_is_somebody_else() -> None:
    assert track([[face(500, size=30)], [face(500, size=120)]]) == [[1], [2]]


def test_the_nearest_goes_on() -> None:
    for order in permutations([face(510), face(560), face(700)]):
        _, after = track([[face(500)], list(order)])
        assert [n for n, found in zip(after, order, strict=True) if n == 1 and found == face(510)] == [1]
        assert sorted(after) == [1, 2, 3]


def test_frames_without_faces_are_no_tracks() -> None:
    assert track([[], [], [face(500)], []]) == [[], [], [1], []]


def test_frames_of_one_time_break_nothing() -> None:
    tracker = FaceTracker(1)
    assert [tracker.update([face(500)], at) for at in (0.0, 0.0, 0.0, 1.0)] == [[1]] * 4


@given(videos, st.sampled_from([0.1, 1.0, 10.0]))
def test_every_face_has_a_track_of_its_own_in_its_frame(
    video: list[list[tuple[float, float, float]]], rate: float
) -> None:
    frames = [[face(*place) for place in frame] for frame in video]
    found = track(frames, rate)
    assert [len(ids) for ids in found] == [len(frame) for frame in frames]
    assert all(len(set(ids)) == len(ids) for ids in found)
    # Numbered without gaps in the order in which they begin.
    begun = list(dict.fromkeys(number for ids in found for number in ids))
    assert begun == list(range(1, len(begun) + 1))
    assert track(frames, rate) == found


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="valid: above 0"):
        FaceTracker(rate)


def test_it_needs_neither_queue_nor_database() -> None:
    code = (
        "import sys, workers.analysis.tracking;"
        "print([m for m in ('celery', 'sqlalchemy', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
