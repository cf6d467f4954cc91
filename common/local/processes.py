"""Detached processes: starts them, recognizes them later, and stops them without ever touching other processes.

A pid names a process only while it lives; afterwards the kernel may give the number to another process. So a process is
recorded by its pid and its start time, and is signalled only while both still match. Every process of a stack also
carries a tag in its environment, which its children inherit: processes that a crash left unrecorded are found by it.
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

#: Environment variable with the tag: what the process is, `#`, the state directory.
TAG = "MASKWATCH_LOCAL_TAG"

#: A log larger than this is renamed when its process starts again; one old copy is kept.
LOG_BYTES = 10 * 2**20

_POLL_SECONDS = 0.02


class ProcessRef(BaseModel):
    """One process, distinguishable from a later process with the same pid."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The process that has this pid now; None if there is none."""
        found = _look_up(pid)
        return None if found is None else cls(pid=pid, started=found[0])

    def alive(self) -> bool:
        """Whether the process still runs. A zombie, which only waits to be collected by its parent, does not."""
        found = _look_up(self.pid)
        if found is None or found[0] != self.started:
            return False
        if found[1]:
            with suppress(ChildProcessError):  # not our child: its parent collects it
                os.waitpid(self.pid, os.WNOHANG)
        return not found[1]


def _look_up(pid: int) -> tuple[str, bool] | None:
    """When the process started, as a string that is only compared, and whether it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _look_up_without_proc(pid)
    # Clock ticks since boot: unlike psutil's wall-clock time, they stay the same when somebody sets the clock. The id
    # of the boot is a part of the string, because ticks start at 0 with each boot.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{fields[19]}", fields[0] in "ZX"


def _look_up_without_proc(pid: int) -> tuple[str, bool] | None:
    """The same on macOS, which records the absolute time; None for a process that has ended."""
    try:
        process = psutil.Process(pid)
        return repr(process.create_time()), process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None


def service_environment(its_tag: str) -> dict[str, str]:
    """The environment of a service: the caller's, without PG* variables, which would redirect Postgres, and without
    secrets, which would stay readable for as long as the service runs."""
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C", TAG: its_tag}


def start_detached(argv: Sequence[str], env: Mapping[str, str], log: Path, stdin: int | None = None) -> ProcessRef:
    """Start a process in a session of its own, which outlives this process; its output is appended to `log`.

    `argv[0]` is a path. `stdin` is the descriptor of its standard input; None: the null device.
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
    """Rename a log that has grown too large."""
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
        return  # the group's number may belong to other processes now: the tag finds what is left
    stop(ref, [(signal.SIGTERM, seconds)])
    # The kernel doesn't reuse a group's number while it has members: it is ours unless a new process has the pid.
    if ProcessRef.of(ref.pid) in (None, ref):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(ref.pid, signal.SIGKILL)
    wait_until(lambda: not ref.alive(), 5.0)


def tag(name: str, state_dir: Path) -> str:
    """The tag of one process of a stack and its children. The name holds no `#`."""
    return f"{name}#{state_dir}"


def stop_tagged(wanted: str) -> None:
    """Stop every process with this tag."""
    _stop_where(lambda found: found == wanted)


def stop_stack(state_dir: Path) -> None:
    """Stop every process of this state directory's stack, except this process and its ancestors."""
    _stop_where(lambda found: found.partition("#")[2] == str(state_dir))


def _stop_where(matches: Callable[[str], bool]) -> None:
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    stop_all([ref for ref in _tagged(matches) if ref.pid not in spared])


def stop_all(refs: Sequence[ProcessRef], seconds: float = 5.0) -> None:
    """SIGTERM to all, and SIGKILL to those that remain after the deadline."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for ref in refs:
            if ref.alive():
                with suppress(ProcessLookupError):
                    os.kill(ref.pid, number)
        if wait_until(lambda: not any(ref.alive() for ref in refs), seconds):
            return


def _tagged(matches: Callable[[str], bool]) -> Iterator[ProcessRef]:
    for pid in psutil.pids():
        ref = ProcessRef.of(pid)
        with suppress(psutil.Error, OSError):  # other users' processes don't show theirs
            found = psutil.Process(pid).environ().get(TAG)
            if ref is not None and found is not None and matches(found) and _shares_our_files(pid):
                yield ref


def _shares_our_files(pid: int) -> bool:
    """Whether a path means the same file to that process: root also sees processes in containers."""
    try:
        return Path(f"/proc/{pid}/ns/pid").samefile("/proc/self/ns/pid")
    except FileNotFoundError:
        return not Path("/proc/self/ns").exists()


def working_in(folder: Path, program: str) -> list[ProcessRef]:
    """The processes of this program whose working directory is `folder`: the backends of Postgres work in their data
    directory, and have overwritten their environment with their title."""
    found = []
    for pid in psutil.pids():
        ref = ProcessRef.of(pid)
        with suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if ref and process.name() == program and Path(process.cwd()) == folder and _shares_our_files(pid):
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


def last_lines(log: Path, since: int = 0) -> str:
    """The last fatal error in a log, from byte `since` on, or its last three lines if there is none."""
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if "FATAL:" in line or "error:" in line]
    return " | ".join(fatal[-1:] or lines[-3:]) or "it wrote nothing"
