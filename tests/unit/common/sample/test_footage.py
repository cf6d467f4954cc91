"""The sample footage: the same for the same seed, agreeing with its ground truth, and with faces a detector finds."""

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
from common.sample.ground_truth import GroundTruth, StoredFace, TrueImage, compare_with_ground_truth
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


def photographs(ground_truth: GroundTruth) -> list[TrueImage]:
    return [image for image in ground_truth.images if image.key.endswith(".jpg")]


def test_the_ground_truth_lists_every_object(footage: tuple[Path, GroundTruth]) -> None:
    out, ground_truth = footage
    files = {path.relative_to(out / "bucket").as_posix() for path in (out / "bucket").rglob("*") if path.is_file()}
    listed = [image.key for image in photographs(ground_truth)] + [video.key for video in ground_truth.videos]
    assert sorted(files) == sorted(listed + [bad.key for bad in ground_truth.bad_objects])
    assert GroundTruth.load(out / "truth.json") == ground_truth


def test_three_cameras_two_locations_two_days(footage: tuple[Path, GroundTruth]) -> None:
    _, ground_truth = footage
    assert len(ground_truth.cameras) == 4
    for camera in ground_truth.cameras[:3]:
        images = [image for image in ground_truth.images if image.key.startswith(camera.prefix)]
        assert len(images) == PER_CAMERA
        assert {image.local_time.date() for image in images} == set(DAYS)
        assert {(image.location, image.camera) for image in images} == {(camera.location, camera.name)}
    assert {camera.location for camera in ground_truth.cameras} == set(TIME_ZONES)


def test_keys_and_instants_agree_with_the_local_time(footage: tuple[Path, GroundTruth]) -> None:
    _, ground_truth = footage
    patterns = {(camera.location, camera.name): camera.time_pattern for camera in ground_truth.cameras}
    for image in photographs(ground_truth):
        zone = ZoneInfo(TIME_ZONES[image.location])
        read = datetime.strptime(image.key, patterns[image.location, image.camera]).replace(tzinfo=zone)
        assert read == image.observed_at
        assert image.observed_at.astimezone(zone).replace(tzinfo=None) == image.local_time
    offsets = {image.local_time - image.observed_at.replace(tzinfo=None) for image in ground_truth.images}
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
    _, ground_truth = footage
    (video,) = ground_truth.videos
    frames = [image for image in ground_truth.images if image.key == video.key]
    assert video.key.startswith(ground_truth.cameras[3].prefix)
    assert [frame.offset_seconds for frame in frames] == [float(second) for second in range(8)]
    start = frames[0].observed_at
    zone = ZoneInfo(TIME_ZONES[frames[0].location])
    assert datetime.strptime(video.key, ground_truth.cameras[3].time_pattern).replace(tzinfo=zone) == start
    assert all(frame.observed_at - start == timedelta(seconds=frame.offset_seconds) for frame in frames)
    assert all(image.offset_seconds == 0 and image.ignored == () for image in photographs(ground_truth))


def test_faces_lie_inside_and_apart(footage: tuple[Path, GroundTruth]) -> None:
    out, ground_truth = footage
    for image in photographs(ground_truth):
        with Image.open(out / "bucket" / image.key) as opened:
            width, height = opened.size
        assert 1 <= len(image.faces) <= 6
        for index, face in enumerate(image.faces):
            x1, y1, x2, y2 = face.box
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert 17 <= face.size_px <= 201
            for other in image.faces[:index]:
                a, b = face.box, other.box
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_both_labels_at_both_locations(footage: tuple[Path, GroundTruth]) -> None:
    _, ground_truth = footage
    seen = {(image.location, face.label) for image in ground_truth.images for face in image.faces}
    assert seen == {
        (location, label) for location in TIME_ZONES for label in (MaskStatus.WITH_MASK, MaskStatus.WITHOUT_MASK)
    }


def test_bad_objects_are_bad(footage: tuple[Path, GroundTruth]) -> None:
    out, ground_truth = footage
    by_reason = {bad.reason: out / "bucket" / bad.key for bad in ground_truth.bad_objects}
    assert by_reason[Reason.EMPTY_FILE].stat().st_size == 0
    with Image.open(by_reason[Reason.TRUNCATED_IMAGE]) as opened, pytest.raises(OSError, match="truncated"):
        opened.load()
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


def test_the_detector_finds_the_faces_where_they_were_drawn(footage: tuple[Path, GroundTruth]) -> None:
    out, ground_truth = footage
    detector = load_centerface(default_spec(), Runtime(threads=2))
    stored = []
    ground_truth = replace(ground_truth, images=tuple(photographs(ground_truth)))
    for image in ground_truth.images:
        with Image.open(out / "bucket" / image.key) as opened:
            boxes = detector.detect(np.asarray(opened.convert("RGB"))).boxes_xyxy.tolist()
        stored += [StoredFace(image.key, tuple(box), MaskStatus.UNCERTAIN) for box in boxes]
    report = compare_with_ground_truth(stored, ground_truth)
    assert report.faces >= 50
    assert report.found_share is not None
    assert report.found_share >= 0.98
    assert report.extra <= 0.03 * report.faces
