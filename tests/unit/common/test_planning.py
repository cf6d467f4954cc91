"""When a picture was taken and what can't be planned: pure rules, with the clocks' odd hours."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.domain import (
    MaskwatchError,
    MediaKind,
    ModelRef,
    ObjectInfo,
    ObservedAt,
    ObservedAtSource,
    PipelineSpec,
    Reason,
    SampleMode,
    TimeRange,
)
from common.planning import chunk_ranges, media_kind, plan_object
from common.timestamps import LocalTimeError, TimePattern, observed_from_file, recording_start, resolve_local, zone

BERLIN = ZoneInfo("Europe/Berlin")
MODIFIED = datetime(2026, 7, 1, 12, tzinfo=UTC)


def info(key: str) -> ObjectInfo:
    return ObjectInfo("s3://footage", key, "etag", 10, MODIFIED)


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("cam1/%Y/%m/%d/%H-%M-%S.jpg", "a/cam1/2026/03/01/08-15-30.jpg", datetime(2026, 3, 1, 8, 15, 30)),
        ("%Y%m%d_%H%M%S*.jpg", "x/20260301_081530_door.jpg", datetime(2026, 3, 1, 8, 15, 30)),
        ("%Y-%j/%H.png", "2026-060/07.png", datetime(2026, 3, 1, 7)),
        ("*/%Y/%m/%d/%Y-%m-%d.jpg", "any/2026/03/01/2026-03-01.jpg", datetime(2026, 3, 1)),
        ("*/%Y/%m/%d/%Y-%m-%d.jpg", "any/2026/03/01/2026-03-02.jpg", None),
        ("%Y%m%d.jpg", "20261301.jpg", None),
        ("%Y%m%d.jpg", "20260301.jpg\n", None),
        ("%Y%m%d.jpg", "x20260301.jpg", None),
        ("%Y%m%d.jpg", "20260301.jpg.bak", None),
        ("a.b/%Y%m%d", "axb/20260301", None),
    ],
)
def test_time_patterns(pattern: str, key: str, expected: datetime | None) -> None:
    assert TimePattern(pattern).match(key) == expected


def test_a_pattern_with_an_offset_gives_an_aware_time() -> None:
    found = TimePattern("%Y%m%dT%H%M%S%z.jpg").match("20260301T081530+0530.jpg")
    assert found == datetime(2026, 3, 1, 8, 15, 30, tzinfo=timezone(timedelta(hours=5.5)))
    assert found is not None and resolve_local(found, BERLIN) == (found, False)


@pytest.mark.parametrize(
    ("pattern", "named"), [("cam/%Q.jpg", "%Q"), ("cam/%H.jpg", "must hold a date"), ("x", "date")]
)
def test_a_bad_pattern_says_what_is_wrong(pattern: str, named: str) -> None:
    with pytest.raises(MaskwatchError, match=named):
        TimePattern(pattern)


@given(st.datetimes(datetime(2000, 1, 1), datetime(2037, 1, 1)))
def test_every_local_time_is_an_instant_that_reads_the_same_or_an_error(local: datetime) -> None:
    try:
        instant, ambiguous = resolve_local(local, BERLIN)
    except LocalTimeError:
        assert local.month == 3 and local.hour == 2
        return
    assert instant.astimezone(BERLIN).replace(tzinfo=None) == local
    assert not ambiguous or (local.month == 10 and local.hour == 2)


def test_clocks_set_back_take_the_first_and_say_so() -> None:
    assert resolve_local(datetime(2026, 10, 25, 2, 30), BERLIN) == (datetime(2026, 10, 25, 0, 30, tzinfo=UTC), True)
    assert resolve_local(datetime(2026, 10, 25, 3, 30), BERLIN) == (datetime(2026, 10, 25, 2, 30, tzinfo=UTC), False)


def test_clocks_set_forward_skip_an_hour() -> None:
    with pytest.raises(LocalTimeError, match="2026-03-29 02:30:00 does not exist in Europe/Berlin"):
        resolve_local(datetime(2026, 3, 29, 2, 30), BERLIN)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("a/b.JPG", MediaKind.IMAGE),
        ("b.tiff", MediaKind.IMAGE),
        ("gate/2026.MP4", MediaKind.VIDEO),
        ("a.m2ts", MediaKind.VIDEO),
        ("a.gif", MediaKind.VIDEO),
        ("notes.txt", None),
        ("a.jpg/readme", None),
        ("jpg", None),
        ("nas/@eaDir/gate.jpg/SYNOPHOTO_THUMB_M.jpg", None),
        ("#recycle/old.jpg", None),
        ("$RECYCLE.BIN/S-1-5/a.mp4", None),
        ("usb/System Volume Information/a.jpg", None),
        ("dcim/._a.jpg", None),
        ("__MACOSX/dcim/a.jpg", None),
        ("recycle/a.jpg", MediaKind.IMAGE),
        ("._/a.jpg", MediaKind.IMAGE),
    ],
)
def test_media_kinds(key: str, kind: MediaKind | None) -> None:
    assert media_kind(key) == kind


def test_objects_that_cannot_be_placed_in_time_keep_their_reason() -> None:
    pattern = TimePattern("%Y/%m/%d/%H-%M-%S.jpg")
    assert plan_object(info("notes.txt"), pattern, BERLIN) is None
    fine = plan_object(info("2026/03/01/08-00-00.jpg"), pattern, BERLIN)
    assert fine is not None and fine.reason is None and fine.best_known_time == datetime(2026, 3, 1, 7, tzinfo=UTC)
    other = plan_object(info("latest.jpg"), pattern, BERLIN)
    assert other is not None and other.reason is Reason.TIME_PATTERN_MISMATCH and "latest.jpg" in (other.detail or "")
    skipped = plan_object(info("2026/03/29/02-30-00.jpg"), pattern, BERLIN)
    assert skipped is not None and skipped.reason is Reason.NONEXISTENT_LOCAL_TIME
    unknown = plan_object(info("latest.jpg"), None, BERLIN)
    assert unknown is not None and unknown.observed_at is None and unknown.best_known_time == MODIFIED


def test_the_order_of_sources_of_time() -> None:
    planned = ObservedAt(datetime(2026, 1, 1, tzinfo=UTC), ObservedAtSource.KEY_PATTERN)
    exif = datetime(2026, 6, 1, 14)
    assert observed_from_file(planned, exif, MODIFIED, BERLIN) is planned
    found = observed_from_file(None, exif, MODIFIED, BERLIN)
    assert (found.instant, found.source) == (datetime(2026, 6, 1, 12, tzinfo=UTC), ObservedAtSource.EXIF)
    aware = exif.replace(tzinfo=timezone(timedelta(hours=9)))
    assert observed_from_file(None, aware, MODIFIED, BERLIN).instant == datetime(2026, 6, 1, 5, tzinfo=UTC)
    assert observed_from_file(None, None, MODIFIED, BERLIN).source is ObservedAtSource.LAST_MODIFIED


@pytest.mark.parametrize("exif", [datetime(2026, 3, 29, 2, 30), MODIFIED.replace(tzinfo=None) + timedelta(days=30)])
def test_an_exif_time_that_cannot_be_is_not_believed(exif: datetime) -> None:
    assert observed_from_file(None, exif, MODIFIED, BERLIN) == ObservedAt(MODIFIED, ObservedAtSource.LAST_MODIFIED)


def test_an_unknown_zone_suggests_known_ones() -> None:
    with pytest.raises(MaskwatchError, match="Europe/Berlin"):
        zone("berlin")
    with pytest.raises(MaskwatchError, match="IANA"):
        zone("../../etc/passwd")


def test_ranges_are_half_open_and_aware() -> None:
    start, end = MODIFIED, MODIFIED + timedelta(hours=1)
    within = TimeRange(start, end)
    assert start in within and end not in within and end in TimeRange(start)
    with pytest.raises(ValueError, match="not after"):
        TimeRange(end, start)
    with pytest.raises(ValueError, match="time zone"):
        TimeRange(datetime(2026, 1, 1))


# --- videos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "length", "ranges"),
    [
        (150.0, 60, [(0, 60_000), (60_000, 120_000), (120_000, 180_000)]),
        (120.0, 60, [(0, 60_000), (60_000, 120_000)]),
        (0.04, 60, [(0, 60_000)]),
        (0, 60, [(0, 60_000)]),
        (None, 60, [(0, 60_000)]),
        (5.0, 2.5, [(0, 2500), (2500, 5000)]),
    ],
)
def test_chunks_cover_a_video_without_a_gap(
    duration: float | None, length: float, ranges: list[tuple[int, int]]
) -> None:
    assert chunk_ranges(duration, length) == ranges


KEY_TIME = ObservedAt(datetime(2026, 6, 1, tzinfo=UTC), ObservedAtSource.KEY_PATTERN)
HOUR_BEFORE = MODIFIED - timedelta(hours=1)


@pytest.mark.parametrize(
    ("planned", "created_at", "began"),
    [
        (KEY_TIME, HOUR_BEFORE, KEY_TIME),
        (None, HOUR_BEFORE, ObservedAt(HOUR_BEFORE, ObservedAtSource.CREATION_TIME)),
        # A clock that names its offset, one that was never set, and one that is ahead of the upload.
        (
            None,
            datetime(2026, 7, 1, 13, tzinfo=timezone(timedelta(hours=2))),
            ObservedAt(datetime(2026, 7, 1, 11, tzinfo=UTC), ObservedAtSource.CREATION_TIME),
        ),
        (None, datetime(1970, 1, 1, tzinfo=UTC), ObservedAt(HOUR_BEFORE, ObservedAtSource.LAST_MODIFIED)),
        (None, MODIFIED + timedelta(days=2), ObservedAt(HOUR_BEFORE, ObservedAtSource.LAST_MODIFIED)),
        (None, None, ObservedAt(HOUR_BEFORE, ObservedAtSource.LAST_MODIFIED)),
    ],
)
def test_a_recording_began_when_the_best_source_says(
    planned: ObservedAt | None, created_at: datetime | None, began: ObservedAt
) -> None:
    assert recording_start(planned, created_at, MODIFIED, 3600.0) == began


def test_without_a_length_a_recording_is_placed_by_its_upload() -> None:
    assert recording_start(None, None, MODIFIED, None).instant == MODIFIED


def test_the_default_sampling_leaves_pipelines_what_they_were_before_there_were_videos() -> None:
    spec = PipelineSpec(ModelRef("d", "1" * 64), ModelRef("c", "2" * 64), 0.3, 800, 2.0, 1600, 90, 1.25, 0.6)
    assert not {"sample", "sample_fps"} & set(spec.as_dict())
    assert PipelineSpec.from_dict(spec.as_dict()) == spec
    for other in (replace(spec, sample=SampleMode.KEYFRAMES), replace(spec, sample_fps=2.0)):
        assert PipelineSpec.from_dict(other.as_dict()) == other and other.fingerprint != spec.fingerprint
