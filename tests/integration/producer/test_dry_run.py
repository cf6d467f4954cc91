"""Dry runs: what they say is what a backfill then does, and they write nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.tables import Base
from common.domain import FrameFaces, JobKind, ObservedAt, ObservedAtSource, VideoInfo
from common.reporting.cost_model import ENOUGH, Origin
from common.settings import get_settings
from producer.estimate import Estimate, estimate
from producer.submit import submit
from tests.ledger_rows import claim, face, rows, scalar, take
from tests.services import Bucket, locate, maskwatch
from workers.jobs.recording import AnalysedImage, record_chunk, record_image, record_images, record_probe
from workers.summaries.aggregation import summarize


def dry_run(bucket: Bucket, **options: Any) -> Estimate:
    return estimate(get_settings(), bucket.uri, location_name="lobby", **options)


def fill(bucket: Bucket, count: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        bucket.put(f"{number:03}.jpg", str(number).encode())


def analyse_all(session: Session, *, faces: int, seconds: float) -> None:
    """As a worker that takes so long for each picture and finds so many faces in it."""
    while refs := take(session, 10):
        for job in claim(session, refs, worker=f"w@host/{refs[0].id}"):
            seen = ObservedAt(datetime(2026, 3, 2, 12, tzinfo=UTC), ObservedAtSource.LAST_MODIFIED)
            record_image(session, job, [face()] * faces, seen)
            session.commit()
        session.execute(
            text(
                "UPDATE job_attempts a SET started_at = t.began,"
                " ended_at = t.began + make_interval(secs => t.place * :step) FROM (SELECT id, timestamptz"
                " '2026-03-02 12:00+00' AS began, row_number() OVER (ORDER BY id) AS place FROM job_attempts"
                " WHERE worker = :worker) t WHERE t.id = a.id"
            ),
            {"worker": f"w@host/{refs[0].id}", "step": seconds},
        )
        session.commit()
    summarize()


def everything(session: Session) -> dict[str, int]:
    return {table.name: scalar(session, f"SELECT count(*) FROM {table.name}") for table in Base.metadata.sorted_tables}


def test_before_anything_was_analysed_it_goes_by_the_benchmark_and_says_so(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket, 5)
    bucket.put("a.mp4", b"no one looks into it")
    bucket.put("notes.txt", b"-")
    before = everything(session)
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["objects"], told["images"], told["videos"], told["others"]) == (6, 5, 1, 1)
    assert told["throughput"]["seconds_per_image"] == {"value": 0.12, "origin": "the benchmark's"}
    assert told["footage_hours"] is told["jobs"] is told["face_rows"] is None, "nobody knows how long a video is"
    shown = maskwatch("backfill", bucket.uri, "--location", "lobby", "--dry-run")
    assert "unknown until some footage is analysed" in shown.stdout and "the benchmark's" in shown.stderr
    assert everything(session) == before, "nothing is written"


def test_what_it_says_is_what_then_happens(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket, ENOUGH)
    submit(get_settings(), bucket.uri, location_name="lobby")
    analyse_all(session, faces=3, seconds=0.5)
    fill(bucket, 100, first=ENOUGH)
    told = dry_run(bucket, workers=4, price_per_hour=2)
    assert told.cost_model.seconds_per_image.origin is Origin.MEASURED
    assert (told.found.known, told.jobs, told.face_rows) == (ENOUGH, 100, 300)
    assert told.worker_hours == pytest.approx(100 * 0.5 / 3600)
    assert told.hours == pytest.approx(told.worker_hours / 4)
    assert told.cost == pytest.approx(told.worker_hours * 2)
    report = submit(get_settings(), bucket.uri, location_name="lobby")
    analyse_all(session, faces=3, seconds=0.5)
    assert report.new == told.jobs
    assert scalar(session, "SELECT count(*) FROM faces") == told.face_rows + 3 * ENOUGH
    assert dry_run(bucket).jobs == 0


def test_images_and_videos_are_told_apart(session: Session, bucket: Bucket) -> None:
    """However many of each were seen before."""
    locate()
    fill(bucket, 30)
    bucket.put("a.mp4", b"x" * 1000)
    submit(get_settings(), bucket.uri, location_name="lobby")
    refs = take(session, 100)
    *images, probe = sorted(claim(session, refs), key=lambda job: job.kind is JobKind.PROBE)
    seen = ObservedAt(datetime(2026, 3, 2, 12, tzinfo=UTC), ObservedAtSource.LAST_MODIFIED)
    record_images(session, [AnalysedImage(job, [face()] * 3, seen) for job in images])
    record_probe(session, probe, VideoInfo("mp4", "h264", 64, 48, 1.0, 0, 50.0, None), seen, [(0, 60_000)])
    session.commit()
    (chunk,) = claim(session, take(session, 9))
    frames = [FrameFaces(float(n), 1.0, (face(),) * (n < 25), (1,) * (n < 25)) for n in range(50)]
    record_chunk(session, chunk, frames, None)
    session.commit()
    fill(bucket, 10, first=30)
    assert dry_run(bucket).face_rows == 30
    bucket.put("b.mp4", b"x" * 7200)  # six minutes, in every other second a face
    assert dry_run(bucket).face_rows == 30 + 180


def test_one_image_that_had_to_wait_for_its_models_does_not_count(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket, 40)
    submit(get_settings(), bucket.uri, location_name="lobby")
    analyse_all(session, faces=1, seconds=0.5)
    session.execute(text("UPDATE job_attempts SET ended_at = ended_at + interval '1 hour' WHERE worker = 'w@host/1'"))
    session.commit()
    rate = dry_run(bucket).cost_model.seconds_per_image
    assert (rate.value, rate.origin) == (pytest.approx(0.5), Origin.MEASURED)


def test_the_length_of_videos_follows_from_those_that_are_known(session: Session, bucket: Bucket) -> None:
    locate()
    bucket.put("a.mp4", b"x" * 1000)
    submit(get_settings(), bucket.uri, location_name="lobby")
    session.execute(text("UPDATE media_objects SET duration_seconds = 50"))
    session.commit()
    bucket.put("b.mp4", b"x" * 7200)  # 20 bytes a second: six minutes
    told = dry_run(bucket)
    assert told.footage_hours == pytest.approx(0.1)
    assert told.jobs == 1 + 7, "its probe, and chunks of a minute, of which the last is rarely whole"
    assert told.worker_hours == pytest.approx((0.1 + 360 * 2 / 17) / 3600)


def test_archives_are_priced(bucket: Bucket, session: Session) -> None:
    locate()
    for key, storage_class in (("a.jpg", "GLACIER"), ("b.jpg", "DEEP_ARCHIVE"), ("c.jpg", "DEEP_ARCHIVE")):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"x" * 2**20, StorageClass=storage_class)
    told = dry_run(bucket)
    assert (told.found.archived, told.jobs) == ({"GLACIER": 1, "DEEP_ARCHIVE": 2}, 0)
    assert told.restore_cost == pytest.approx(2 / 1024 * 0.0025 + 2 / 1000 * 0.025)
    told = dry_run(bucket, restore_tier="Standard")
    assert told.jobs == 3
    assert told.restore_cost == pytest.approx(1 / 1024 * (0.01 + 2 * 0.02) + (0.05 + 2 * 0.10) / 1000)
    assert dry_run(bucket, restore_tier="Expedited").restore_cost is None, "Deep Archive has no such tier"
    assert rows(session, "SELECT 1 FROM jobs") == []
