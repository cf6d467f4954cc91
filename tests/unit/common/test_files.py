"""Files appear whole or not at all; locks say who holds them, and end with their holder however it ends."""

from __future__ import annotations

import ast
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import files
from common.files import PART, LockHeldError, hold, make_held, new_folder, remove_left_over, replacing, write_atomically
from tests import ROOT

#: Writes a file over and over, each time as many bytes of one kind, with the function that it is told.
WRITE = """
import sys
from pathlib import Path
from common.files import write_atomically
def in_place(path, content): path.write_bytes(content)
write, path = {"write_atomically": write_atomically, "in_place": in_place}[sys.argv[1]], Path(sys.argv[2])
path.write_bytes(b"a" * 4_000_000)
print("begun", flush=True)
while True:
    for letter in (b"a", b"b"):
        write(path, letter * 4_000_000)
"""

HOLD = """
import sys, time
from pathlib import Path
from common.files import hold
with hold(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said a first line; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield process
        finally:
            process.kill()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["Käse\n", b"\0\xff", ""])
def test_what_is_written_is_there(tmp_path: Path, content: str | bytes) -> None:
    write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == {"file"}


def killed_in_the_middle(write: str, folder: Path) -> tuple[bool, set[str]]:
    """Whether the file was whole after its writer was killed, and the other files that it left."""
    path = folder / "file"
    with child(WRITE, write, str(path)) as process:
        time.sleep(0.05)
        process.kill()
        process.wait()
    content = path.read_bytes()
    return len(content) == 4_000_000 and len(set(content)) == 1, names(folder) - {"file"}


def test_a_killed_writer_leaves_the_file_whole_and_at_most_a_part_beside_it(tmp_path: Path) -> None:
    for _ in range(5):
        is_whole, others = killed_in_the_middle("write_atomically", tmp_path)
        assert is_whole and all(name.startswith(".file.") and name.endswith(PART) for name in others)
    files.remove_parts(tmp_path)
    assert names(tmp_path) == {"file"}


def test_a_killed_writer_in_place_leaves_half_a_file(tmp_path: Path) -> None:
    """The control."""
    assert not all(killed_in_the_middle("in_place", tmp_path)[0] for _ in range(20))


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("any other")])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise fault

    with monkeypatch.context() as patch, pytest.raises(type(fault)):
        patch.setattr(Path, "replace", fail)
        write_atomically(path, "after")
    with pytest.raises(type(fault)), replacing(path) as part:
        part.write_text("half of ")
        raise fault
    with pytest.raises(type(fault)), replacing(path):
        raise fault  # before anything was written
    with pytest.raises(type(fault)), new_folder(tmp_path / "folder") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        raise fault
    assert path.read_text() == "before" and names(tmp_path) == {"file"}


def test_text_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "file", "\udce9")
    assert names(tmp_path) == set()


def test_two_who_write_the_same_file_do_not_write_into_each_others(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one" and names(tmp_path) == {"file"}


def test_permissions_are_those_of_a_new_file_or_those_that_are_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "usual", "")
        write_atomically(tmp_path / "private", "", mode=0o600)
        write_atomically(tmp_path / "public", "", mode=0o644, owner=(os.geteuid(), os.getegid()))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"usual": 0o640, "private": 0o600, "public": 0o644}


def test_a_private_file_is_private_from_its_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fdopen = os.fdopen

    def look(handle: int, mode: str) -> object:
        seen.append(os.fstat(handle).st_mode & 0o777)
        return fdopen(handle, mode)

    monkeypatch.setattr(os, "fdopen", look)
    write_atomically(tmp_path / "file", "password", mode=0o600)
    assert seen == [0o600]


def test_a_folder_appears_with_all_that_it_holds(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path / "folder") == {"file"} and names(tmp_path) == {"folder"}
    with pytest.raises(OSError), new_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path / "folder") == {"file"} and names(tmp_path) == {"folder"}


# --- locking ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock" if kind == "file" else tmp_path
    with child(HOLD, str(path), "alone") as holder:
        with pytest.raises(LockHeldError) as held, hold(path, seconds=0.2):
            pass
        assert str(held.value) == (f"-c {path} alone (pid {holder.pid})" if kind == "file" else "another process")
        holder.kill()
        holder.wait()
        with hold(path, seconds=0):
            pass


def test_sharers_do_not_keep_each_other_out_but_one_who_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with child(HOLD, str(path), "shared"):
        with hold(path, shared=True, seconds=0):
            pass
        with pytest.raises(LockHeldError, match="another process"), hold(path, seconds=0):
            pass
    with hold(path, seconds=0), pytest.raises(LockHeldError), hold(path, shared=True, seconds=0):
        pass


def test_who_waited_while_the_folder_was_removed_holds_the_new_lock(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    entered, done = threading.Event(), threading.Event()

    def wait() -> None:
        with hold(path):
            entered.set()
            done.wait(30.0)

    waiting = threading.Thread(target=wait)
    with hold(path):
        waiting.start()
        time.sleep(0.1)
        assert not entered.is_set()
        shutil.rmtree(path.parent)
    assert entered.wait(30.0)
    with pytest.raises(LockHeldError), hold(path, seconds=0.2):
        pass
    done.set()
    waiting.join()


def test_a_lock_file_can_be_unlocked_and_the_lock_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyboardInterrupt), hold(path):
        raise KeyboardInterrupt
    with path.open() as one, path.open() as two:
        assert files.try_lock(one.fileno()) and not files.try_lock(two.fileno(), shared=True)
        files.unlock(one.fileno())
        assert files.try_lock(two.fileno(), shared=True)


# --- scratch files that are held ----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_held_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, handle = make_held("kind-", folder=folder)
    os.close(handle)  # as the kernel does at a kill
    ours, handle = make_held("kind-", folder=folder)
    (tmp_path / "kind-link").symlink_to(left)
    other_kind = tmp_path / "kind-other"
    other_kind.touch() if folder else other_kind.mkdir()
    assert left.stat().st_mode & 0o077 == 0
    try:
        remove_left_over("kind-", folder=folder)
        assert names(tmp_path) == {ours.name, "kind-link", "kind-other"}
    finally:
        os.close(handle)


@pytest.mark.parametrize("folder", [False, True])
def test_one_that_another_process_removes_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lock, removed = fcntl.flock, list[Path]()

    def late(handle: int, kind: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir() if folder else removed[0].unlink()
        lock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    path, handle = make_held("kind-", folder=folder)
    os.close(handle)
    assert path.exists() and not removed[0].exists() and path != removed[0]


# --- said once ----------------------------------------------------------------------------------------------


def writes_or_locks_itself(source: str) -> set[str]:
    """What a file does itself that `common.files` is for: it locks with flock, or renames what it made to its place."""
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    imported = {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    return names & {"mkstemp", "flock", "O_EXCL"} | imported & {"fcntl"}


def test_nobody_else_writes_or_locks_files_in_a_way_of_its_own() -> None:
    found = {
        str(path.relative_to(ROOT)): by
        for package in ("common", "producer", "workers", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if (by := writes_or_locks_itself(path.read_text(encoding="utf-8")))
    }
    assert set(found) == {"common/files.py"}, found


def test_the_same_check_finds_one() -> None:
    assert writes_or_locks_itself("import fcntl, tempfile\ntempfile.mkstemp()") == {"fcntl", "mkstemp"}
