"""File locks that the kernel releases when their holder dies, so that a kill -9 blocks nobody."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.domain import MaskwatchError
from common.local.processes import wait_until


@contextmanager
def exclusive(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock alone; waits up to `seconds`, then names who has it."""
    file = _take(path, fcntl.LOCK_EX, seconds)
    try:
        file.truncate(0)
        file.write(f"{ascii(' '.join(sys.argv))[1:-1][:200]} (pid {os.getpid()})")
        file.flush()
        yield
    finally:
        file.close()


@contextmanager
def shared(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock together with others who share it."""
    file = _take(path, fcntl.LOCK_SH, seconds)
    try:
        yield
    finally:
        file.close()


@contextmanager
def exclusive_if_free(path: Path) -> Iterator[bool]:
    """Whether the lock could be had alone at once; held until the end of the block."""
    with path.open("a+") as file:
        yield _try(file, fcntl.LOCK_EX)


def still_there(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`: its folder may be removed while one waits for a lock."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _take(path: Path, kind: int, seconds: float) -> IO[str]:
    held: list[IO[str]] = []

    def attempt() -> bool:
        path.parent.mkdir(mode=0o700, exist_ok=True)  # removed by a purge while we waited
        file = path.open("a+")
        if _try(file, kind) and still_there(file, path):
            held.append(file)
            return True
        file.close()
        return False

    if not wait_until(attempt, seconds):
        holder = path.read_text().strip() or "another process"
        raise MaskwatchError(f"the embedded services are being started or stopped by {holder}; waited {seconds:.0f} s")
    return held[0]


def _try(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
