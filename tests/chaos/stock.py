"""A plain Celery app with every setting as Celery ships it: what Maskwatch without its ledger would be, the control of
`kill-9`.

One task per picture writes a row to a table of its own. By default a task is acknowledged before it begins, and four
more per process wait in the worker's memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from celery import Celery
from sqlalchemy import Engine, create_engine, text

from tests import ROOT
from tests.services import kill_tree

TABLE = "CREATE TABLE stock_rows (picture integer NOT NULL, worker text NOT NULL)"

#: About as long as a small picture takes a worker of ours, from claim to commit.
WORK_SECONDS = 0.05

app = Celery("stock", set_as_current=False)


@lru_cache(maxsize=1)
def _engine() -> Engine:
    """Of the child: made on first use, and so not before the fork."""
    return create_engine(os.environ["MASKWATCH_DATABASE__URL"])


@app.task(name="stock.analyse", bind=True)
def analyse(self: object, image: int) -> None:
    """Take as long as a picture takes, and record it."""
    time.sleep(WORK_SECONDS)
    row = {"picture": image, "worker": self.request.hostname}  # type: ignore[attr-defined]
    with _engine().begin() as connection:
        connection.execute(text("INSERT INTO stock_rows VALUES (:picture, :worker)"), row)


def send(count: int) -> None:
    """One message per picture."""
    with app.connection_for_write(os.environ["MASKWATCH_BROKER__URL"]) as connection:
        for image in range(count):
            app.send_task("stock.analyse", args=[image], connection=connection)


@contextmanager
def worker(name: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of this app, with as many processes as there are cores; killed at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tests.chaos.stock", "worker", "-n", f"{name}@stock"],
            env={**os.environ, "CELERY_BROKER_URL": os.environ["MASKWATCH_BROKER__URL"]},
            cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_tree(process)
