"""Real stacks in temporary folders, and a look at the processes that belong to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from common.local.postgres import make_cluster, remove_cluster
from common.local.processes import TAG
from common.local.stack import Endpoints, LocalStack


@pytest.fixture(scope="session", autouse=True)
def keep_the_copied_binaries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For root: the binaries are not copied anew for every test, as long as one cluster is there."""
    cluster = make_cluster(tmp_path_factory.mktemp("placeholder"))
    yield
    remove_cluster(cluster)


@pytest.fixture
def processes_of() -> Callable[[Path], list[psutil.Process]]:
    """Every living process that has to do with a state directory, found without the stack's own records."""

    def find(state_dir: Path) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                tagged = process.environ().get(TAG, "").endswith(f"#{state_dir}")
                if tagged or any(str(state_dir) in word for word in process.cmdline()[1:]):
                    found.append(process)
        return found

    return find


@pytest.fixture
def make_stack(
    tmp_path: Path, processes_of: Callable[[Path], list[psutil.Process]]
) -> Iterator[Callable[[str], LocalStack]]:
    """Makes stacks by name; at the end they are purged, and nothing of them may be left."""
    stacks = []

    def make(name: str) -> LocalStack:
        stacks.append(LocalStack(tmp_path / name))
        return stacks[-1]

    yield make
    for stack in stacks:
        stack.down(purge=True)
        assert processes_of(stack.state_dir) == []
        assert not stack.state_dir.exists()


@pytest.fixture
def stack(make_stack: Callable[[str], LocalStack]) -> LocalStack:
    """One stack that does not run yet."""
    return make_stack("state")


@pytest.fixture
def query() -> Callable[..., list[tuple[Any, ...]]]:
    """Runs one statement on a stack's database."""

    def run(endpoints: Endpoints, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(endpoints.database_url.replace("+psycopg", "")) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    return run


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python code in a process of its own, killed at the end; talk to it over its standard streams."""
    with ExitStack() as processes:

        def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options,
            )  # fmt: skip
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start


@pytest.fixture
def start_sleep() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that has nothing to do with us, killed at the end."""
    with ExitStack() as processes:

        def start(**options: Any) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(["sleep", "600"], **options)
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start
