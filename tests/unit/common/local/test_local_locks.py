"""Locks say who holds them, and end with their holder however it ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.domain import MaskwatchError
from common.local import locks

HOLD = """
import sys, time
from pathlib import Path
from common.local import locks
with locks.exclusive(Path(sys.argv[1]), 30.0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_waiting_in_vain_names_the_holder_and_its_death_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(MaskwatchError, match=rf"by .*\(pid {holder.pid}\); waited 0 s"), locks.exclusive(path, 0.2):
            pass
        holder.kill()
    with locks.exclusive(path, 30.0):
        pass


def test_sharers_do_not_keep_each_other_out_but_an_exclusive_one(tmp_path: Path) -> None:
    path = tmp_path / "in-use"
    with locks.shared(path, 30.0), locks.shared(path, 30.0), locks.exclusive_if_free(path) as free:
        assert not free
    with locks.exclusive_if_free(path) as free:
        assert free


def test_who_waited_while_the_folder_was_removed_holds_the_new_lock(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    entered, done = threading.Event(), threading.Event()

    def wait() -> None:
        with locks.exclusive(path, 30.0):
            entered.set()
            done.wait(30.0)

    waiting = threading.Thread(target=wait)
    with locks.exclusive(path, 30.0):
        waiting.start()
        time.sleep(0.1)
        assert not entered.is_set()
        shutil.rmtree(path.parent)
    assert entered.wait(30.0)
    with pytest.raises(MaskwatchError), locks.exclusive(path, 0.2):
        pass
    done.set()
    waiting.join()
