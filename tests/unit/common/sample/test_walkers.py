"""The filmed corridor: its frames are the ones that are analysed, and show what the ground truth says."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from common.domain import MaskStatus, SampleMode
from common.sample import people, walkers
from common.sample.ground_truth import (
    MIN_SIZE_PX,
    GroundTruth,
    StoredFace,
    TrueImage,
    TrueVideo,
    compare_with_ground_truth,
    iou,
)
from common.sample.scenes import FILMED
from common.sample.walkers import Shown, cast, film
from tests.pipelines import default_spec
from workers.detection.centerface import load_centerface
from workers.inference import Runtime
from workers.media.containers import VideoFile
from workers.media.frames import to_rgb
from workers.media.sampling import Grid, Sampler

SCENE = FILMED["lobby", "corridor"]
START = datetime(2026, 3, 28, 9, 15, tzinfo=UTC)


class Bytes(io.BytesIO):
    """A file in memory, as a reader of videos wants it."""

    error: Exception | None = None

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.size = len(data)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Shown]]:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    shown = film(path, SCENE, lambda seconds: f"corridor {int(seconds)}", np.random.default_rng(7))
    return path.read_bytes(), shown


def test_what_the_file_says_of_itself(filmed: tuple[bytes, list[Shown]]) -> None:
    content, _ = filmed
    assert len(content) < 2 * 10**6
    video = VideoFile(Bytes(content), max_pixels=10**6, threads=1)
    info = video.info()
    assert (info.codec, info.width, info.height) == ("h264", SCENE.width, SCENE.height)
    assert info.duration_seconds == walkers.SECONDS
    assert info.frame_rate == walkers.FRAMES_PER_SECOND
    assert info.created_at is None  # its key tells the time
    assert int(video.stream.codec_context.colorspace) == 1  # BT.709
    video.close()


def test_the_detector_finds_the_faces_where_they_were_drawn(filmed: tuple[bytes, list[Shown]]) -> None:
    content, shown = filmed
    spec = default_spec()
    detector = load_centerface(spec, Runtime(threads=1))
    stored, offsets = [], []
    video = VideoFile(Bytes(content), max_pixels=10**6, threads=1)
    for sample in Sampler(video, Grid.of(spec), SampleMode.FRAMES, 0, None):
        at = float(sample.at)
        offsets.append(at)
        for box in detector.detect(to_rgb(sample.frame)).boxes_xyxy.tolist():
            stored.append(StoredFace("film.mp4", tuple(box), MaskStatus.UNCERTAIN, at))
    video.close()
    # The frames of the ground truth are those that are analysed.
    assert offsets == [one.offset_seconds for one in shown] == [float(second) for second in range(walkers.SECONDS)]
    frames = tuple(
        TrueImage(
            "film.mp4", "lobby", "corridor", START.replace(tzinfo=None), START + timedelta(seconds=one.offset_seconds),
            one.faces, one.offset_seconds, one.ignored,
        )
        for one in shown
    )  # fmt: skip
    film_ground_truth = TrueVideo("film.mp4", walkers.SECONDS, walkers.FRAMES_PER_SECOND, walkers.VISITS)
    report = compare_with_ground_truth(stored, GroundTruth(7, (), frames, (), (film_ground_truth,)))
    assert report.faces >= 40
    assert report.found_share is not None and report.found_share >= 0.97
    assert report.extra <= 1


@pytest.mark.parametrize("seed", range(5))
def test_everyone_comes_is_seen_and_leaves(seed: int) -> None:
    crowd = cast(np.random.default_rng(seed))
    assert len(crowd) == walkers.VISITS
    assert sum(walker.appearance.mask is not None for walker in crowd) == walkers.VISITS // 2
    assert len({walker.appearance.coat for walker in crowd}) == walkers.VISITS
    seen = dict.fromkeys(crowd, 0)
    for second in range(walkers.SECONDS):
        persons = walkers._present(crowd, second, SCENE)
        told = walkers._told(second, persons, SCENE)
        assert len(told.faces) + len(told.ignored) <= len(persons) <= 4
        for walker in crowd:
            person = walker.at(second, SCENE)
            seen[walker] += person is not None and person.face in told.faces and person.face.size_px >= MIN_SIZE_PX
        for face in told.faces:
            assert 18 <= face.size_px <= 150
            assert face.box[0] >= 0 and face.box[2] <= SCENE.width
            assert face.box[1] >= 0 and face.box[3] <= SCENE.height
            assert all(iou(face.box, other.box) == 0 for other in told.faces if other is not face)
    # Often enough to be followed from frame to frame.
    assert min(seen.values()) >= 5


@pytest.mark.parametrize("seed", range(5))
def test_nobody_appears_or_disappears_in_the_middle_of_the_frame(seed: int) -> None:
    for walker in cast(np.random.default_rng(seed)):
        first, last = walker.way[0], walker.way[-1]
        for stop, moment in ((first, first.seconds), (last, last.seconds - 1e-6)):
            person = walker.at(moment, SCENE)
            assert person is not None
            left, right = walkers._columns(person, SCENE)
            body = person.placed((30.0, 0.0, 367.0, float(people.FIGURE_SIZE[1])))
            assert body[2] <= left or body[0] >= right, stop
        assert walker.at(first.seconds - 0.1, SCENE) is None
        assert walker.at(last.seconds, SCENE) is None


def test_cut_off_faces_are_ignored_in_what_is_seen_of_them() -> None:
    crowd = cast(np.random.default_rng(7))
    edges = []
    for tenth in range(walkers.SECONDS * 10):
        told = walkers._told(tenth / 10, walkers._present(crowd, tenth / 10, SCENE), SCENE)
        edges += [box for box in told.ignored if box[0] == 0 or box[2] == SCENE.width]
        assert all(0 <= box[0] < box[2] <= SCENE.width for box in told.ignored)
    assert edges


def test_a_frame_lies_on_whole_seconds() -> None:
    assert Fraction(walkers.FRAMES_PER_SECOND, walkers.TOLD_PER_SECOND).denominator == 1
    assert default_spec().sample_fps == walkers.TOLD_PER_SECOND


def test_the_same_generator_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walkers, "SECONDS", 2)
    contents = []
    for number, seed in enumerate((1, 1, 2)):
        film(tmp_path / f"{number}.mp4", SCENE, lambda seconds: "corridor", np.random.default_rng(seed))
        contents.append((tmp_path / f"{number}.mp4").read_bytes())
    assert contents[0] == contents[1] != contents[2]
