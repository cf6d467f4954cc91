"""What the words of everybody promise by themselves."""

from __future__ import annotations

import errno
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from common.domain import LINE_LIMIT, first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("the first line\nand more"), "the first line"),
        (ValueError("\n  an indented one  \nand more"), "an indented one"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (ValueError("x" * 10_000), "x" * LINE_LIMIT),
        (OSError(errno.ENOSPC, "No space left on device", "/secret/path"), "No space left on device"),
        (OSError("cannot identify image file"), "cannot identify image file"),
    ],
)
def test_an_error_says_one_line(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_an_error_of_the_database_tells_neither_statement_nor_parameters() -> None:
    server = psycopg.OperationalError("out of memory\nDETAIL:  Failed on request of size 8 (secret).")
    error = OperationalError("SELECT :password", {"password": "secret"}, server)
    assert "secret" in str(error), "or this shows nothing"
    assert first_line(error) == "out of memory"


def test_what_a_file_system_says_is_the_same_however_it_is_asked(tmp_path: Path) -> None:
    with pytest.raises(OSError) as missing:
        (tmp_path / "missing").read_bytes()
    assert first_line(missing.value) == missing.value.strerror == "No such file or directory"
