"""Detached processes: start them, know them again, and stop them without ever touching a stranger's.

A pid alone names a process only while it lives; afterwards the kernel gives the number to somebody else. So a
process is remembered as its pid and the moment it started, and is signalled only while both still fit. Every
process of a stack also carries a tag in its environment, which its children inherit: what a crash left
unrecorded is found by it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

#: Environment variable with the tag: the state directory, `#`, what the process is.
TAG = "MASKWATCH_LOCAL_TAG"

#: A log that has grown beyond this is set aside (one old copy is kept) when its process starts again.
LOG_BYTES = 10 * 2**20

_POLL_SECONDS = 0.02


class ProcessRef(BaseModel):
    """One process, distinguishable from a later one with the same pid."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The process that has this pid now; None where there is none."""
        started = _started(pid)
        return None if started is None else cls(pid=pid, started=started)

    def alive(self) -> bool:
        """Whether it still runs. A zombie, which only waits for its parent to look at it, does not."""
        with suppress(ChildProcessError):  # not our child: its parent collects it
            os.waitpid(self.pid, os.WNOHANG)
        if _started(self.pid) != self.started:
            return False
        try:
            return psutil.Process(self.pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False


def _started(pid: int) -> str | None:
    """When the process with this pid started, as a string that is compared and never interpreted."""
    try:
        # Clock ticks since boot: unlike the wall-clock time that psutil derives from them, they stay the same
        # when somebody sets the clock. The boot is part of it, as ticks begin anew with each.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{_boot_id()}/{fields[19]}"
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # no /proc: macOS keeps the absolute start time itself
        return repr(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def service_environment(tag: str) -> dict[str, str]:
    """What a service gets to see of the caller's environment: no PG* variables, which would redirect Postgres,
    and no secrets, which a daemon would keep readable for as long as it lives."""
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C", TAG: tag}


def start_detached(argv: Sequence[str], env: Mapping[str, str], log: Path, stdin: int | None = None) -> ProcessRef:
    """Start a process in a session of its own, which outlives us; its output is appended to `log`.

    `argv[0]` is a path. `stdin` is a descriptor to hand over; without one it reads nothing.
    """
    rotate(log)
    with log.open("ab") as output, Path(os.devnull).open("rb") as nothing:
        # posix_spawn rather than subprocess: there is no Popen object that would have to be kept and waited for,
        # and it is safe beside threads.
        pid = os.posix_spawn(
            argv[0],
            list(argv),
            env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, nothing.fileno() if stdin is None else stdin, 0),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM),
        )
    ref = ProcessRef.of(pid)
    assert ref is not None, "a child that nobody has waited for keeps its pid"
    return ref


def rotate(log: Path) -> None:
    """Set a log that has grown large aside."""
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))


def stop(ref: ProcessRef, steps: Iterable[tuple[signal.Signals, float]]) -> None:
    """Send each signal in turn, waiting up to its seconds for the process to end; nothing to one that has ended."""
    for number, seconds in steps:
        if not ref.alive():
            return
        with suppress(ProcessLookupError):
            os.kill(ref.pid, number)
        wait_until(lambda: not ref.alive(), seconds)


def stop_session(ref: ProcessRef, seconds: float) -> None:
    """SIGTERM to the leader, and after its end or the deadline SIGKILL to all that is left of its process group."""
    if not ref.alive():
        return  # who leads the group now, if there is one, can't be told: the tag finds what is left
    stop(ref, [(signal.SIGTERM, seconds)])
    # While a group has members its number isn't given away, so it is still ours unless a new process has the pid.
    if _started(ref.pid) in (None, ref.started):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(ref.pid, signal.SIGKILL)
    wait_until(lambda: not ref.alive(), 5.0)


def stop_tagged(prefix: str) -> None:
    """Stop every process whose tag is `prefix` or begins with it, except ourselves and our ancestors."""
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    refs = [ref for ref in _tagged(prefix) if ref.pid not in spared]
    stop_all(refs)


def stop_all(refs: Sequence[ProcessRef], seconds: float = 5.0) -> None:
    """SIGTERM to all, and SIGKILL to those that remain after the deadline."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for ref in refs:
            if ref.alive():
                with suppress(ProcessLookupError):
                    os.kill(ref.pid, number)
        if wait_until(lambda: not any(ref.alive() for ref in refs), seconds):
            return


def _tagged(prefix: str) -> Iterator[ProcessRef]:
    for process in psutil.process_iter():
        ref = ProcessRef.of(process.pid)
        with suppress(psutil.Error, OSError):  # other users' processes don't show theirs
            if ref is not None and process.environ().get(TAG, "").startswith(prefix):
                yield ref


def working_in(folder: Path) -> list[ProcessRef]:
    """The processes whose working directory is `folder`: Postgres and its backends work in their data directory,
    and the backends overwrite their environment with their title."""
    found = []
    for process in psutil.process_iter():
        ref = ProcessRef.of(process.pid)
        with suppress(psutil.Error, OSError):
            if ref is not None and Path(process.cwd()) == folder:
                found.append(ref)
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true within the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def last_lines(log: Path) -> str:
    """The last three lines of a log, as one line for an error message."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-3:]) or "it wrote nothing"
