"""`maskwatch summary` and `maskwatch report` as a person or a machine calls them."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from common.cli import main
from tests.archive import Archive

#: Arguments of the command → exit code, standard output, standard error.
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def filled(archive: Archive) -> Archive:
    pipeline = archive.pipeline()
    lobby = archive.location("lobby", "Europe/Berlin", pipeline)
    street = archive.location("market-street", "Asia/Kolkata", pipeline)
    archive.image(lobby, datetime(2026, 3, 28, 8, 15, tzinfo=UTC), (3, 1, 1), pipeline=pipeline)
    archive.image(lobby, datetime(2026, 3, 29, 8, 15, tzinfo=UTC), (0, 0, 0), pipeline=pipeline)
    archive.image(street, datetime(2026, 3, 28, 8, 15, tzinfo=UTC), (1, 3, 0), pipeline=pipeline)
    archive.summarize()
    archive.session.commit()
    return archive


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["maskwatch", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


@pytest.fixture
def maskwatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


def test_table_for_people(filled: Archive, maskwatch: Command) -> None:
    code, out, err = maskwatch("summary")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "lobby (Europe/Berlin)",
        "  day             frames  faces  with mask  without  uncertain    rate  interval",
        "  2026-03-28 Sat       1      5          3        1          1  75.0 %   30–95 %",
        "  2026-03-29 Sun       1      0          0        0          0       –         –",
        "",
        "market-street (Asia/Kolkata)",
        "  day             frames  faces  with mask  without  uncertain    rate  interval",
        "  2026-03-28 Sat       1      4          1        3          0  25.0 %    5–70 %",
    ]


def test_json(filled: Archive, maskwatch: Command) -> None:
    code, out, _ = maskwatch("summary", "--location", "lobby", "--by", "hour", "--json")
    answer = json.loads(out)
    assert (code, answer["by"], len(answer["rows"])) == (0, "hour", 2)
    row = answer["rows"][0]
    assert (row["location"], row["start"], row["faces"], row["rate"]) == ("lobby", "2026-03-28T09:00:00+01:00", 5, 0.75)
    assert answer["rows"][1]["rate"] is None


def test_csv(filled: Archive, maskwatch: Command) -> None:
    _, out, _ = maskwatch("summary", "--by", "week", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["location"], row["start"], row["with_mask"]) for row in rows] == [
        ("lobby", "2026-03-23T00:00:00+01:00", "3"),
        ("market-street", "2026-03-23T00:00:00+05:30", "1"),
    ]


def test_bounds(filled: Archive, maskwatch: Command) -> None:
    _, out, _ = maskwatch("summary", "--since", "2026-03-28T09:00", "--until", "2026-03-28T10:00", "--json")
    assert [row["location"] for row in json.loads(out)["rows"]] == ["lobby"]


def test_nothing_found_says_what_to_do(filled: Archive, maskwatch: Command) -> None:
    code, out, err = maskwatch("summary", "--since", "2027-01-01")
    assert (code, out) == (0, "")
    assert "no figures in this range" in err
    assert "maskwatch run" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--location", "loby"), "unknown location 'loby' (known: lobby, market-street)"),
        (("--since", "yesterday"), "--since 'yesterday' is not a time"),
        (("--json", "--csv"), "exclude each other"),
    ],
)
def test_mistakes_are_one_line_and_a_code(
    filled: Archive, maskwatch: Command, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = maskwatch("summary", *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_report(filled: Archive, maskwatch: Command, tmp_path: Path) -> None:
    code, _, err = maskwatch("report", "--out", str(tmp_path / "report.html"))
    assert code == 0
    assert "report.html" in err
    assert "market-street" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["summary", "report"])
def test_help_has_an_example(command: str, maskwatch: Command) -> None:
    code, out, _ = maskwatch(command, "--help")
    assert code == 0
    assert f"  maskwatch {command}" in out
