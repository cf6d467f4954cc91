"""End to end with real worker processes: bucket in, compliance out, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.messaging.queues import Queue, TaskName, encode_refs, queue_length, redis_client, send
from common.settings import get_settings
from producer import dispatch
from tests.ledger_rows import rows, scalar, states
from tests.mutants import UNFENCED, planted_in_processes
from tests.photos import empty_jpeg, face_jpeg
from tests.services import QUICK, Bucket, Services, forget_settings, kill_tree, locate, maskwatch, running, wait_until


@pytest.fixture
def quick(services: Services, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Short leases and ticks, for this process and the ones it starts."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    # So that a group has a middle: a second is as long as all of its small pictures.
    monkeypatch.setenv("MASKWATCH_WORKER__RECORD_SECONDS", "0.1")
    forget_settings()
    return QUICK


@contextmanager
def processes(folder: Path, *commands: str) -> Iterator[None]:
    with ExitStack() as stack:
        for number, command in enumerate(commands):
            stack.enter_context(running(command, log=folder / f"{number}-{command}.log"))
        yield


def test_from_a_bucket_to_compliance(quick: dict[str, str], session: Session, bucket: Bucket, tmp_path: Path) -> None:
    locate("door", zone="Europe/Berlin")
    for hour in range(6):
        bucket.put(
            f"door/2026/03/02/{hour + 8:02}-00-00.jpg", face_jpeg(hour) if hour % 2 else empty_jpeg() + b"\0" * hour
        )
    bucket.put("door/readme.txt", b"not a picture")
    command = (
        "backfill", f"{bucket.uri}/door/", "--location", "lobby", "--camera", "door",
        "--time-pattern", "door/%Y/%m/%d/%H-%M-%S.jpg", "--wait", "--json",
    )  # fmt: skip
    with processes(tmp_path, "producer", "aggregator", "worker"):
        done = maskwatch(*command)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert (report["listed"], report["new"], report["others"]) == (7, 6, 1)
        assert report["others_named"] == [f"{bucket.uri}/door/readme.txt"]
        assert report["jobs"] == {"succeeded": 6}
        again = json.loads(maskwatch(*command).stdout)
    assert (again["new"], again["known"], again["jobs"]) == (0, 6, {})
    hours = rows(session, "SELECT hour, frames, faces FROM compliance_hourly ORDER BY hour")
    assert [(row.hour, row.frames) for row in hours] == [(datetime(2026, 3, 2, 7 + n, tzinfo=UTC), 1) for n in range(6)]
    assert [row.faces for row in hours] == [0, 1, 0, 1, 0, 1]
    assert (
        scalar(session, "SELECT count(*) FROM faces f JOIN jobs j ON j.id = f.job_id WHERE j.state = 'succeeded'") == 3
    )
    (stored,) = rows(session, "SELECT DISTINCT camera, time_source, detector, classifier FROM face_results")
    assert stored == ("door", "key_pattern", "centerface", "efficientnet-lite0")
    boxes = rows(session, "SELECT x1, y1, x2, y2, p_with_mask + p_without_mask AS total FROM faces")
    assert all(0 <= b.x1 < b.x2 <= 256 and 0 <= b.y1 < b.y2 <= 256 and abs(b.total - 1) < 1e-5 for b in boxes)


def _enqueue(session: Session, bucket: Bucket, count: int) -> None:
    locate()
    for number in range(count):
        bucket.put(f"{number:03}.jpg", face_jpeg(number))
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    assert states(session) == {"pending": count}


def _kill_in_mid_group(session: Session, bucket: Bucket, folder: Path) -> None:
    """Kill -9 a worker in the middle of its group; another one finishes. Then the network delivers the
    group's first message once more, as it may after a crash."""
    count = 16
    _enqueue(session, bucket, count)
    settings = get_settings()
    dispatch.reconcile(settings)  # begins the epoch
    assert dispatch.dispatch(settings) == count
    from common.domain import JobRef

    message = encode_refs(
        [JobRef(row.id, row.token) for row in rows(session, "SELECT id, token FROM jobs ORDER BY id")]
    )
    with running("worker", log=folder / "victim.log") as victim:
        wait_until(lambda: states(session).get("succeeded", 0), what="the first picture")
        kill_tree(victim, signal.SIGKILL)
    left = states(session)
    assert left.get("running", 0) >= 1, f"killed too late to be in mid-group: {left}"
    with processes(folder, "producer", "aggregator", "worker"):
        wait_until(lambda: states(session) == {"succeeded": count}, what="the rest, by another worker")
        send(TaskName.ANALYZE, [message])
        with redis_client() as client:
            wait_until(lambda: queue_length(client, Queue.MEDIA) == 0, what="the second delivery")
        # A job behind it in the queue shows that the second delivery has been worked off.
        bucket.put("zzz.jpg", face_jpeg(999))
        assert maskwatch("backfill", bucket.uri, "--location", "lobby", "--wait").returncode == 0


