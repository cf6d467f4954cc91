"""A mutant that fits no statement any more fails its test, instead of proving nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.mutants import Rewrite, planted, planted_in_processes

FITS = Rewrite(of="AS answer", pattern=r"SELECT 1", by="SELECT 2")
UNFIT = Rewrite(of="AS answer", pattern=r"SELECT 3", by="SELECT 4")

ASK = """
from sqlalchemy import create_engine, text

print(create_engine("sqlite://").connect().scalar(text("SELECT 1 AS answer")))
"""


def answer() -> int:
    with create_engine("sqlite://").connect() as connection:
        return int(connection.scalar(text("SELECT 1 AS answer")) or 0)


def test_statements_are_rewritten_in_the_block_and_not_behind_it() -> None:
    with planted(FITS):
        assert answer() == 2
    assert answer() == 1


def test_a_rewrite_that_never_fits_is_an_error() -> None:
    with pytest.raises(AssertionError, match="SELECT 3"), planted(FITS, UNFIT):
        assert answer() == 2
    assert answer() == 1


def ask_in_a_process(folder: Path, *rewrites: Rewrite) -> str:
    with planted_in_processes(folder, *rewrites) as env:
        return subprocess.run(
            [sys.executable, "-c", ASK], env=env, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()


def test_processes_are_told_apart_in_the_same_way(tmp_path: Path) -> None:
    assert ask_in_a_process(tmp_path / "fits", FITS) == "2"
    with pytest.raises(AssertionError, match="SELECT 3"):
        ask_in_a_process(tmp_path / "unfit", FITS, UNFIT)
