"""How files are written and locked here: a file appears whole or not at all, and a lock ends with its holder.

Standard library only. The kernel holds the locks (flock), so a killed process keeps no lock. A killed write leaves a
file whose name ends with `PART` beside the file that it was to become, and never a part of that file itself.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

#: The end of the name of a file that is still being written.
PART = ".part"

_POLL_SECONDS = 0.05


class LockHeldError(Exception):
    """Another process holds the lock. The error's text names that process, for people."""


# --- writing ------------------------------------------------------------------------------------------------


def write_atomically(
    path: Path, content: str | bytes, *, mode: int | None = None, owner: tuple[int, int] | None = None
) -> None:
    """Write a file (text as UTF-8) that gets its name when it is complete; an older file of that name stays until then.

    mode: its permissions, from its first byte on and whatever the umask is; None: as the umask says.
    owner: user and group by number. After an error (`OSError`) nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as part:
        # O_EXCL: follows no link that somebody has put there.
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        with os.fdopen(handle, "wb") as stream:
            if mode is not None:
                os.fchmod(handle, mode)
            if owner is not None:
                os.fchown(handle, *owner)
            stream.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for libraries that write files themselves.

    At the end of the block the file written there becomes `path`; after any error it is removed. Raises `OSError`.
    """
    part = _part(path)
    try:
        yield part
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # it was not written yet, or its name is too long
            part.unlink()
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to fill. It becomes `path` at the end of the block; after an error it is removed
    with its contents. Raises `OSError`, also if `path` exists and is not empty."""
    part = _part(path)
    part.mkdir()
    try:
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what killed writers have left in a folder. Only for the holder of the folder's lock: a writer that still
    runs would lose its file."""
    for part in folder.glob(f"*{PART}"):
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    # Random, so that two writers of the same file don't write into one temporary file.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")


# --- locking ------------------------------------------------------------------------------------------------


@contextmanager
def hold(path: Path, *, shared: bool = False, seconds: float = inf) -> Iterator[None]:
    """Hold the lock of a file, which is made if it is missing, or of a folder.

    shared: together with other shared holders. seconds: how long to wait; 0 tries once. Raises `LockHeldError`.
    A lock file names its holder and is not removed afterwards. Missing folders above it are made, for this user alone,
    also when they are removed during the wait.
    """
    handle = _take(path, shared, seconds)
    try:
        if not shared and not path.is_dir():
            os.ftruncate(handle, 0)
            os.write(handle, f"{ascii(' '.join(sys.argv))[1:-1][:200]} (pid {os.getpid()})".encode())
        yield
    finally:
        os.close(handle)


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder if that can be done at once; it stays locked until it is closed or unlocked."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(handle: int) -> None:
    """Release an open file's lock. Works with a full disk, too."""
    fcntl.flock(handle, fcntl.LOCK_UN)


def _take(path: Path, shared: bool, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        handle = _opened(path)
        if try_lock(handle, shared=shared) and _is_still_there(handle, path):
            return handle
        os.close(handle)
        if time.monotonic() >= deadline:
            raise LockHeldError(_holder(path))
        time.sleep(_POLL_SECONDS)


def _opened(path: Path) -> int:
    if path.is_dir():
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _is_still_there(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: the lock's last holder may have removed it, or its folder."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    with suppress(OSError):  # a folder, or removed just now
        return path.read_text(errors="replace").strip() or "another process"
    return "another process"


# --- scratch files that are held ----------------------------------------------------------------------------


def make_held(prefix: str, *, folder: bool = False) -> tuple[Path, int]:
    """A new file or folder under the temporary folder, for this user alone, and the handle that keeps it locked.

    It is locked until the handle is closed or the process ends in any way; after that, `remove_left_over` removes it.
    Raises `OSError`.
    """
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(prefix=prefix))
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
        else:
            handle, name = tempfile.mkstemp(prefix=prefix)
            path = Path(name)
        if try_lock(handle) and _is_still_there(handle, path):
            return path, handle
        # Another process found it not yet locked, and is removing it.
        os.close(handle)


def remove_left_over(prefix: str, *, folder: bool = False) -> None:
    """Remove the files or folders that `make_held` made for processes of this user that have ended."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):  # of another user, of the other kind, a link, or gone meanwhile
            handle = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR))
            try:
                if _is_ours(handle, folder) and try_lock(handle):
                    shutil.rmtree(path) if folder else path.unlink()
            finally:
                os.close(handle)


def _is_ours(handle: int, folder: bool) -> bool:
    found = os.fstat(handle)
    is_kind = stat.S_ISDIR(found.st_mode) if folder else stat.S_ISREG(found.st_mode)
    return is_kind and found.st_uid == os.geteuid()
