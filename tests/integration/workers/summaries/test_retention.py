"""Privacy: purged time stays purged and keeps its sums, what is erased is gone, and no picture is ever stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.database.partitions import ensure_partitions
from common.database.sessions import engine
from common.database.tables import Base
from common.domain import (
    FrameFaces,
    MaskwatchError,
    MediaKind,
    ObservedAt,
    ObservedAtSource,
    PermanentJobError,
    Reason,
    VideoInfo,
)
from common.ledger import ClaimedJob, StaleJobError, registration
from tests import ROOT
from tests.ledger_rows import NOON, claim, dispatch, face, planned, register, rows, scalar, states
from tests.photos import face_jpeg
from tests.services import Bucket, locate, maskwatch, wait_until
from workers.jobs.recording import record_chunk, record_image
from workers.summaries import purging
from workers.summaries.aggregation import summarize

JANUARY, FEBRUARY, MARCH = (datetime(2026, month, 1, tzinfo=UTC) for month in (1, 2, 3))
SUMMARY = "SELECT hour, frames, faces FROM compliance_hourly ORDER BY hour"


def analyse(session: Session, *at: datetime, zone: str = "UTC") -> list[ClaimedJob]:
    """A picture with two faces at each of these times."""
    ensure_partitions(engine(), at)
    register(session, *(planned(f"{instant:%m-%d-%H%M}.jpg", at=instant) for instant in at), zone=zone)
    jobs = claim(session, dispatch(session))
    for job in jobs:
        store(session, job)
    return jobs


def store(session: Session, job: ClaimedJob) -> None:
    assert job.observed_at is not None
    record_image(session, job, [face(), face()], job.observed_at)
    session.commit()


def begin(session: Session, *at: datetime, **changes: Any) -> list[ClaimedJob]:
    """Jobs that a worker holds, of pictures seen then."""
    register(session, *(replace(planned(f"late-{instant:%m-%d-%H%M}.jpg", at=instant), **changes) for instant in at))
    return claim(session, dispatch(session))


def test_a_purge_removes_faces_and_keeps_the_sums(session: Session) -> None:
    analyse(session, JANUARY + timedelta(hours=1), FEBRUARY + timedelta(days=3), FEBRUARY + timedelta(days=20), MARCH)
    summarize()
    before = rows(session, SUMMARY)
    done = purging.purge(FEBRUARY + timedelta(days=10), by="Ada")
    assert (done.partitions, done.faces) == (["faces_2026_01"], 2)
    left = rows(session, "SELECT DISTINCT observed_at FROM faces ORDER BY 1")
    assert [row.observed_at for row in left] == [FEBRUARY + timedelta(days=20), MARCH]
    summarize()
    assert rows(session, SUMMARY) == before
    assert rows(session, "SELECT action, by, detail FROM operator_actions") == [
        ("purge", "Ada", "before 2026-02-11T00:00:00+00:00")
    ]
    assert scalar(session, "SELECT count(*) FROM purges WHERE finished_at IS NOT NULL") == 1


def test_what_waits_to_be_summarized_is_before_it_is_purged(session: Session) -> None:
    analyse(session, JANUARY)
    purging.purge(FEBRUARY, by="Ada")
    assert rows(session, SUMMARY) == [(JANUARY, 1, 2)]


def test_removed_before_they_are_summarized_faces_would_be_missing(session: Session) -> None:
    analyse(session, JANUARY)
    purging._drop_partitions(FEBRUARY)
    summarize()
    assert rows(session, SUMMARY) == [(JANUARY, 1, 0)]


def test_marks_of_frozen_hours_change_nothing(session: Session) -> None:
    (job,) = analyse(session, JANUARY)
    purging.purge(FEBRUARY, by="Ada")
    before = rows(session, SUMMARY)
    # A newer version withdraws the old one's rows, and is refused itself.
    register(session, planned("01-01-0000.jpg", etag="e2", at=JANUARY, modified=NOON + timedelta(hours=1)))
    session.execute(text("INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT 1, 1, :at"), {"at": JANUARY})
    session.commit()
    summarize()
    assert rows(session, SUMMARY) == before
    assert states(session) == {"cancelled": 1, "quarantined": 1}
    assert ledger.rerun(session, [job.ref.id], by="Ada") == []


def test_late_footage_of_purged_time_is_refused_with_a_reason(session: Session) -> None:
    purging.purge(FEBRUARY, by="Ada")
    # Known from the key, it is refused when it is planned.
    result = register(session, planned("a.jpg", at=JANUARY), planned("b.jpg", at=FEBRUARY))
    assert (result.new, result.quarantined) == (2, 1)
    (refused,) = rows(session, "SELECT reason, detail FROM jobs WHERE state = 'quarantined'")
    assert refused.reason == "purged" and "everything before 2026-02-01 was purged" in refused.detail
    assert ledger.retry(session, by="Ada") == []
    # Known from the picture alone, when it is to be stored.
    register(session, replace(planned("c.jpg"), observed_at=None))
    (unknown,) = [job for job in claim(session, dispatch(session)) if job.observed_at is None]
    with pytest.raises(PermanentJobError, match="was purged"):
        record_image(session, unknown, [face()], ObservedAt(JANUARY, ObservedAtSource.EXIF))
    session.rollback()
    assert scalar(session, "SELECT count(*) FROM faces") == 0


def chunk_from(session: Session, start: datetime) -> ClaimedJob:
    """A chunk that a worker holds, of a video that began then."""
    register(session, replace(planned("late.mp4", at=start), kind=MediaKind.VIDEO))
    (probe,) = claim(session, dispatch(session))
    ledger.plan_chunks(session, probe, VideoInfo("mp4", "h264", 64, 48, 25.0, 0, 4.0, None), [(0, 4000)])
    ledger.succeed(session, probe, ObservedAt(start, ObservedAtSource.KEY_PATTERN))
    session.commit()
    (chunk,) = claim(session, dispatch(session))
    return chunk


def test_of_a_chunk_over_the_border_the_rest_is_stored(session: Session) -> None:
    chunk = chunk_from(session, FEBRUARY - timedelta(seconds=2))
    purging.purge(FEBRUARY, by="Ada")
    record_chunk(session, chunk, [FrameFaces(n, 1.0, (face(),), (1,)) for n in range(4)], None)
    session.commit()
    assert scalar(session, "SELECT count(*) FROM faces") == 2
    (job,) = rows(session, "SELECT state, reason, detail FROM jobs WHERE kind = 'chunk'")
    assert (job.state, job.reason) == ("succeeded", "purged") and "2 frames were seen in purged time" in job.detail


def test_a_chunk_of_purged_time_is_refused(session: Session) -> None:
    chunk = chunk_from(session, JANUARY)
    purging.purge(FEBRUARY, by="Ada")
    with pytest.raises(PermanentJobError) as refused:
        record_chunk(session, chunk, [FrameFaces(0.0, 1.0, (face(),), (1,))], None)
    assert refused.value.reason is Reason.PURGED


def test_an_hour_that_began_in_purged_time_is_purged_whole(session: Session) -> None:
    """In a half-hour zone an hour lies on both sides of a UTC day's border; its sum is final."""
    quarter_past = FEBRUARY + timedelta(minutes=15)
    analyse(session, FEBRUARY - timedelta(minutes=15), quarter_past, zone="Asia/Kolkata")
    summarize()
    before = rows(session, SUMMARY)
    assert before == [(FEBRUARY - timedelta(minutes=30), 2, 4)]
    (late,) = begin_in_kolkata(session, FEBRUARY + timedelta(minutes=20))
    purging.purge(FEBRUARY, by="Ada")
    with pytest.raises(PermanentJobError, match="was purged"):
        store(session, late)
    session.rollback()
    summarize()
    assert rows(session, SUMMARY) == before


