"""Secrets are planted, and looked for in everything that Maskwatch says, good days and bad, and in `ps`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from common.messaging.queues import TaskName, send
from tests.redis_server import PASSWORD as REDIS_PASSWORD
from tests.redis_server import redis_server, shipped_users
from tests.services import QUICK, Services, forget_settings, kill_tree, locate, maskwatch, running, wait_until

DATABASE_PASSWORD = "Db-Secr3t/7351@x"
AWS_KEY = "Aws-Secr3t-7351"
#: A part of each that no escaping changes, and of the wrong ones that some runs are given.
MARKS = ("Db-Secr3t", "p/ss:w@rd", "p%2Fss", "Aws-Secr3t", "Wr0ng-Secr3t")

#: Makes the task fail in a way that nobody thought of, with secrets at hand in its frame.
FAULT = """
import workers.jobs.run

def run_jobs(*arguments, **options):
    from common.settings import get_settings
    database = get_settings().database
    url, password = database.url.get_secret_value(), database.password.get_secret_value()
    raise RuntimeError({said})

workers.jobs.run.run_jobs = run_jobs
"""


class Watch:
    """Everything that was said so far, and the command lines of all processes that were seen."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.argvs: set[str] = set()
        self._over = threading.Event()

    def hear(self, who: str, words: str) -> None:
        self.said.append((who, words))

    def leaks(self) -> list[str]:
        """Where a secret shows, by who said it."""
        places = [*self.said, *(("ps", argv) for argv in self.argvs)]
        return [f"{who}: {mark}" for who, words in places for mark in MARKS if mark in words]

    @contextmanager
    def looking(self) -> Iterator[Watch]:
        """Look at `ps` all the time."""

        def look() -> None:
            while not self._over.wait(0.1):
                for process in psutil.process_iter():
                    with suppress(psutil.Error):
                        self.argvs.add(" ".join(process.cmdline()))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()


