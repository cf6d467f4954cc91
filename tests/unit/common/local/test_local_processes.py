"""Processes are known by pid and start time, stopped with their children, and strangers are left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.local.processes import (
    LOG_BYTES,
    TAG,
    ProcessRef,
    last_lines,
    start_detached,
    stop,
    stop_session,
    stop_stack,
    stop_tagged,
    tag,
    wait_until,
    working_in,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with us."""
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


def start(tmp_path: Path, argv: list[str], its_tag: str = "") -> ProcessRef:
    return start_detached(argv, {**os.environ, TAG: its_tag}, tmp_path / "log")


def test_a_process_is_known_until_it_ends(tmp_path: Path) -> None:
    ref = start(tmp_path, SLEEP)
    assert ref.alive()
    assert ProcessRef.model_validate_json(ref.model_dump_json()).alive(), "the reference survives being written down"
    stop(ref, [(signal.SIGTERM, 30.0)])
    assert not ref.alive()
    assert not psutil.pid_exists(ref.pid), "no zombie of our own is left"


def test_a_zombie_does_not_count_as_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        ref = ProcessRef.of(process.pid)
        assert ref is not None
        # Popen doesn't look at its child before the block ends.
        assert wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 30.0)
        assert not ref.alive()


def test_a_reused_pid_is_a_stranger_and_gets_no_signal(stranger: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(stranger.pid)
    assert ref is not None
    reused = ProcessRef(pid=ref.pid, started=ref.started + "0")
    assert not reused.alive()
    stop(reused, [(signal.SIGKILL, 1.0)])
    stop_session(reused, 1.0)
    time.sleep(0.2)
    assert stranger.poll() is None
    stop(ref, [(signal.SIGKILL, 30.0)])
    assert not ref.alive(), "control: with the right start time the same call ends it"


def test_a_detached_process_has_its_own_session_and_ordinary_signals(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        ref = start(tmp_path, SLEEP)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert os.getsid(ref.pid) == ref.pid != os.getsid(0)
    stop(ref, [(signal.SIGTERM, 30.0)])
    assert not ref.alive(), "it does not inherit that we ignore SIGTERM"


def test_its_output_goes_to_the_log_and_its_input_is_empty(tmp_path: Path) -> None:
    code = "import sys; print('out', repr(sys.stdin.read())); print('err', file=sys.stderr)"
    ref = start(tmp_path, [sys.executable, "-c", code])
    assert wait_until(lambda: not ref.alive(), 30.0)
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["err", "out ''"]


def test_a_large_log_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * (LOG_BYTES + 1))
    ref = start(tmp_path, [sys.executable, "-c", "print('new')"])
    assert wait_until(lambda: not ref.alive(), 30.0)
    assert (tmp_path / "log").read_text() == "new\n"
    assert (tmp_path / "log.1").stat().st_size == LOG_BYTES + 1


PARENT = """
import pathlib, signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[2]).write_text(str(child.pid))
time.sleep(600)
"""


def start_family(tmp_path: Path, kind: str, its_tag: str = "") -> tuple[ProcessRef, ProcessRef]:
    """A process and its child."""
    note = tmp_path / "child"
    parent = start(tmp_path, [sys.executable, "-c", PARENT, kind, str(note)], its_tag)
    assert wait_until(lambda: note.exists() and bool(note.read_text()), 30.0)
    child = ProcessRef.of(int(note.read_text()))
    assert child is not None
    return parent, child


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
def test_a_session_is_stopped_with_its_children(tmp_path: Path, kind: str) -> None:
    parent, child = start_family(tmp_path, kind)
    stop_session(parent, 1.0 if kind == "stubborn" else 30.0)
    assert not parent.alive()
    assert wait_until(lambda: not child.alive(), 30.0)


def test_a_child_that_outlived_its_parent_is_found_by_the_tag(tmp_path: Path) -> None:
    mine = tag("worker", tmp_path)
    parent, child = start_family(tmp_path, "obedient", mine)
    os.kill(parent.pid, signal.SIGKILL)
    assert wait_until(lambda: not parent.alive(), 30.0)
    stop_session(parent, 1.0)
    stop_tagged(tag("other", tmp_path))
    stop_stack(tmp_path.parent)
    assert child.alive(), "control: without the leader only the right tag finds it"
    stop_tagged(mine)
    assert not child.alive()


def test_a_stack_is_stopped_whatever_its_processes_are_called(tmp_path: Path) -> None:
    one = start(tmp_path, SLEEP, tag("redis", tmp_path))
    other = start(tmp_path, SLEEP, tag("s3", tmp_path))
    neighbour = start(tmp_path, SLEEP, tag("redis", tmp_path / "next"))
    stop_stack(tmp_path)
    assert not one.alive()
    assert not other.alive()
    assert neighbour.alive()
    stop_stack(tmp_path / "next")
    assert not neighbour.alive()


def test_only_the_program_itself_is_found_by_its_folder(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP, cwd=tmp_path) as shell:  # somebody has changed into the folder
        name = psutil.Process(shell.pid).name()
        assert working_in(tmp_path, "postgres") == []
        assert [ref.pid for ref in working_in(tmp_path, name)] == [shell.pid]
        shell.kill()


def test_an_error_quotes_what_was_fatal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("FATAL: of an earlier start\n")
    since = log.stat().st_size
    assert last_lines(log, since) == "it wrote nothing"
    log.write_text("FATAL: of an earlier start\na\nb\n\nc\nd\n")
    assert last_lines(log, since) == "b | c | d"
    log.write_text("FATAL: of an earlier start\nx FATAL: no room\nstopped waiting\ncould not start\nlook there\n")
    assert last_lines(log, since) == "x FATAL: no room"