def begin_in_kolkata(session: Session, at: datetime) -> list[ClaimedJob]:
    register(session, planned("late.jpg", at=at), zone="Asia/Kolkata")
    return claim(session, dispatch(session))


@contextmanager
def _open_transaction(session: Session) -> Iterator[threading.Event]:
    """A worker that has stored a picture of January and not committed yet; it does so when the event is set."""
    ensure_partitions(engine(), [JANUARY])
    (job,) = begin(session, JANUARY)
    stored, commit = threading.Event(), threading.Event()

    def store_slowly() -> None:
        with Session(engine()) as worker:
            assert job.observed_at is not None
            record_image(worker, job, [face()], job.observed_at)
            stored.set()
            commit.wait(50)
            worker.commit()

    thread = threading.Thread(target=store_slowly)
    thread.start()
    assert stored.wait(50)
    yield commit
    thread.join()


def test_a_purge_waits_for_those_that_may_not_know_of_it(session: Session) -> None:
    with _open_transaction(session) as commit:

        def commit_once_it_has_begun() -> None:
            with Session(session.bind) as watcher:
                wait_until(lambda: scalar(watcher, "SELECT count(*) FROM purges"), what="the purge")
            commit.set()

        threading.Thread(target=commit_once_it_has_begun).start()
        purging.purge(FEBRUARY, by="Ada")
    summarize()
    assert scalar(session, "SELECT count(*) FROM faces WHERE observed_at < '2026-02-01'") == 0
    assert rows(session, SUMMARY) == [(JANUARY, 1, 1)]  # it was in time, and counts