@pytest.fixture
def planted(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """The environment of a deployment with secrets that can be recognised: a database role and a Redis user have
    them as their passwords."""
    url = make_url(services.endpoints.database_url)
    owner = create_engine(url)
    with owner.begin() as connection:
        connection.execute(text(f"CREATE ROLE planted LOGIN SUPERUSER PASSWORD '{DATABASE_PASSWORD}'"))
    with redis_server(tmp_path, "--aclfile", str(shipped_users(tmp_path))) as server:
        without = url.set(username="planted", password=None).render_as_string(hide_password=False)
        environment = {
            **QUICK,
            **server.environment("admin"),
            "MASKWATCH_DATABASE__URL": without,
            "MASKWATCH_DATABASE__PASSWORD": DATABASE_PASSWORD,
            "AWS_SECRET_ACCESS_KEY": AWS_KEY,
            "PLANTED_DATABASE_URL": url.set(username="planted", password=DATABASE_PASSWORD).render_as_string(
                hide_password=False
            ),
            "PLANTED_BROKER_URL": f"redis://maskwatch-admin:{quote(REDIS_PASSWORD, safe='')}@127.0.0.1:{server.port}/0",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        forget_settings()
        yield environment
        forget_settings()
    with owner.begin() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'planted'"))
        connection.execute(text("DROP ROLE planted"))
    owner.dispose()


def with_fault(folder: Path, said: str) -> dict[str, str]:
    """The environment of a worker whose task fails with these words."""
    folder.mkdir()
    code = FAULT.format(said=said)
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('FAULTY'):\n"
        "    import threading, sys, time\n"
        "    def plant():\n"
        "        while 'workers.tasks' not in sys.modules: time.sleep(0.01)\n"
        f"        exec({code!r}, {{}})\n"
        "    threading.Thread(target=plant, daemon=True).start()\n"
    )
    return {"PYTHONPATH": str(folder), "FAULTY": "1"}


def message_of_one_job() -> list[object]:
    return [[[1, "00000000-0000-4000-8000-000000000000"]]]


#: What goes well.
GOOD = (("status",), ("doctor", "--json"), ("backfill", "s3://nowhere", "--location", "lobby"))


def bad(planted: Mapping[str, str]) -> list[tuple[tuple[str, ...], dict[str, str]]]:
    """What goes wrong, and how."""
    database, broker = planted["PLANTED_DATABASE_URL"], planted["PLANTED_BROKER_URL"]
    away = "postgresql+psycopg://planted@127.0.0.1:1/x"
    unescaped = f"postgresql+psycopg://planted:{DATABASE_PASSWORD}@127.0.0.1:1/x"
    unescaped_redis = f"redis://maskwatch-admin:{REDIS_PASSWORD}@127.0.0.1:1/0"
    wrong = "Wr0ng-Secr3t"
    return [
        (("doctor",), {"MASKWATCH_DATABASE__PASSWORD": wrong}),
        (("producer",), {"MASKWATCH_DATABASE__PASSWORD": wrong}),
        (("status",), {"MASKWATCH_DATABASE__URL": away}),
        (("doctor",), {"MASKWATCH_DATABASE__URL": unescaped}),
        (("status",), {"MASKWATCH_DATABASE__URL": database.replace("postgresql+psycopg", "mysql")}),
        (("doctor",), {"MASKWATCH_DATABASE__URL": f"{database}&password={wrong}"}),
        (("status",), {"MASKWATCH_DATABASE__POOL_SIZE": wrong, "MASKWATCH_DATABAS__PASSWORD": wrong}),
        (("status",), {"MASKWATCH_DATABASE": f'{{"url": "{wrong}'}),
        (("doctor",), {"MASKWATCH_BROKER__PASSWORD": wrong}),
        (("status",), {"MASKWATCH_BROKER__URL": f"{broker.rpartition(':')[0]}:1/0"}),
        (("status",), {"MASKWATCH_BROKER__URL": unescaped_redis}),
        (("worker",), {"MASKWATCH_BROKER__URL": f"rediss://u:{wrong}/x@h"}),
        (("aggregator",), {"MASKWATCH_BROKER__PASSWORD": wrong}),
    ]


def test_no_secret_shows_anywhere(planted: Mapping[str, str], session: Session, tmp_path: Path) -> None:
    locate()
    watch = Watch()

    def run(command: tuple[str, ...], env: Mapping[str, str]) -> int:
        done = maskwatch(*command, env={"COLUMNS": "500", **env}, timeout=300)
        watch.hear(f"{' '.join(command)} {sorted(env)}", done.stdout + done.stderr)
        return done.returncode

    with watch.looking(), ThreadPoolExecutor(2) as pool:
        goes_well = list(pool.map(lambda command: run(command, {}), GOOD))
        url_only = {"MASKWATCH_DATABASE__URL": planted["PLANTED_DATABASE_URL"]}
        url_only |= {"MASKWATCH_BROKER__URL": planted["PLANTED_BROKER_URL"]}
        run(("doctor",), url_only)
        goes_wrong = list(pool.map(lambda each: run(*each), bad(planted)))
        logs = _processes_run_and_their_tasks_fail(tmp_path, "'boom'")
    for log in logs:
        watch.hear(log.name, log.read_text(errors="replace"))
    assert goes_well[0] == 0 and "s3://nowhere" in watch.said[2][1], watch.said[: len(GOOD)]
    assert all(goes_wrong), [watch.said[len(GOOD) + 1 + at] for at, code in enumerate(goes_wrong) if not code]
    assert sum("boom" in words for who, words in watch.said if "worker" in who) >= 2, "on a terminal and not"
    assert any("maskwatch" in argv or "common.cli" in argv for argv in watch.argvs)
    assert watch.leaks() == []


def _processes_run_and_their_tasks_fail(folder: Path, said: str, *, terminal: bool = True) -> list[Path]:
    """A producer, an aggregator, a worker, and one on a terminal; each worker gets a message. Their logs."""
    fault = with_fault(folder / "fault", said)
    logs = [folder / f"{name}.log" for name in ("producer", "aggregator", "worker", "worker-on-a-terminal")]
    with ExitStack() as exits:
        if terminal:
            exits.enter_context(running("producer", log=logs[0]))
            exits.enter_context(running("aggregator", log=logs[1]))
        with running("worker", log=logs[2], env=fault):
            _fails_once(logs[2])
        if terminal:
            with on_a_terminal("worker", log=logs[3], env=fault):
                _fails_once(logs[3])
    return [log for log in logs if log.exists()]


def _fails_once(log: Path) -> None:
    wait_until(lambda: log.exists() and " ready." in log.read_text(errors="replace"), seconds=180, what="the worker")
    send(TaskName.ANALYZE, message_of_one_job())
    wait_until(lambda: "Traceback" in log.read_text(errors="replace"), seconds=120, what="the failure")
    time.sleep(1)


@contextmanager
def on_a_terminal(*arguments: str, log: Path, env: Mapping[str, str]) -> Iterator[None]:
    """A command whose output is a terminal, where logs are for people."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "common.cli", *arguments],
        env={**os.environ, **env}, stdin=its, stdout=its, stderr=its, start_new_session=True,
    )  # fmt: skip
    os.close(its)

    def copy() -> None:
        with log.open("ab", buffering=0) as output, suppress(OSError):
            while content := os.read(ours, 65536):
                output.write(content)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        kill_tree(process)
        thread.join(30)
        os.close(ours)


def test_the_search_finds_what_is_said_on_purpose(planted: Mapping[str, str], tmp_path: Path) -> None:
    """The control: the same search, where a secret is in an error's text and in an argument."""
    watch = Watch()
    with watch.looking():
        for log in _processes_run_and_their_tasks_fail(tmp_path, "url + ' ' + password", terminal=False):
            watch.hear(log.name, log.read_text())
        subprocess.run([sys.executable, "-c", "import time; time.sleep(2)", AWS_KEY], check=True)
    assert {"worker.log: Db-Secr3t", "ps: Aws-Secr3t"} <= set(watch.leaks())
