"""The sample footage: the same for the same seed, true to its truth, and with faces a detector finds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from PIL import Image

from common.domain import MaskStatus, PermanentJobError, Reason
from common.sample import walkers
from common.sample.footage import DAYS, TIME_ZONES, make_footage, schedule
from common.sample.ground_truth import GroundTruth, StoredFace, TruePicture, compare_with_ground_truth
from common.storage.blocks import BlockReader
from tests.pipelines import default_spec
from workers.detection.centerface import load_centerface
from workers.inference import Runtime
from workers.media.containers import VideoFile

PER_CAMERA = 12


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GroundTruth]:
    out = tmp_path_factory.mktemp("footage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walkers, "SECONDS", 8)  # what a whole one shows is tested with the walkers
        return out, make_footage(out, images_per_camera=PER_CAMERA)


def photographs(truth: GroundTruth) -> list[TruePicture]:
    return [picture for picture in truth.pictures if picture.key.endswith(".jpg")]


def test_truth_lists_every_object(footage: tuple[Path, GroundTruth]) -> None:
    out, truth = footage
    files = {path.relative_to(out / "bucket").as_posix() for path in (out / "bucket").rglob("*") if path.is_file()}
    listed = [picture.key for picture in photographs(truth)] + [video.key for video in truth.videos]
    assert sorted(files) == sorted(listed + [bad.key for bad in truth.bad_objects])
    assert GroundTruth.load(out / "truth.json") == truth


def test_three_cameras_two_locations_two_days(footage: tuple[Path, GroundTruth]) -> None:
    _, truth = footage
    assert len(truth.cameras) == 4
    for camera in truth.cameras[:3]:
        pictures = [picture for picture in truth.pictures if picture.key.startswith(camera.prefix)]
        assert len(pictures) == PER_CAMERA
        assert {picture.local_time.date() for picture in pictures} == set(DAYS)
        assert {(picture.location, picture.camera) for picture in pictures} == {(camera.location, camera.name)}
    assert {camera.location for camera in truth.cameras} == set(TIME_ZONES)


def test_keys_and_instants_agree_with_the_local_time(footage: tuple[Path, GroundTruth]) -> None:
    _, truth = footage
    patterns = {(camera.location, camera.name): camera.time_pattern for camera in truth.cameras}
    for picture in photographs(truth):
        zone = ZoneInfo(TIME_ZONES[picture.location])
        read = datetime.strptime(picture.key, patterns[picture.location, picture.camera]).replace(tzinfo=zone)
        assert read == picture.observed_at
        assert picture.observed_at.astimezone(zone).replace(tzinfo=None) == picture.local_time
    offsets = {picture.local_time - picture.observed_at.replace(tzinfo=None) for picture in truth.pictures}
    assert offsets == {timedelta(hours=1), timedelta(hours=2), timedelta(hours=5.5)}


def test_times_are_distinct_and_in_order() -> None:
    times = schedule(np.random.default_rng(1), 200)
    assert times == sorted(set(times))
    berlin = ZoneInfo("Europe/Berlin")
    instants = [time.replace(tzinfo=berlin).astimezone(UTC) for time in times]
    assert all(
        instant.astimezone(berlin).replace(tzinfo=None) == time for instant, time in zip(instants, times, strict=True)
    )


def test_frames_of_the_video(footage: tuple[Path, GroundTruth]) -> None:
    _, truth = footage
    (video,) = truth.videos
    frames = [picture for picture in truth.pictures if picture.key == video.key]
    assert video.key.startswith(truth.cameras[3].prefix)
    assert [frame.offset_seconds for frame in frames] == [float(second) for second in range(8)]
    start = frames[0].observed_at
    zone = ZoneInfo(TIME_ZONES[frames[0].location])
    assert datetime.strptime(video.key, truth.cameras[3].time_pattern).replace(tzinfo=zone) == start
    assert all(frame.observed_at - start == timedelta(seconds=frame.offset_seconds) for frame in frames)
    assert all(picture.offset_seconds == 0 and picture.ignored == () for picture in photographs(truth))


def test_faces_lie_inside_and_apart(footage: tuple[Path, GroundTruth]) -> None:
    out, truth = footage
    for picture in photographs(truth):
        with Image.open(out / "bucket" / picture.key) as image:
            width, height = image.size
        assert 1 <= len(picture.faces) <= 6
        for index, face in enumerate(picture.faces):
            x1, y1, x2, y2 = face.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert 17 <= face.size_px <= 201
            for other in picture.faces[:index]:
                a, b = face.box, other.box
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_both_labels_at_both_locations(footage: tuple[Path, GroundTruth]) -> None:
    _, truth = footage
    seen = {(picture.location, face.label) for picture in truth.pictures for face in picture.faces}
    assert seen == {
        (location, label) for location in TIME_ZONES for label in (MaskStatus.WITH_MASK, MaskStatus.WITHOUT_MASK)
    }


def test_bad_objects_are_bad(footage: tuple[Path, GroundTruth]) -> None:
    out, truth = footage
    by_reason = {bad.reason: out / "bucket" / bad.key for bad in truth.bad_objects}
    assert by_reason[Reason.EMPTY_FILE].stat().st_size == 0
    with Image.open(by_reason[Reason.TRUNCATED_IMAGE]) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    assert by_reason[None].suffix == ".txt"
    content = by_reason[Reason.UNREADABLE_VIDEO].read_bytes()
    with (
        BlockReader(lambda a, b: content[a:b], len(content), block_bytes=2**16, cached_blocks=8, tries=1) as reader,
        pytest.raises(PermanentJobError) as caught,
    ):
        VideoFile(reader, max_pixels=10**7, threads=1)
    assert caught.value.reason is Reason.UNREADABLE_VIDEO


def test_same_seed_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walkers, "SECONDS", 2)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_footage(tmp_path / name, seed=seed, images_per_camera=1)
    contents = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in "abc"
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_the_detector_finds_the_faces_where_the_truth_says(footage: tuple[Path, GroundTruth]) -> None:
    out, truth = footage
    detector = load_centerface(default_spec(), Runtime(threads=2))
    stored = []
    truth = replace(truth, pictures=tuple(photographs(truth)))
    for picture in truth.pictures:
        with Image.open(out / "bucket" / picture.key) as image:
            boxes = detector.detect(np.asarray(image.convert("RGB"))).boxes_xyxy.tolist()
        stored += [StoredFace(picture.key, tuple(box), MaskStatus.UNCERTAIN) for box in boxes]
    report = compare_with_ground_truth(stored, truth)
    assert report.faces >= 50
    assert report.found_share is not None
    assert report.found_share >= 0.98
    assert report.extra <= 0.03 * report.faces
