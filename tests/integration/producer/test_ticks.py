"""What is bad concerns itself only: an object, a camera, a month, and each step of each tick."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import schedule
from common.ledger import failing_steps
from common.settings import get_settings
from producer import cameras, dispatch, gauges, steps
from producer.steps import TickFailedError
from tests.ledger_rows import claim, face, planned, register, rows, scalar
from tests.ledger_rows import dispatch as send
from tests.photos import jpeg, portrait
from tests.services import Bucket, locate, maskwatch, wait_until
from workers.jobs.recording import record_image
from workers.summaries.aggregation import summarize

#: The steps of each tick, and what each calls.
RECONCILE = {
    "expired_leases": (dispatch.ledger, "recover_expired"),
    "refused": (dispatch.ledger, "recover_refused"),
    "lost_messages": (dispatch.ledger, "recover_queued"),
    "partitions": (dispatch, "split_default"),
    "old_slots": (dispatch.schedule, "prune_slots"),
}
DISPATCH = {
    "wake": (dispatch.ledger, "wake_retries"),
    "send": (dispatch._Tick, "take"),
}


@pytest.fixture(autouse=True)
def a_process_that_has_told_nothing() -> None:
    steps._told.clear()


def called(monkeypatch: pytest.MonkeyPatch, of: dict[str, tuple[object, str]], failing: str) -> list[str]:
    """The steps of a tick that were called, of which one fails."""
    seen: list[str] = []

    def watched(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            seen.append(name)
            if name == failing:
                raise ZeroDivisionError("planted")
            return original(*arguments, **options)

        return call

    for name, (place, attribute) in of.items():
        monkeypatch.setattr(place, attribute, watched(name, getattr(place, attribute)))
    return seen


@pytest.mark.parametrize(
    ("tick", "failing"), [*(("reconcile", name) for name in RECONCILE), *(("dispatch", name) for name in DISPATCH)]
)
def test_a_step_that_fails_keeps_no_other_from_its_turn_and_is_seen(
    session: Session, monkeypatch: pytest.MonkeyPatch, tick: str, failing: str
) -> None:
    dispatch.reconcile(get_settings())  # begins the epoch
    register(session, planned("a.jpg"))
    of = RECONCILE if tick == "reconcile" else DISPATCH
    with monkeypatch.context() as planting:
        seen = called(planting, of, failing)
        for _ in range(2):
            with pytest.raises(TickFailedError, match=f"{failing} .*planted"):
                getattr(dispatch, tick)(get_settings())
    assert [*dict.fromkeys(seen)] == list(of)
    (found,) = failing_steps.list_all(session)
    assert (found.tick, found.step, found.times) == (tick, failing, 2) and "planted" in found.detail

    status = maskwatch("status")
    assert f"{tick}: the step {failing} has failed since" in status.stderr and "planted" in status.stderr
    (told,) = json.loads(maskwatch("status", "--json").stdout)["failing_steps"]
    assert (told["tick"], told["step"], told["times"]) == (tick, failing, 2)
    assert f"{tick}/{failing}: " in maskwatch("doctor").stdout
    assert gauge("maskwatch_failing_steps") == 1

    session.rollback()
    getattr(dispatch, tick)(get_settings())
    assert failing_steps.list_all(session) == [], "forgotten once it succeeds"


def test_steps_that_are_only_called_one_after_the_other_stop_at_a_failure(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "run_steps", lambda _tick, steps: {name: step() for name, step in steps.items()})
    seen = called(monkeypatch, RECONCILE, "refused")
    with pytest.raises(ZeroDivisionError):
        dispatch.reconcile(get_settings())
    assert seen == ["expired_leases", "refused"]


def gauge(name: str) -> float:
    (found,) = [
        sample.value for family in gauges.LedgerGauges().collect() if family.name == name for sample in family.samples
    ]
    return found


# --- one bad month ---


def test_a_face_of_a_time_without_a_month_waits_and_the_others_get_theirs(session: Session, tmp_path: Path) -> None:
    """As an earlier version stored it, which believed every EXIF time."""
    register(session, planned("old.jpg"), planned("new.jpg"))
    for job in claim(session, send(session)):
        assert job.observed_at is not None
        record_image(session, job, [face()], job.observed_at)
    session.execute(text("UPDATE faces_default SET observed_at = '0001-01-01 00:00 BC' WHERE job_id = 1"))
    session.commit()
    assert dispatch.reconcile(get_settings())["partitions"] == 1
    assert rows(session, "SELECT tableoid::regclass::text AS of FROM faces ORDER BY 1") == [
        ("faces_2026_03",), ("faces_default",)
    ]  # fmt: skip
    assert failing_steps.list_all(session) == []
    session.execute(text("UPDATE dirty_marks SET hour = '0001-01-01 00:00 BC' WHERE id = 1"))
    session.execute(text("UPDATE frame_counts SET hour = '0001-01-01 00:00 BC' WHERE job_id = 1"))
    session.commit()
    report = tmp_path / "report.html"
    assert summarize() == 1, "the mark of the other hour is taken, and stops nothing"
    session.execute(text(SUMMARY_OF_AN_EARLIER_VERSION))
    session.commit()
    assert maskwatch("report", "--out", str(report)).returncode == 0 and report.stat().st_size > 1000
    assert json.loads(maskwatch("summary", "--json").stdout)


SUMMARY_OF_AN_EARLIER_VERSION = """
INSERT INTO compliance_hourly
    (location_id, pipeline_id, hour, frames, seconds, faces, with_mask, without_mask, uncertain)
