"""Logs: what a traceback shows, before and after a process has configured them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

FAILING = """
import logging
{setup}

def fail(password):
    raise ValueError("it broke")

try:
    fail("".join(["s3cr", "et-of-a-frame"]))
except ValueError:
    {log}.exception("caught")
"""

OURS = "from common.observability.logs import configure_logging, get_logger"


def said(setup: str, log: str, *, terminal: bool) -> str:
    """What a process says of an error that it has caught."""
    argv = [sys.executable, "-c", FAILING.format(setup=setup, log=log)]
    if not terminal:
        return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    ours, its = pty.openpty()
    with subprocess.Popen(argv, stdout=its, stderr=its) as process:
        os.close(its)
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # how a terminal ends
            pass
    os.close(ours)
    assert process.returncode == 0
    return b"".join(parts).decode()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("setup", "log"),
    [(OURS, "get_logger('ours')"), (f"{OURS}\nconfigure_logging()", "get_logger('ours')"),
     (f"{OURS}\nconfigure_logging()", "logging.getLogger('a.library')")],
)  # fmt: skip
def test_a_traceback_shows_no_local_variables(setup: str, log: str, terminal: bool) -> None:
    words = said(setup, log, terminal=terminal)
    assert "it broke" in words and "Traceback" in words
    assert "s3cret-of-a-frame" not in words


def test_structlog_would_show_them_by_itself() -> None:
    """The control: what a process said that had not configured its logs."""
    assert "s3cret-of-a-frame" in said("import structlog", "structlog.get_logger()", terminal=False)


def test_what_is_logged_is_no_result() -> None:
    """A command's results go to standard output, and its logs never do."""
    script = f"{OURS}\nget_logger('x').warning('hello')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "" and "hello" in done.stderr
