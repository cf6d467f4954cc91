"""Coverage: what was looked at of a camera, its holes named exactly, and filled."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from common import ledger
from common.database.tables import Camera
from common.domain import FrameFaces, Reason, VideoInfo
from common.reporting.coverage import coverage
from common.settings import get_settings
from producer.submit import fill_gaps, submit
from tests.ledger_rows import claim, coverage_by_both, face, rows, scalar, states, take
from tests.services import Bucket, locate, maskwatch
from workers.jobs.recording import record_chunk, record_image, record_probe
from workers.summaries.aggregation import summarize

#: In New Delhi an hour begins at half past one of UTC's.
ZONE = "Asia/Kolkata"
BEGIN = datetime(2026, 3, 2, 6, 30, tzinfo=UTC)
PATTERN = "cam/%Y-%m-%dT%H%M%S*"
LOCAL = timedelta(hours=5, minutes=30)


def key(at: datetime, suffix: str) -> str:
    return f"{at + LOCAL:cam/%Y-%m-%dT%H%M%S}.{suffix}"


@pytest.fixture
def camera(session: Session, bucket: Bucket) -> str:
    """The source of a camera that should deliver an hour per hour, six hours long, pictures for ten minutes each."""
    locate("cam", zone=ZONE)
    source = f"{bucket.uri}/cam/"
    options = ("--source", source, "--time-pattern", PATTERN, "--cron", "0 0 1 1 *", "--picture-every", "10m")
    done = maskwatch("cameras", "change", "cam", "--location", "lobby", *options, "--expects", "1h")
    assert done.returncode == 0, done.stderr
    session.execute(
        text("UPDATE cameras SET expected_since = :begin, expected_until = :end"),
        {"begin": BEGIN, "end": BEGIN + timedelta(hours=6)},
    )
    session.commit()
    return source


def enqueue(source: str) -> None:
    submit(get_settings(), source, location_name="lobby", camera_name="cam", time_pattern=PATTERN)


def work(session: Session, *, fail: tuple[str, ...] = ()) -> list[str]:
    """Analyse all that is pending, videos of an hour in chunks of twenty minutes; returns their keys."""
    done = []
    while refs := take(session, 50):
        session.commit()
        for job in claim(session, refs):
            seen = job.observed_at
            assert seen is not None
            if job.key in fail and job.range_start_ms in (0, 1_200_000) and job.kind.value != "probe":
                ledger.quarantine(session, job, Reason.UNREADABLE_IMAGE, "planted")
            elif job.kind.value == "image":
                record_image(session, job, [face()], seen)
            elif job.kind.value == "probe":
                info = VideoInfo("mp4", "h264", 64, 48, 1.0, 0, 3600.0, None)
                ranges = [(0, 1_200_000), (1_200_000, 2_400_000), (2_400_000, 3_600_000)]
                record_probe(session, job, info, seen, ranges)
            else:
                frames = [
                    FrameFaces(second, 1.0, (), ())
                    for second in range(job.range_start_ms // 1000, job.range_end_ms // 1000)
                ]
                record_chunk(session, job, frames, None)
            done.append(job.key)
            session.commit()
    session.commit()
    summarize()
    return sorted(set(done))


def hours(*options: str) -> list[dict[str, Any]]:
    done = maskwatch("coverage", "--location", "lobby", "--camera", "cam", "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def column(name: str) -> list[Any]:
    return [row[name] for row in hours()]


def plant(bucket: Bucket) -> None:
    """Hours 0 and 5 whole, 1 and 2 by halves, 3 and 4 by pictures, of which 4 lacks two."""
    for number in (0, 5):
        bucket.put(key(BEGIN + timedelta(hours=number), "mp4"), b"video")
    bucket.put(key(BEGIN + timedelta(hours=2, minutes=-30), "mp4"), b"video")
    for number in range(12):
        if number not in (7, 8):
            bucket.put(key(BEGIN + timedelta(hours=3, minutes=10 * number), "jpg"), b"picture")


def test_the_holes_are_named_exactly(session: Session, bucket: Bucket, camera: str) -> None:
    # The video that begins at half past of hour 1 fills its second half, and the first of hour 2.
    plant(bucket)
    enqueue(camera)
    assert column("waiting_seconds")[3:5] == [3600, 2400], "pictures are there before they are looked at"
    work(session, fail=(key(BEGIN + timedelta(hours=5), "mp4"),))
    assert column("hour") == [(BEGIN + timedelta(hours=n)).isoformat() for n in range(6)]
    assert column("present_seconds") == [3600, 1800, 1800, 3600, 2400, 3600]
    assert column("analysed_seconds") == [3600, 1800, 1800, 3600, 2400, 1200]
    assert column("failed_seconds") == [0, 0, 0, 0, 0, 2400]
    assert column("missing_seconds") == [0, 1800, 1800, 0, 1200, 0]
    assert column("hole") == [False, True, True, False, True, True]
    assert [row["local_hour"] for row in hours("--holes")] == [f"2026-03-02T{hour}:00:00" for hour in (13, 14, 16, 17)]
    shown = maskwatch("coverage", "--location", "lobby", "--camera", "cam")
    assert "2 of 3 failed" in shown.stdout and "4 of 6 hours lack something" in shown.stderr


def test_a_part_of_the_time_is_what_all_of_it_says_of_that(session: Session, bucket: Bucket, camera: str) -> None:
    """The control: a video that began before the time asked for is not found when videos are said to be short."""
    plant(bucket)
    enqueue(camera)
    work(session, fail=(key(BEGIN + timedelta(hours=5), "mp4"),))
    (cam,) = session.scalars(select(Camera)).all()
    whole = coverage(session, cam)
    assert len(whole) == len(coverage_by_both(session)) == 6
    edges = [None, *(BEGIN + timedelta(minutes=30 * number) for number in range(-1, 14))]
    for since in edges:
        for until in edges:
            expected = [row for row in whole if (not since or row.hour >= since) and (not until or row.hour < until)]
            assert coverage(session, cam, since, until) == expected, (since, until)
            on_the_clock = [edge and edge.astimezone(UTC).replace(tzinfo=None) + LOCAL for edge in (since, until)]
            assert coverage(session, cam, *on_the_clock) == expected, on_the_clock
    assert coverage(session, cam, datetime(1, 1, 1), datetime(9999, 12, 31)) == whole
    third = BEGIN + timedelta(hours=2)
    statement = (
        "SELECT present_seconds FROM camera_coverage(:camera, :since, 'infinity', :longest) ORDER BY hour LIMIT 1"
    )
    for longest, present in (("1 hour", 1800), ("0 hours", 0)):
        assert scalar(session, statement, camera=cam.id, since=third, longest=longest) == present


def test_gaps_fills_the_holes_and_nothing_else(session: Session, bucket: Bucket, camera: str) -> None:
    plant(bucket)
    enqueue(camera)
    work(session, fail=(key(BEGIN + timedelta(hours=5), "mp4"),))
    # What was missing has arrived, and something in an hour that lacks nothing.
    arrived = [
        key(BEGIN + timedelta(hours=1), "mp4"),
        *(key(BEGIN + timedelta(hours=3, minutes=10 * number), "jpg") for number in (7, 8)),
    ]
    elsewhere = key(BEGIN + timedelta(minutes=5), "jpg")
    for name in (*arrived, elsewhere):
        bucket.put(name, b"late")
    done = maskwatch("backfill", "--gaps", "--location", "lobby", "--camera", "cam", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"hours": 4, "new": 3, "again": 2}
    assert work(session) == sorted([*arrived, key(BEGIN + timedelta(hours=5), "mp4")])
    assert scalar(session, "SELECT count(*) FROM media_objects WHERE key = :key", key=elsewhere) == 0
    assert column("hole") == [False, False, True, False, False, False], "of hour 2 there is no more"
    assert fill_gaps(get_settings(), location_name="lobby", camera_name="cam") == (1, 0, 0)


def test_the_figures_of_an_hour_carry_its_coverage(session: Session, bucket: Bucket, camera: str) -> None:
    plant(bucket)
    enqueue(camera)
    work(session)
    found = dict(rows(session, "SELECT hour, coverage FROM compliance_by_hour"))
    assert [found[BEGIN + timedelta(hours=n)] for n in range(6)] == pytest.approx([1, 0.5, 0.5, 1, 2 / 3, 1])


def test_where_nobody_has_said_what_is_expected_nothing_is_missing(session: Session, bucket: Bucket) -> None:
    locate("cam")
    bucket.put("cam/2026-03-02T120000.jpg", b"x")
    enqueue(f"{bucket.uri}/cam/")
    work(session)
    (hour,) = hours()
    assert (hour["expected_seconds"], hour["missing_seconds"], hour["coverage"], hour["hole"]) == (None,) * 3 + (False,)
    assert hour["pieces"] == 1
    assert rows(session, "SELECT coverage FROM compliance_by_hour") == [(None,)]
    refused = maskwatch("backfill", "--gaps", "--location", "lobby", "--camera", "cam")
    assert refused.returncode == 1 and "has no source; name one" in refused.stderr
    assert maskwatch("backfill", "--gaps", "--location", "lobby").returncode == 2
    assert states(session) == {"succeeded": 1}
