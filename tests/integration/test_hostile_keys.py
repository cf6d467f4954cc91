"""Keys are data: to the database, a path, a shell, a terminal and a browser they say nothing."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from common.cli.parts.console import visible
from common.settings import get_settings
from common.storage.store import FILE_BUCKET
from tests.hostile_media import KEYS, good
from tests.ledger_rows import dispatch, rows, scalar
from tests.services import Bucket, Services, locate, maskwatch
from workers.jobs.run import run_jobs

#: What a terminal would do something at. (It is not part of the module under test on purpose.)
ACTIVE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202e]")


@pytest.fixture
def analysed(services: Services, session: Session, bucket: Bucket) -> Bucket:
    """A bucket of hostile keys, every other of which holds a picture, worked off."""
    locate()
    for number, key in enumerate(KEYS):
        bucket.put(key, good(number) if number % 2 else b"no picture")
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    while refs := dispatch(session):
        run_jobs(refs, worker="test/1", settings=get_settings())
    return bucket


def test_hostile_keys_reach_the_ledger_as_they_are(analysed: Bucket, session: Session) -> None:
    found = rows(
        session, "SELECT m.key, j.state, j.detail FROM media_objects m JOIN jobs j ON j.media_object_id = m.id"
    )
    assert {row.key: row.state for row in found} == {
        key: "succeeded" if number % 2 else "quarantined" for number, key in enumerate(KEYS)
    }
    assert all(row.key in row.detail for row in found if row.state == "quarantined")
    assert scalar(session, "SELECT count(*) FROM faces") == len(KEYS) // 2


def test_commands_show_them_and_do_nothing_else(analysed: Bucket, session: Session, tmp_path: Path) -> None:
    shown = [maskwatch("jobs", "list", "--limit", "100", cwd=tmp_path), maskwatch("status", cwd=tmp_path)]
    shown += [
        maskwatch("jobs", "show", str(row.id), cwd=tmp_path) for row in rows(session, "SELECT id FROM jobs")[7:20:4]
    ]
    for done in shown:
        assert done.returncode == 0 and not ACTIVE.search(done.stdout + done.stderr), done.stdout
    listed = json.loads(maskwatch("jobs", "list", "--limit", "100", "--json").stdout)
    assert {entry["uri"] for entry in listed} == {f"{analysed.uri}/{key}" for key in KEYS}
    assert list(tmp_path.iterdir()) == []


def test_the_report_has_no_markup_of_theirs(analysed: Bucket, tmp_path: Path) -> None:
    # A location's name is a person's, but written into the same page.
    locate(name="<script>alert(1)</script>")
    assert maskwatch("summarize").returncode == 0
    assert maskwatch("report", "--out", str(tmp_path / "report.html")).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and html.escape("<script>alert(1)</script>") in page
    assert "onerror=alert" not in page.replace(html.escape("<img src=x onerror=alert(1)>"), "")


def test_annotated_images_stay_in_their_folder(analysed: Bucket, tmp_path: Path) -> None:
    inside = tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    done = maskwatch("annotate", analysed.uri, "--out", str(inside / "out"), "--json", cwd=inside)
    report = json.loads(done.stdout)
    assert len(report["annotated"]) == len(KEYS) // 2 and len(report["failed"]) == len(KEYS) // 2
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == len(KEYS) // 2
    assert all(path.is_relative_to(inside / "out") for path in written)


def test_a_file_of_a_hostile_name_is_named_harmlessly(services: Services, tmp_path: Path) -> None:
    done = maskwatch("backfill", f"{FILE_BUCKET}{tmp_path}/\x1b[2J\u202e", "--location", "lobby")
    assert done.returncode == 1 and "\\x1b[2J\\u202e" in done.stderr and not ACTIVE.search(done.stderr)
    # The control: what is said is what is active, but for being written out.
    assert ACTIVE.search("\x1b[2J") and visible("\x1b[2J\n\tä") == "\\x1b[2J\n\tä"
