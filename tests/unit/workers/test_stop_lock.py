"""How a worker's children learn that it is to stop, and what killed workers leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.domain import MaskwatchError
from workers import lifecycle

#: A worker's main process as far as this is about: tells its file, and lets go of it when it is spoken to.
MAIN = """
import os, sys
from workers import lifecycle
lifecycle.prepare_drain()
print(os.environ["MASKWATCH_RUNS_FILE"], flush=True)
for line in sys.stdin:
    lifecycle._let_go()
    print("let go", flush=True)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("MASKWATCH_RUNS_FILE", raising=False)
    lifecycle._opened.cache_clear()
    yield
    if lifecycle._opened.cache_info().currsize:
        os.close(lifecycle._opened(os.environ["MASKWATCH_RUNS_FILE"]))
    lifecycle._opened.cache_clear()


@contextmanager
def main_process() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """It and its file."""
    with subprocess.Popen(
        [sys.executable, "-c", MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_children_go_on_until_it_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with main_process() as (main, file):
        monkeypatch.setenv("MASKWATCH_RUNS_FILE", str(file))
        assert not lifecycle.draining()
        assert main.stdin is not None and main.stdout is not None
        print("stop", file=main.stdin, flush=True)
        assert main.stdout.readline() == "let go\n"
        assert lifecycle.draining()
        assert lifecycle.draining()  # and for good


def test_children_of_a_killed_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with main_process() as (main, file):
        monkeypatch.setenv("MASKWATCH_RUNS_FILE", str(file))
        assert not lifecycle.draining()
        main.kill()
        main.wait()
        file.unlink()  # by the next worker that starts
        assert lifecycle.draining()


def test_a_file_that_was_tidied_up_asks_nobody_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with main_process() as (_, file):
        monkeypatch.setenv("MASKWATCH_RUNS_FILE", str(file))
        file.unlink()
        assert not lifecycle.draining()


def test_without_a_worker_nobody_drains() -> None:
    assert not lifecycle.draining()


def test_the_next_worker_removes_what_killed_ones_have_left_and_nothing_else(tmp_path: Path) -> None:
    others = tmp_path / "maskwatch-worker-folder"
    others.mkdir()
    target = tmp_path / "somebody's"
    target.touch()
    link = tmp_path / "maskwatch-worker-link"
    link.symlink_to(target)
    with main_process() as (killed, left), main_process() as (_, running):
        killed.kill()
        killed.wait()
        assert left.exists()
        with main_process() as (_, third):
            assert not left.exists()
            assert {running, third, others, link, target} == set(tmp_path.iterdir())


def test_its_file_is_for_its_owner_alone() -> None:
    with main_process() as (_, file):
        assert file.stat().st_mode & 0o777 == 0o600


def test_without_room_for_the_file_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(MaskwatchError, match="No space left on device; make room there, or set TMPDIR"):
        lifecycle.prepare_drain()
