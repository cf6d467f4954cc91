"""Models and machines that fail under real workers: a broken device, a hang, full disks. Each with its control."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.models.pipeline import pipeline_spec
from common.settings import get_settings
from producer import dispatch
from tests.ledger_rows import rows, scalar, states, take
from tests.mutants import injected
from tests.photos import face_jpeg
from tests.services import QUICK, Bucket, Services, forget_settings, locate, maskwatch, running, wait_until
from workers.analysis.analyzer import Analyzer
from workers.detection import Detections
from workers.jobs import models
from workers.jobs.run import run_jobs

#: A busy machine takes its time to start a child and to load its models.
LONG = 400

#: What a fault has to do with in the worker: `number` tells a picture, `note` writes a line to a file of the test.
ANALYZE = """
import os
from workers.analysis.analyzer import Analyzer

analyze = Analyzer._analyze

def note(number):
    with open({notes!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{number}}\\n")

def faulty(self, image_rgb):
    number = int(image_rgb[0, 0, 0])
    note(number)
    fault(number)
    return analyze(self, image_rgb)

Analyzer._analyze = faulty
"""

#: As CUDA does it: from one call on all calls in this process fail.
BROKEN_DEVICE = """
broken = False

def fault(number):
    global broken
    broken = broken or number == 5
    if broken:
        raise RuntimeError("CUDA error: device-side assert triggered")
"""

#: In native code that keeps Python's lock, so that no thread of the process runs, the heartbeat included.
HANGS = """
import ctypes

def fault(number):
    if number == 2:
        ctypes.PyDLL(None).sleep(3600)
"""


#: Leases and messages that no busy machine loses: what is charged here is charged for the fault.
PATIENT = {
    "MASKWATCH_LEDGER__LEASE_SECONDS": "600",
    "MASKWATCH_LEDGER__OVERDUE_SECONDS": "60",
    "MASKWATCH_PIPELINE__ENLARGE_BELOW_PX": "0",
    "MASKWATCH_WORKER__GROUP_SIZE": "4",
}


@pytest.fixture
def quick(services: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name, value in {**QUICK, **PATIENT}.items():
        monkeypatch.setenv(name, value)
    forget_settings()
    yield monkeypatch


@contextmanager
def at_work(folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A producer and a worker."""
    with ExitStack() as exits:
        exits.enter_context(running("producer", log=folder / "producer.log"))
        yield exits.enter_context(running("worker", log=folder / "worker.log", env=env))


def image(number: int) -> bytes:
    """A picture that tells its number, of nobody."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def enqueue(session: Session, bucket: Bucket, *numbers: int) -> None:
    if not scalar(session, "SELECT count(*) FROM locations"):
        locate()
    for number in numbers:
        bucket.put(f"{number}.png", image(number))
    done = maskwatch("backfill", bucket.uri, "--location", "lobby")
    assert done.returncode == 0, done.stderr


def children(worker: subprocess.Popen[bytes]) -> set[int]:
    found = set()
    for child in psutil.Process(worker.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just died
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


#: Of each picture: its name, state, and what it is charged with.
CHARGED = (
    "SELECT m.key, j.state, j.attempt, j.failures, j.crashes, j.lost_leases, j.reason FROM jobs j"
    " JOIN media_objects m ON m.id = j.media_object_id ORDER BY j.id"
)


def charged(session: Session) -> dict[str, Any]:
    return {row.key: row for row in rows(session, CHARGED)}


# --- a broken device ----------------------------------------------------------------------------------------


def test_a_broken_device_ends_its_process_and_the_jobs_run_elsewhere(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    quick.setenv("MASKWATCH_LEDGER__MAX_ATTEMPTS", "3")
    notes = tmp_path / "notes"
    enqueue(session, bucket, *range(1, 13))
    with at_work(tmp_path, injected(tmp_path, ANALYZE.format(notes=str(notes)), BROKEN_DEVICE)) as worker:
        wait_until(
            lambda: states(session) == {"succeeded": 11, "quarantined": 1}, seconds=LONG, what="the end of all jobs"
        )
        assert worker.poll() is None
    found = charged(session)
    guilty = found.pop("5.png")
    # Whoever breaks it each time is charged each time, as for any error, and in the end looked at by a person.
    assert (guilty.state, guilty.attempt, guilty.failures, guilty.crashes) == ("quarantined", 3, 3, 0)
    assert {(row.attempt, row.failures, row.crashes, row.lost_leases) for row in found.values()} == {(1, 0, 0, 0)}
    seen = [tuple(map(int, line.split())) for line in notes.read_text().splitlines()]
    broke = [pid for pid, number in seen if number == 5]
    assert len(set(broke)) == 3
    for pid in broke:  # it was the last that the process did
        assert [number for each, number in seen if each == pid][-1] == 5


@pytest.mark.chaos
def test_without_the_mechanism_the_broken_process_fails_one_job_after_the_other(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    quick.setenv("MASKWATCH_LEDGER__MAX_ATTEMPTS", "3")
    notes = tmp_path / "notes"
    enqueue(session, bucket, *range(1, 13))
    off = "import re\nfrom workers.inference import faults\nfaults._BROKEN_WORDS = re.compile('(?!)')"
    with at_work(tmp_path, injected(tmp_path, off, ANALYZE.format(notes=str(notes)), BROKEN_DEVICE)):
        wait_until(
            lambda: sum(states(session).get(state, 0) for state in ("succeeded", "quarantined")) == 12,
            seconds=LONG,
            what="the end of all jobs",
        )
    found = charged(session)
    del found["5.png"]
    assert sum(row.state == "quarantined" for row in found.values()) >= 4
    assert len({line.split()[0] for line in notes.read_text().splitlines()}) == 1


# --- a hang -------------------------------------------------------------------------------------------------


def hang(quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, limit: int) -> None:
    quick.setenv("MASKWATCH_WORKER__SOFT_TIME_LIMIT_SECONDS", str(limit - 1))
    quick.setenv("MASKWATCH_WORKER__HARD_TIME_LIMIT_SECONDS", str(limit))
    quick.setenv("MASKWATCH_WORKER__GROUP_SIZE", "1")
    quick.setenv("MASKWATCH_LEDGER__MAX_CRASHES", "2")
    forget_settings()
    enqueue(session, bucket, *range(1, 7))


def test_a_hang_is_killed_at_the_hard_limit_and_its_job_charged_with_a_crash(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    hang(quick, session, bucket, 20)
    notes = tmp_path / "notes"
    with at_work(tmp_path, injected(tmp_path, ANALYZE.format(notes=str(notes)), HANGS)) as worker:
        wait_until(lambda: states(session) == {"succeeded": 5, "quarantined": 1}, seconds=LONG, what="the others")
        assert worker.poll() is None
        hung = {int(line.split()[0]) for line in notes.read_text().splitlines() if line.endswith(" 2")}
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in hung), what="the end of the hung children")
    found = charged(session)
    guilty = found.pop("2.png")
    assert (guilty.state, guilty.crashes, guilty.reason) == ("quarantined", 2, "crashed")
    assert {(row.attempt, row.failures, row.crashes, row.lost_leases) for row in found.values()} == {(1, 0, 0, 0)}


@pytest.mark.chaos
def test_without_the_limit_a_hang_keeps_the_worker(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    hang(quick, session, bucket, 3600)
    notes = tmp_path / "notes"
    with at_work(tmp_path, injected(tmp_path, ANALYZE.format(notes=str(notes)), HANGS)) as worker:
        wait_until(lambda: notes.exists() and " 2\n" in notes.read_text(), seconds=LONG, what="the hang")
        before = notes.read_text(), children(worker)
        time.sleep(25)  # longer than the limit of the other test
        assert (notes.read_text(), children(worker)) == before
    assert states(session)["running"] == 1


# --- full disks ---------------------------------------------------------------------------------------------


def test_a_worker_needs_no_disk(quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path) -> None:
    """From its first picture on no file may grow by a byte, its log included."""
    (tmp_path / "tmp").mkdir()
    log = tmp_path / "worker.log"
    enqueue(session, bucket, 1)
    with at_work(tmp_path, {"TMPDIR": str(tmp_path / "tmp")}) as worker:
        wait_until(lambda: states(session) == {"succeeded": 1}, seconds=LONG, what="the first picture")
        for pid in {worker.pid, *children(worker)}:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
        logged = log.stat().st_size
        enqueue(session, bucket, *range(2, 40))
        wait_until(lambda: states(session).get("succeeded", 0) >= 10, seconds=LONG, what="the others")
        # And it can be asked to stop.
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
    found = charged(session)
    assert {(row.failures, row.crashes, row.lost_leases) for row in found.values()} == {(0, 0, 0)}
    assert "running" not in states(session) and "retry_wait" not in states(session)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert log.stat().st_size == logged  # the limit was felt: a worker says that it was asked to stop


def test_this_disk_is_really_full(tmp_path: Path) -> None:
    """The control: under the same limit, a process that writes to the disk fails."""
    code = (
        "import os, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
        "os.write(os.open('file', os.O_CREAT | os.O_WRONLY), b'x')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27] File too large" in done.stderr


@pytest.mark.parametrize("kind", ["image", "video"])
def test_annotating_to_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if kind == "image":
        (source / "face.jpg").write_bytes(face_jpeg(1))
        arguments = [str(source / "face.jpg"), "--out", str(tmp_path / "out")]
    else:
        from tests.videos import make_video

        (source / "film.mp4").write_bytes(make_video(frames=40))
        arguments = [str(source / "film.mp4"), "--out", str(tmp_path / "out.mp4")]

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    done = subprocess.run(
        [sys.executable, "-m", "common.cli", "annotate", *arguments],
        capture_output=True, text=True, preexec_fn=full, timeout=LONG, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode != 0
    assert "can't write" in done.stderr and "Traceback" not in done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != source]
    assert left == []


FULL = """
CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;
CREATE TRIGGER no_room BEFORE INSERT ON faces FOR EACH STATEMENT EXECUTE FUNCTION no_room();
"""
ROOM = "DROP TRIGGER IF EXISTS no_room ON faces; DROP FUNCTION IF EXISTS no_room();"


@pytest.fixture
def full_database(session: Session) -> Iterator[None]:
    session.execute(text(FULL))
    session.commit()
    yield
    session.rollback()
    session.execute(text(ROOM))
    session.commit()


def enqueue_faces(session: Session, bucket: Bucket, count: int) -> None:
    locate()
    for number in range(count):
        bucket.put(f"{number}.jpg", face_jpeg(number))
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0


@pytest.mark.usefixtures("full_database")
def test_a_full_disk_of_the_database_is_nobodys_fault(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    enqueue_faces(session, bucket, 3)
    with at_work(tmp_path, {}):
        wait_until(
            lambda: scalar(session, "SELECT count(*) FROM job_attempts WHERE outcome = 'released'") >= 6,
            seconds=LONG,
            what="jobs that are given back",
        )
        assert scalar(session, "SELECT count(*) FROM frame_counts") == 0  # the transaction is gone whole
        session.rollback()
        session.execute(text(ROOM))
        session.commit()
        wait_until(lambda: states(session) == {"succeeded": 3}, seconds=LONG, what="all, once there is room")
    found = charged(session)
    assert {(row.attempt, row.failures, row.crashes, row.lost_leases) for row in found.values()} == {(1, 0, 0, 0)}
    assert scalar(session, "SELECT count(*) FROM faces") == 3
    assert "lost before release" not in (tmp_path / "worker.log").read_text(), "given back once, not twice"


@pytest.mark.usefixtures("full_database")
@pytest.mark.chaos
def test_without_giving_back_jobs_are_charged_with_the_full_disk(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    quick.setenv("MASKWATCH_LEDGER__LEASE_SECONDS", "30")
    enqueue_faces(session, bucket, 3)
    off = "from workers.jobs import attempts\nattempts._release_if_possible = lambda job: None"
    with at_work(tmp_path, injected(tmp_path, off)):
        wait_until(
            lambda: scalar(session, "SELECT sum(lost_leases) FROM jobs") > 0, seconds=LONG, what="a lease that ran out"
        )
    assert scalar(session, "SELECT count(*) FROM faces") == 0


# --- the wish to stop ---------------------------------------------------------------------------------------


def dispatched(session: Session, bucket: Bucket, *numbers: int) -> None:
    enqueue(session, bucket, *numbers)
    dispatch.reconcile(get_settings())
    assert dispatch.dispatch(get_settings()) == len(numbers)


#: Half a second a picture: long enough to be in the middle of a group.
SLOW = "import time\n\ndef fault(number):\n    time.sleep(0.5)"


def test_a_child_that_was_started_later_is_asked_to_stop_as_well(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    quick.setenv("MASKWATCH_WORKER__GROUP_SIZE", "40")
    forget_settings()
    notes = tmp_path / "notes"
    env = injected(tmp_path, ANALYZE.format(notes=str(notes)), SLOW)
    with running("worker", log=tmp_path / "worker.log", env=env) as worker:
        dispatched(session, bucket, 100)
        wait_until(lambda: states(session) == {"succeeded": 1}, seconds=LONG, what="the first child's picture")
        (first,) = children(worker)
        os.kill(first, signal.SIGKILL)
        (second,) = wait_until(lambda: children(worker) - {first}, seconds=LONG, what="another child")
        notes.unlink()
        dispatched(session, bucket, *range(1, 41))
        wait_until(notes.exists, seconds=LONG, what="the second child's first picture")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(120) == 0
    assert {line.split()[0] for line in notes.read_text().splitlines()} == {str(second)}
    left = states(session)
    assert left["pending"] >= 30 and "running" not in left
    assert scalar(session, "SELECT max(attempt) FROM jobs WHERE state = 'pending'") == 0


# --- a model without memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tries", "state"), [(2, "retry_wait"), (1, "quarantined")])
def test_a_image_that_fits_no_memory_is_tried_again_and_then_kept_with_what_to_do(
    quick: pytest.MonkeyPatch, session: Session, bucket: Bucket, tries: int, state: str
) -> None:
    class Small:
        """A detector whose runtime has no memory for the second picture."""

        def detect(self, image_rgb: Any) -> Detections:
            if image_rgb[0, 0, 0] == 2:
                raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 81920000")
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    quick.setenv("MASKWATCH_LEDGER__MAX_ATTEMPTS", str(tries))
    forget_settings()
    small = Analyzer(pipeline_spec(get_settings()), Small(), None)  # type: ignore[arg-type]
    quick.setattr(models, "analyzer", lambda spec, runtime: small)
    enqueue(session, bucket, 1, 2, 3)
    refs = take(session, 9)
    session.commit()
    assert run_jobs(refs, worker="test/1", settings=get_settings()) == 2
    found = charged(session)
    assert [found[f"{number}.png"].state for number in (1, 2, 3)] == ["succeeded", state, "succeeded"]
    assert found["2.png"].reason == "model_out_of_memory"
    detail = scalar(session, "SELECT detail FROM jobs WHERE reason IS NOT NULL")
    assert "a picture of 64×64 pixels doesn't fit the free memory" in detail and "run fewer processes" in detail