ONCE = """
SELECT count(*) FILTER (WHERE pictures <> 1) FROM (
    SELECT m.id, (SELECT count(*) FROM frame_counts c WHERE c.job_id = j.id) AS pictures
    FROM media_objects m JOIN jobs j ON j.media_object_id = m.id) AS each
"""


def test_after_kill_9_every_image_is_analysed_once(
    quick: dict[str, str], session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    _kill_in_mid_group(session, bucket, tmp_path)
    assert states(session) == {"succeeded": 17}
    assert scalar(session, ONCE) == 0
    assert scalar(session, "SELECT count(*) FROM faces") == 17
    assert scalar(session, "SELECT sum(faces) FROM compliance_hourly") == 17
    # Only what was running is charged with it, and nothing is charged twice.
    assert scalar(session, "SELECT max(lost_leases + crashes) FROM jobs") == 1


def test_without_the_fence_images_are_counted_twice(
    quick: dict[str, str], session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted_in_processes(tmp_path / "unfenced", *UNFENCED) as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        _kill_in_mid_group(session, bucket, tmp_path)
    assert scalar(session, ONCE) > 0
    assert scalar(session, "SELECT count(*) FROM faces") > 17


def test_a_worker_that_is_asked_to_stop_gives_back_what_it_has_not_begun(
    quick: dict[str, str], session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    _enqueue(session, bucket, 14)
    dispatch.reconcile(get_settings())
    assert dispatch.dispatch(get_settings()) == 14
    with running("worker", log=tmp_path / "worker.log") as worker:
        wait_until(lambda: states(session).get("succeeded", 0) >= 1, what="the first picture")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    left = states(session)
    assert left["pending"] >= 1 and "running" not in left and sum(left.values()) == 14
    assert scalar(session, "SELECT max(attempt) FROM jobs WHERE state = 'pending'") == 0
    assert scalar(session, "SELECT count(*) FROM job_attempts WHERE outcome = 'released'") == left["pending"]


def test_a_child_that_dies_is_reported_before_its_lease_runs_out(
    quick: dict[str, str], session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWATCH_LEDGER__LEASE_SECONDS", "3600")
    forget_settings()
    _enqueue(session, bucket, 40)  # more than a child gets through before it is found and killed
    dispatch.reconcile(get_settings())
    dispatch.dispatch(get_settings())
    with running("worker", log=tmp_path / "worker.log") as worker:
        wait_until(lambda: states(session).get("succeeded", 0) >= 1, what="the first picture")
        child = next(
            process
            for process in psutil.Process(worker.pid).children(recursive=True)
            if process.cpu_percent(0.2) > 20 or "spawn_main" in " ".join(process.cmdline())
        )
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: "running" not in states(session), what="the report of the crash")
    crashed = rows(session, "SELECT outcome, count(*) FROM job_attempts GROUP BY 1")
    assert dict(crashed)["crashed"] >= 1
    assert scalar(session, "SELECT bool_and(alone) FROM jobs WHERE state = 'pending'")


def test_redis_may_be_wiped(quick: dict[str, str], session: Session, bucket: Bucket, tmp_path: Path) -> None:
    _enqueue(session, bucket, 6)
    settings = get_settings()
    dispatch.reconcile(settings)
    dispatch.dispatch(settings)
    assert states(session) == {"queued": 6}
    with redis_client() as client:
        client.flushall()
    with processes(tmp_path, "producer", "aggregator", "worker"):
        wait_until(lambda: states(session) == {"succeeded": 6}, what="everything, after the wipe")
    assert scalar(session, ONCE) == 0


def test_redis_holds_a_bounded_number_of_messages(
    services: Services, session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWATCH_DISPATCH__QUEUE_CAP", "3")
    monkeypatch.setenv("MASKWATCH_WORKER__GROUP_SIZE", "2")
    forget_settings()
    _enqueue(session, bucket, 20)
    dispatch.reconcile(get_settings())
    sent = [dispatch.dispatch(get_settings()) for _ in range(3)]
    with redis_client() as client:
        assert queue_length(client, Queue.MEDIA) == 3
    assert sent == [6, 0, 0] and states(session) == {"pending": 14, "queued": 6}


def test_one_request_waits_for_an_aggregator_that_is_away(services: Services, session: Session, bucket: Bucket) -> None:
    assert dispatch.request_summary() is False
    _enqueue(session, bucket, 1)
    session.execute(text("INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT 1, 1, now()"))
    session.commit()
    assert [dispatch.request_summary() for _ in range(3)] == [True, False, False]
    with redis_client() as client:
        assert queue_length(client, Queue.AGGREGATION) == 1