def test_without_waiting_faces_of_purged_time_would_be_left(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purging, "_wait_for_older", lambda xid: None)
    # It would wait for the worker here, too, whose transaction uses that month's partition.
    monkeypatch.setattr(purging, "_drop_partitions", lambda before: [])
    with _open_transaction(session) as commit:
        purging.purge(FEBRUARY, by="Ada")
        commit.set()
    summarize()
    assert scalar(session, "SELECT count(*) FROM faces WHERE observed_at < '2026-02-01'") == 1
    assert rows(session, SUMMARY) == []  # frozen before it counted


@pytest.mark.parametrize("step", ["_wait_for_older", "_freeze", "_drop_partitions", "_delete_faces"])
def test_an_interrupted_purge_goes_on(session: Session, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    analyse(session, JANUARY, FEBRUARY + timedelta(days=3))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(purging, step, stop)
        purging.purge(FEBRUARY + timedelta(days=10), by="Ada")
    # Also one that asks for less finishes it: what it has announced holds already.
    done = purging.purge(FEBRUARY, by="Ada")
    assert done.before == FEBRUARY + timedelta(days=10)
    assert scalar(session, "SELECT count(*) FROM faces") == 0
    assert rows(session, SUMMARY) == [(JANUARY, 1, 2), (FEBRUARY + timedelta(days=3), 1, 2)]
    assert scalar(session, "SELECT count(*) FROM purges WHERE finished_at IS NULL") == 0


def test_the_future_is_not_purged(session: Session) -> None:
    with pytest.raises(MaskwatchError, match="lies in the future"):
        purging.purge(datetime.now(UTC) + timedelta(days=1), by="Ada")
    assert scalar(session, "SELECT count(*) FROM purges") == 0


# --- erasing ---


def test_what_came_from_an_object_is_erased_and_the_summaries_follow(session: Session) -> None:
    analyse(session, NOON, NOON + timedelta(minutes=5))
    (first, _) = rows(session, "SELECT bucket, key FROM media_objects ORDER BY id")
    assert ledger.erase(session, first.bucket, first.key, by="Ada") == 1
    session.commit()
    summarize()
    assert rows(session, SUMMARY) == [(NOON, 1, 2)]
    for table in ("faces", "frame_counts", "jobs", "job_attempts", "media_objects"):
        count = {"faces": 2}.get(table, 1)
        assert scalar(session, f"SELECT count(*) FROM {table}") == count, table
    assert rows(session, "SELECT action, by, detail FROM operator_actions") == [("erase", "Ada", None)]


def test_an_erased_object_stays_out(session: Session) -> None:
    analyse(session, NOON)
    ledger.erase(session, "s3://footage", "03-02-1200.jpg", by="Ada")
    session.commit()
    again = register(session, planned("03-02-1200.jpg"), planned("03-02-1200.jpg.new"))
    assert (again.new, again.erased) == (1, 1)
    assert [row.key for row in rows(session, "SELECT key FROM media_objects")] == ["03-02-1200.jpg.new"]


def test_nothing_of_its_name_is_left(session: Session) -> None:
    analyse(session, NOON)
    session.execute(
        text(
            "WITH made AS (INSERT INTO backfills (source, source_id, location_id, pipeline_id)"
            " SELECT 's', source_id, 1, pipeline_id FROM jobs RETURNING id)"
            " INSERT INTO backfill_parts (backfill_id, number, begins_after, ends_with, cursor)"
            " SELECT made.id, 0, key, key, key FROM made, media_objects"
        )
    )
    session.commit()
    ledger.erase(session, "s3://footage", "03-02-1200.jpg", by="Ada")
    session.commit()
    found = {
        table.name
        for table in Base.metadata.sorted_tables
        for row in rows(session, f"SELECT {table.name}::text FROM {table.name}")
        if "03-02-1200" in row[0]
    }
    assert found == set()


def test_a_worker_that_is_at_an_erased_object_stores_nothing(session: Session) -> None:
    (job,) = begin(session, NOON)
    assert ledger.erase(session, job.bucket, job.key, by="Ada") == 1
    session.commit()
    with pytest.raises(StaleJobError):
        store(session, job)
    session.rollback()
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 0


@pytest.fixture
def waiting(session: Session) -> Iterator[Callable[[], bool]]:
    """Whether somebody waits for a lock."""
    with Session(session.bind) as watcher:

        def waiting() -> bool:
            return bool(scalar(watcher, "SELECT count(*) FROM pg_locks WHERE NOT granted"))

        yield waiting


def test_an_erasure_waits_for_a_listing_that_brings_the_object(session: Session, waiting: Callable[[], bool]) -> None:
    """Without the lock between them the listing, which has looked already, would bring it back in afterwards."""
    analyse(session, NOON)
    done = threading.Event()

    def erase() -> None:
        with Session(session.bind) as other:
            ledger.erase(other, "s3://footage", "03-02-1200.jpg", by="Ada")
            other.commit()
        done.set()

    newer = planned("03-02-1200.jpg", etag="e2", modified=NOON + timedelta(hours=1))
    registration.keep_from_erasing(session)  # as `register` begins
    assert registration._not_erased(session, [newer])
    thread = threading.Thread(target=erase)
    thread.start()
    wait_until(waiting, what="the erasure's wait")
    assert not done.is_set()
    register(session, newer)
    thread.join(30)
    assert scalar(session, "SELECT count(*) FROM media_objects") == 0


def test_the_commands(session: Session) -> None:
    analyse(session, JANUARY, NOON)
    summarize()
    asked = maskwatch("purge", "--before", "2026-02-01")
    assert asked.returncode == 1 and "Remove every face seen before 2026-02-01" in asked.stderr  # nobody said yes
    assert scalar(session, "SELECT count(*) FROM faces") == 4
    session.rollback()  # as a reader, this transaction would hold the purge up
    done = maskwatch("purge", "--before", "2026-02-01", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["partitions"] == ["faces_2026_01"]
    uri = "s3://footage/03-02-1200.jpg"
    done = maskwatch("erase", uri, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"object": uri, "versions": 1}
    assert rows(session, SUMMARY) == [(JANUARY, 1, 2)]
    unknown = maskwatch("erase", uri, "--yes")
    assert unknown.returncode == 1 and f"{uri} is unknown" in unknown.stderr
    for wrong in ("gs://a/b", "s3://footage/"):
        assert maskwatch("erase", wrong, "--yes").returncode == 1
    future = maskwatch("purge", "--before", "2999-01-01", "--yes")
    assert future.returncode == 1 and "lies in the future" in future.stderr


# --- nothing to see ---


def test_no_table_can_hold_an_image() -> None:
    """No crop, frame or embedding has a place: the only bytes are hashes."""
    binary = {
        f"{table.name}.{column.name}"
        for table in Base.metadata.sorted_tables
        for column in table.columns
        if column.type.python_type is bytes
    }
    assert binary == {"erased_objects.uri_sha256"}


def _analyse_elsewhere(session: Session, bucket: Bucket, folder: Path, before: str = "") -> list[str]:
    """Analyse a picture in a process of its own whose temporary and working folder is this; the files it leaves."""
    bucket.put("a.jpg", face_jpeg())
    locate()
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    (ref,) = dispatch(session)
    session.rollback()
    code = (
        f"{before}\nimport uuid\nfrom common.domain import JobRef\nfrom common.settings import get_settings\n"
        "from workers.jobs.run import run_jobs\n"
        f"run_jobs([JobRef({ref.id}, uuid.UUID('{ref.token}'))], worker='w/1', settings=get_settings())"
    )
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Of our environment no more than it needs: where it takes itself to be in a CI run, it sends nothing. What it would
    # send in the control goes nowhere.
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("MASKWATCH_", "AWS_", "PATH", "HOME"))
    }
    environment = {**kept, "TMPDIR": str(folder), "PYTHONPATH": paths, "https_proxy": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, check=True, timeout=120)
    assert states(session) == {"succeeded": 1}
    return [str(path.relative_to(folder)) for path in folder.rglob("*")]


def test_analysing_leaves_no_file(session: Session, bucket: Bucket, tmp_path: Path) -> None:
    assert _analyse_elsewhere(session, bucket, tmp_path) == []


def test_the_model_runtime_would_report_to_its_maker(session: Session, bucket: Bucket, tmp_path: Path) -> None:
    """As it ships, ONNX Runtime sends what it does to Microsoft; the file with its session's number betrays that."""
    allow = "import workers, os\ndel os.environ['ORT_DISABLE_TELEMETRY']"
    assert _analyse_elsewhere(session, bucket, tmp_path, before=allow) == [".ses"]
