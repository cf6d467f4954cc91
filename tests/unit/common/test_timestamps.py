"""Which times are times: what a camera can have seen, and what a clock shows that was never set."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from common.domain import MediaKind, ObjectInfo, ObservedAt, ObservedAtSource, PermanentJobError, Reason
from common.planning import plan_object
from common.timestamps import END, FIRST, TimePattern, observed_from_file, recording_start, why_no_time

UPLOADED = datetime(2026, 7, 1, 12, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")
TAKEN = datetime(2024, 5, 1, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    "instant",
    [
        FIRST + timedelta(days=9),
        datetime(1999, 12, 31, tzinfo=UTC),
        datetime(2000, 1, 9, tzinfo=UTC),
        datetime(2001, 1, 1, tzinfo=UTC),
        UPLOADED,
        END - timedelta(seconds=1),
    ],
)
def test_a_time_is_one(instant: datetime) -> None:
    assert why_no_time(instant) is None


@pytest.mark.parametrize(
    "instant",
    [
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(1904, 1, 1, tzinfo=UTC),
        FIRST - timedelta(seconds=1),
        FIRST,
        END,
        datetime(2400, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone(-timedelta(hours=14))),
    ],
)
def test_no_camera_has_seen_anything_then(instant: datetime) -> None:
    assert why_no_time(instant) is not None


@pytest.mark.parametrize("year", [1970, 1980, 2000])
@pytest.mark.parametrize("offset", [-12, 0, 14])
@pytest.mark.parametrize("runs_on", [timedelta(), timedelta(seconds=5), timedelta(days=6, hours=23)])
def test_a_clock_that_was_not_set_runs_on_in_any_zone(year: int, offset: int, runs_on: timedelta) -> None:
    local = datetime(year, 1, 1, tzinfo=timezone(timedelta(hours=offset))) + runs_on
    assert why_no_time(local) is not None


@pytest.mark.parametrize("exif", ["0001-01-01", "0002-03-04", "1904-01-01", "1970-01-01 00:00:12", "1980-01-02"])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC", "America/New_York"])
def test_a_file_whose_clock_was_not_set_counts_at_its_upload(exif: str, zone: str) -> None:
    taken_at = datetime.fromisoformat(exif)
    found = observed_from_file(None, taken_at, UPLOADED, ZoneInfo(zone))
    assert found == ObservedAt(UPLOADED, ObservedAtSource.LAST_MODIFIED)
    found = recording_start(None, taken_at.replace(tzinfo=UTC), UPLOADED, 60)
    assert found == ObservedAt(UPLOADED - timedelta(seconds=60), ObservedAtSource.LAST_MODIFIED)


@pytest.mark.parametrize("uploaded", [datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC), datetime(2400, 1, 1, tzinfo=UTC)])
def test_an_upload_that_is_no_time_leaves_the_others_as_they_are(uploaded: datetime) -> None:
    assert observed_from_file(None, TAKEN.replace(tzinfo=None), uploaded, ZoneInfo("UTC")).instant == TAKEN
    assert recording_start(None, TAKEN, uploaded, 60).instant == TAKEN
    planned = plan_object(ObjectInfo("s3://b", "2024/05/01.jpg", "e", 1, uploaded), TimePattern("%Y/%m/%d.jpg"), BERLIN)
    assert planned is not None and planned.reason is None and planned.observed_at is not None


@pytest.mark.parametrize("uploaded", [FIRST - timedelta(seconds=1), datetime(1980, 1, 1, tzinfo=UTC), END])
def test_what_no_source_can_place_is_told(uploaded: datetime) -> None:
    for placed in (
        lambda: observed_from_file(None, datetime(1970, 1, 1), uploaded, BERLIN),
        lambda: observed_from_file(None, None, uploaded, BERLIN),
        lambda: recording_start(None, FIRST, uploaded, 60),
    ):
        with pytest.raises(PermanentJobError, match=r"nothing says when it was taken.*--time-pattern") as error:
            placed()
        assert error.value.reason is Reason.NO_TIME


@pytest.mark.parametrize(
    ("key", "zone", "fits"),
    [
        ("1970-01-01T00-00-05", "Europe/Berlin", False),  # still 1969 in UTC
        ("1970-01-01T00-00-05", "America/New_York", True),
        ("1969-12-31T23-59-59", "America/New_York", True),  # already 1970 in UTC
        ("2199-12-31T23-59-59", "America/New_York", False),
        ("2200-01-01T00-30-00", "Europe/Berlin", True),
        ("0002-01-01T00-00-00", "UTC", False),
        ("9999-12-31T23-59-59", "America/New_York", False),
    ],
)
def test_a_key_is_judged_by_the_instant_that_it_names(key: str, zone: str, fits: bool) -> None:
    info = ObjectInfo("s3://b", f"{key}.jpg", "e", 1, datetime(2300, 1, 1, tzinfo=UTC))
    planned = plan_object(info, TimePattern("%Y-%m-%dT%H-%M-%S.jpg"), ZoneInfo(zone))
    assert planned is not None and planned.kind is MediaKind.IMAGE
    if fits:
        assert planned.reason is None and planned.observed_at is not None
    else:
        assert planned.reason in (Reason.TIME_PATTERN_MISMATCH, Reason.NONEXISTENT_LOCAL_TIME)
        assert key[:4] in (planned.detail or "")
