"""Runs commands in processes of their own that are forked from one which has loaded the libraries.

A command needs most of its time to load libraries, so this halves what the tests cost. Modules of ours are loaded anew
by each process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: What most commands load. None of these starts threads, or reads MASKWATCH_ or AWS_ variables when it is loaded.
LIBRARIES = (
    "alembic.command", "boto3", "botocore.session", "celery.app.base", "click", "jinja2", "kombu.transport.redis",
    "psycopg", "pydantic_settings", "redis", "rich.console", "rich.progress", "rich.table", "structlog",
    "sqlalchemy.dialects.postgresql", "sqlalchemy.orm",
)  # fmt: skip

#: Variables that a process may have of its own. With any other one it is started as a person would start it, because a
#: library may have read that one when it was loaded.
OWN = ("MASKWATCH_", "AWS_", "PYTEST_")


#: The environment in which the tests began. (A test may have changed it by the time of the first command.)
BEFORE = dict(os.environ)


@cache
def _loaded() -> multiprocessing.context.ForkServerContext:
    """The context that forks a process which has loaded the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def run(
    arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path | None, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `maskwatch` with these arguments. Raises `subprocess.TimeoutExpired`."""
    names = {name for name in {*environment, *BEFORE} if not name.startswith(OWN)}
    if any(environment.get(name) != BEFORE.get(name) for name in names):
        return subprocess.run(
            [sys.executable, "-m", "common.cli", *arguments],
            env=environment, cwd=cwd, timeout=timeout, capture_output=True, text=True, check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        process = _loaded().Process(target=_command, args=(arguments, dict(environment), cwd or Path.cwd(), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        output, errors = (file.read_text(encoding="utf-8") for file in files)
        return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


def _command(arguments: tuple[str, ...], environment: dict[str, str], cwd: Path, files: tuple[Path, Path]) -> None:
    """What the forked process does."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["maskwatch", *arguments]
    from common.cli import main  # loaded in this process, with its own environment

    main()
