"""The processes that do the work on one machine: a producer, an aggregator and some workers.

Real Celery processes, started by the command that needs them and stopped when it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.domain import MaskwatchError
from common.machine import threads_per_process

#: How long a process may take to stop, in seconds: a worker first finishes its current image.
STOP_SECONDS = 30


@contextmanager
def work_processes(workers: int, *, state_dir: Path | None) -> Iterator[list[int]]:
    """Run a producer, an aggregator and `workers` workers against the deployment in the environment.

    With `state_dir` they belong to the embedded stack there, which also stops the processes that a killed command
    leaves behind; without it they are children of this process. Yields their process ids.
    """
    commands = {"producer": ["producer"], "aggregator": ["aggregator"]}
    commands |= {f"worker-{number}": ["worker", "--name", f"worker-{number}"] for number in range(1, workers + 1)}
    # Processes × threads must not exceed the cores: oversubscribed, a forward pass is many times slower.
    threads = threads_per_process(workers)
    environment = {"MASKWATCH_WORKER__THREADS": str(threads), "MASKWATCH_WORKER__PROCESSES": "1"}
    # They live for one command, and can't all serve their metrics on one port.
    environment["MASKWATCH_METRICS__PORT"] = "0"
    pids: list[int] = []
    started: list[subprocess.Popen[bytes]] = []
    stack = None
    if state_dir:
        from common.local.stack import LocalStack  # in an optional layer, not installed where a database is configured

        stack = LocalStack(state_dir)
    try:
        for name, arguments in commands.items():
            argv = maskwatch(*arguments)
            if stack:
                pids.append(stack.spawn(name, argv, environment))
            else:
                # Standard output is for the results of the command that started them.
                started.append(
                    subprocess.Popen(argv, env={**os.environ, **environment}, stdout=sys.stderr, start_new_session=True)
                )
                pids.append(started[-1].pid)
        yield pids
    finally:
        # The embedded stack stops what this process spawned in it when its session ends.
        _stop(started)


def maskwatch(*arguments: str) -> list[str]:
    """The command line of a sub-command, run by the same Python interpreter."""
    return [sys.executable, "-m", "common.cli", *arguments]


def call(*arguments: str) -> None:
    """Run a sub-command of the producer or the workers, which `common` may not import."""
    done = subprocess.run(maskwatch(*arguments), stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise MaskwatchError(f"`maskwatch {' '.join(arguments)}` failed with exit code {done.returncode}")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
