"""docs/schema.md is complete, and every query in it runs and says what it promises."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.tables import Base
from common.domain import JobState
from tests import ROOT
from tests.archive import Archive

DOCUMENT = (ROOT / "docs" / "schema.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"```sql\n(.*?)```", DOCUMENT, flags=re.DOTALL)
VIEWS = ("face_results", "visit_results", "compliance_by_hour", "compliance_by_day", "coverage_hourly")


@pytest.fixture
def filled(session: Session) -> Session:
    """A lobby with a busy hour, an empty one, and an object in quarantine."""
    archive = Archive(session)
    pipeline = archive.pipeline()
    lobby = archive.location("lobby", "Europe/Berlin", pipeline)
    door = archive.camera(lobby, "door")
    archive.image(lobby, datetime(2026, 3, 28, 8, 15, tzinfo=UTC), (3, 1, 1), pipeline=pipeline, camera=door)
    archive.image(lobby, datetime(2026, 3, 28, 2, 15, tzinfo=UTC), (0, 0, 0), pipeline=pipeline)
    archive.job(archive.media(lobby, "bad.jpg"), pipeline, JobState.QUARANTINED, reason="empty_file")
    archive.summarize()
    return session


def test_at_least_eight_queries() -> None:
    assert len(QUERIES) >= 8


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_query_runs(query: str, filled: Session) -> None:
    filled.execute(text(query.replace(":", r"\:"))).all()


def _one(part: str) -> str:
    (query,) = [query for query in QUERIES if part in query]
    return query.replace(":", r"\:")


def test_images_behind_an_hour_are_found(filled: Session) -> None:
    (row,) = filled.execute(text(_one("h.local_hour = "))).all()
    assert (row.faces, row.without_mask, row.camera) == (5, 1, "door")


def test_check_of_the_sums_finds_a_difference_and_only_then(filled: Session) -> None:
    assert filled.execute(text(_one("FULL JOIN"))).all() == []
    filled.execute(text("DELETE FROM faces WHERE status = 'with_mask' AND id = (SELECT min(id) FROM faces)"))
    assert len(filled.execute(text(_one("FULL JOIN"))).all()) == 1


def test_empty_hour_and_quarantine_are_shown(filled: Session) -> None:
    assert len(filled.execute(text(_one("faces = 0"))).all()) == 1
    (row,) = filled.execute(text(_one("min(m.bucket"))).all()
    assert (row.reason, row.jobs, row.example) == ("empty_file", 1, "s3://footage/bad.jpg")


@pytest.mark.parametrize("table", sorted(Base.metadata.tables))
def test_table_is_described(table: str) -> None:
    assert re.search(rf"^\| `{table}` \|", DOCUMENT, flags=re.MULTILINE)


@pytest.mark.parametrize("view", VIEWS)
def test_view_and_its_columns_are_described(view: str, session: Session) -> None:
    section = DOCUMENT.split(f"### {view}\n")[1].split("\n#")[0]
    columns = session.scalars(
        text("SELECT column_name FROM information_schema.columns WHERE table_name = :view"), {"view": view}
    ).all()
    assert columns
    assert [column for column in columns if f"`{column}`" not in section] == []


def test_every_view_is_known_to_this_test(session: Session) -> None:
    found = session.scalars(text("SELECT table_name FROM information_schema.views WHERE table_schema = 'public'")).all()
    assert sorted(found) == sorted(VIEWS)
