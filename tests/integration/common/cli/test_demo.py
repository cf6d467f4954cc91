"""The demo and `maskwatch run`, as a newcomer starts them: in processes of their own, nothing configured."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import av
import psutil
import pytest

from tests import ROOT
from tests.services import maskwatch, running, wait_until


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, and an environment that configures nothing."""
    for name in list(os.environ):
        if name.startswith(("MASKWATCH_", "AWS_")) and name not in ("AWS_CA_BUNDLE", "MASKWATCH_TEST_DATA"):
            monkeypatch.delenv(name)
    # The credentials of the person who runs the tests must not decide which S3 is used.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name this folder or were started in or for it."""
    found = []
    for process in psutil.process_iter(["cmdline", "status", "pid"]):
        try:
            line = " ".join(process.info["cmdline"] or [])
            environment = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        mine = str(folder) in line or environment.get("MASKWATCH_STATE_DIR", "").startswith(str(folder))
        if mine and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(line)
    return found


def test_the_demo(newcomer: Path) -> None:
    out = newcomer / "demo-output"
    done = maskwatch("demo", "--out", str(out), cwd=newcomer, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    ground_truth = summary["truth"]
    assert ground_truth["found_share"] >= 0.95 and ground_truth["labelled_right_share"] >= 0.95
    assert ground_truth["faces"] >= 100  # the shares are of something
    reasons = {entry["reason"] for entry in summary["quarantined_objects"]}
    assert reasons == {"truncated_image", "empty_file", "unreadable_video"}
    # 66 pictures, the probe of a video and its one chunk.
    assert summary["jobs"] == {"succeeded": 68, "quarantined": 3}
    assert (ground_truth["frames"], ground_truth["visits"]) == (32, 6)
    assert {row["location"] for row in summary["compliance_by_day"]} == {"lobby", "market-street"}
    assert "<svg" in (out / "report.html").read_text() or "data:image" in (out / "report.html").read_text()
    assert len(list((out / "annotated").glob("*.jpg"))) == 66
    with av.open(str(out / "annotated" / "corridor.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 320
    assert processes_of(newcomer) == []
    # The database is there to go on with, and a second demo starts from nothing.
    state = {"MASKWATCH_STATE_DIR": str(out / "state")}
    query = "SELECT sum(faces) FROM compliance_by_day"
    sql = maskwatch("local", "up", env=state, cwd=newcomer)
    assert sql.returncode == 0, sql.stderr
    answer = maskwatch("local", "psql", "--", "-At", "-c", query, env=state, cwd=newcomer)
    assert int(answer.stdout) == sum(row["faces"] for row in summary["compliance_by_day"])
    assert maskwatch("local", "down", env=state, cwd=newcomer).returncode == 0
    assert processes_of(newcomer) == []


def test_the_demo_removes_nothing_of_others(newcomer: Path) -> None:
    (newcomer / "mine.txt").write_text("keep")
    done = maskwatch("demo", "--out", str(newcomer), cwd=newcomer)
    assert done.returncode == 1 and "mine.txt" in done.stderr and done.stderr.count("\n") == 1
    assert (newcomer / "mine.txt").read_text() == "keep"


@pytest.mark.data
def test_run_over_the_scenes(newcomer: Path, data_dir: Path) -> None:
    some = newcomer / "square"
    some.mkdir()
    for image in sorted((data_dir / "scenes" / "images").iterdir())[::3]:
        shutil.copy(image, some)
    command = ("run", str(some), "--location", "square", "--json")
    done = maskwatch(*command, cwd=newcomer, timeout=300)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["analysed"], first["new"], first["quarantined_objects"]) == (19, 19, [])
    again = json.loads(maskwatch(*command, cwd=newcomer, timeout=300).stdout)
    assert (again["analysed"], again["new"], again["known"]) == (0, 0, 19)
    assert again["summary"] == first["summary"]
    assert processes_of(newcomer) == []
    assert maskwatch("local", "up", cwd=newcomer).returncode == 0
    try:
        sums = "SELECT sum(faces), sum(with_mask), sum(without_mask), sum(uncertain) FROM compliance_hourly"
        direct = (
            "SELECT count(*), count(*) FILTER (WHERE status = 'with_mask'),"
            " count(*) FILTER (WHERE status = 'without_mask'), count(*) FILTER (WHERE status = 'uncertain') FROM faces"
        )
        answers = [maskwatch("local", "psql", "--", "-At", "-c", q, cwd=newcomer).stdout for q in (sums, direct)]
        assert answers[0] == answers[1] and answers[0].startswith(str(first["summary"][0]["faces"]))
    finally:
        assert maskwatch("local", "down", "--purge", cwd=newcomer).returncode == 0


def test_run_says_why_it_failed(newcomer: Path) -> None:
    done = maskwatch("run", "nowhere/", "--location", "x", cwd=newcomer)
    assert done.returncode == 1 and "there is no folder" in done.stderr and "Traceback" not in done.stderr
    done = maskwatch("run", "s3://nowhere/", "--location", "x", "--time-zone", "Mars/Olympus", cwd=newcomer)
    assert done.returncode == 1 and "Mars/Olympus" in done.stderr and "Traceback" not in done.stderr
    assert processes_of(newcomer) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.chaos)])
def test_a_demo_that_is_asked_to_stop_leaves_no_process(newcomer: Path, number: int) -> None:
    log = newcomer / "demo.log"
    with running("demo", "--out", str(newcomer / "out"), log=log) as demo:
        wait_until(lambda: "workers analyse them" in log.read_text(), seconds=120, what="the middle of the demo")
        assert len(processes_of(newcomer)) > 3
        demo.send_signal(number)
        assert demo.wait(60) != 0
        assert processes_of(newcomer) == []