SELECT location_id, pipeline_id, '0001-01-01 00:00 BC', 1, 0, 1, 1, 0, 0
FROM compliance_hourly
"""


# --- one bad object ---

BAD_KEYS = ("0002-01-01T00-00-00", "1970-01-01T00-00-05", "2400-01-01T00-00-00", "9999-12-31T23-59-59")
JOBS = "SELECT m.key, j.state, j.reason FROM jobs j JOIN media_objects m ON m.id = j.media_object_id ORDER BY m.key"

GOOD_KEYS = ("2026-03-02T12-00-00", "2026-03-02T12-05-00")


def test_one_key_of_an_impossible_time_stops_no_backfill(session: Session, bucket: Bucket) -> None:
    locate(zone="Europe/Berlin")
    for key in (*BAD_KEYS, *GOOD_KEYS):
        bucket.put(f"{key}.jpg", key.encode())
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--time-pattern", "%Y-%m-%dT%H-%M-%S.jpg")
    assert done.returncode == 0, done.stderr
    found = [(row.key.removesuffix(".jpg"), row.state, row.reason) for row in rows(session, JOBS)]
    bad = [(key, "quarantined", "time_pattern_mismatch") for key in BAD_KEYS]
    assert found == sorted([*bad, *((key, "pending", None) for key in GOOD_KEYS)])


@pytest.mark.parametrize("mtime", [-1, 0, 13_569_465_600, 2**40])
def test_one_file_of_an_impossible_date_stops_no_backfill(session: Session, tmp_path: Path, mtime: int) -> None:
    locate()
    for name in ("bad.jpg", "good.jpg"):
        (tmp_path / name).write_bytes(jpeg(portrait()))
    os.utime(tmp_path / "bad.jpg", (0, mtime))
    done = maskwatch("backfill", str(tmp_path), "--location", "lobby")
    assert done.returncode == 0, done.stderr
    work_off(session)
    found = [(row.key.endswith("good.jpg"), row.state, row.reason) for row in rows(session, JOBS)]
    assert found == [(False, "quarantined", "no_time"), (True, "succeeded", None)]
    assert "nothing says when it was taken" in maskwatch("jobs", "list", "--state", "quarantined", "--json").stdout
    assert maskwatch("report", "--out", str(tmp_path / "report.html")).returncode == 0


def work_off(session: Session) -> None:
    from workers.jobs.run import run_jobs

    session.rollback()
    run_jobs(send(session), worker="test/1", settings=get_settings())


# --- one bad camera ---


def test_one_bad_key_does_not_silence_a_camera(session: Session, bucket: Bucket) -> None:
    locate(zone="Europe/Berlin")
    add("gate", bucket)
    for key in (*BAD_KEYS, *GOOD_KEYS):
        bucket.put(f"gate/{key}.jpg", key.encode())
    wait_until(lambda: cameras.tick(get_settings()), what="a slot")
    assert cameras.poll_camera(1, get_settings()) == len(BAD_KEYS) + len(GOOD_KEYS)
    assert rows(session, "SELECT state, count(*) FROM jobs GROUP BY 1 ORDER BY 1") == [
        ("pending", 2),
        ("quarantined", 4),
    ]


def add(name: str, bucket: Bucket) -> None:
    done = maskwatch(
        "cameras",
        "add",
        name,
        "--location",
        "lobby",
        "--source",
        f"{bucket.uri}/{name}/",
        "--every",
        "1s",
        "--time-pattern",
        "%Y-%m-%dT%H-%M-%S.jpg",
    )
    assert done.returncode == 0, done.stderr


def test_a_schedule_that_can_not_be_read_keeps_no_other_camera_waiting(session: Session, bucket: Bucket) -> None:
    locate()
    add("broken", bucket)
    add("sound", bucket)
    session.execute(text("UPDATE cameras SET every_seconds = NULL, cron = 'gibberish' WHERE name = 'broken'"))
    session.commit()
    wait_until(lambda: cameras.tick(get_settings()) == [2], what="the slots of the sound camera")
    listed = {camera["name"]: camera["problem"] for camera in json.loads(maskwatch("cameras", "list", "--json").stdout)}
    assert listed["sound"] is None and "its schedule can't be read" in listed["broken"]
    assert gauge("maskwatch_camera_problems") == 1
    assert "1 camera(s) could not be polled" in maskwatch("status").stderr


def test_an_unexpected_error_of_a_poll_is_seen_and_the_poll_is_tried_again(
    session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate()
    add("gate", bucket)
    bucket.put(f"gate/{GOOD_KEYS[0]}.jpg", b"x")
    wait_until(lambda: cameras.tick(get_settings()), what="a slot")

    def fails(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as planting:
        planting.setattr(ledger, "register", fails)
        assert cameras.poll_camera(1, get_settings()) is None
    (camera,) = json.loads(maskwatch("cameras", "list", "--json").stdout)
    assert camera["problem"] == "ZeroDivisionError: planted"
    session.execute(text("UPDATE cameras SET look_until = NULL"))
    session.commit()
    assert cameras.poll_camera(1, get_settings()) == 1
    assert scalar(session, "SELECT problem FROM cameras") is None
    assert schedule.count_problems(session) == 0
