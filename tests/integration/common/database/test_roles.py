"""Least authority: every part of a deployment works with its own role, and may not do what it has no need to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from common.catalog import schedule
from common.database import roles
from common.database.tables import Base
from tests.ledger_rows import scalar, states
from tests.photos import face_jpeg
from tests.services import QUICK, Bucket, Services, locate, maskwatch, running, wait_until

PARTS = ("producer", "worker", "aggregator", "analyst")


@pytest.fixture
def logins(services: Services) -> Iterator[Mapping[str, str]]:
    """The URL of a login per role, with the rights granted; `migrator` owns a database of its own."""
    assert maskwatch("db", "grant").returncode == 0
    owner = make_url(services.environment["MASKWATCH_DATABASE__URL"])
    server = create_engine(owner, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        for part in PARTS:
            connection.execute(text(f"CREATE ROLE test_{part} LOGIN PASSWORD '{part}' IN ROLE maskwatch_{part}"))
        connection.execute(text("CREATE ROLE test_migrator LOGIN PASSWORD 'migrator'"))
        connection.execute(text("CREATE DATABASE test_owned OWNER test_migrator"))
    urls = {part: owner.set(username=f"test_{part}", password=part) for part in (*PARTS, "migrator")}
    urls["migrator"] = urls["migrator"].set(database="test_owned")
    yield {part: url.render_as_string(hide_password=False) for part, url in urls.items()}
    with server.connect() as connection:
        connection.execute(text("DROP DATABASE test_owned WITH (FORCE)"))
        for part in (*PARTS, "migrator"):
            connection.execute(text(f"DROP ROLE test_{part}"))
        for role in roles.RIGHTS:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))
    server.dispose()


def as_role(logins: Mapping[str, str], part: str) -> dict[str, str]:
    return {"MASKWATCH_DATABASE__URL": logins[part]}


def test_everything_works_with_a_role_for_each_part(
    logins: Mapping[str, str], session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    locate("door")
    for number in range(3):
        bucket.put(f"2024/05/{number + 1:02}.jpg", face_jpeg(number))
    with ExitStack() as exits:
        for part in ("producer", "worker", "aggregator"):
            env = {**QUICK, **as_role(logins, part)}
            exits.enter_context(running(part, log=tmp_path / f"{part}.log", env=env))
        backfill = ("backfill", bucket.uri, "--location", "lobby", "--camera", "door", "--time-pattern", "%Y/%m/%d.jpg")
        done = maskwatch(*backfill, "--wait", env=as_role(logins, "producer"), timeout=240)
        assert done.returncode == 0, done.stderr
        # A newer version withdraws what the older one has left.
        bucket.put("2024/05/01.jpg", face_jpeg(7))
        assert maskwatch(*backfill, "--wait", env=as_role(logins, "producer"), timeout=240).returncode == 0
        wait_until(lambda: not scalar(session, "SELECT count(*) FROM dirty_marks"), what="the summaries")
    assert states(session) == {"succeeded": 3, "cancelled": 1}
    assert scalar(session, "SELECT count(*) FROM faces_2024_05") == 3  # the producer had the month made
    listed = maskwatch("summary", "--location", "lobby", "--json", env=as_role(logins, "analyst"))
    assert listed.returncode == 0, listed.stderr
    assert sum(row["faces"] for row in json.loads(listed.stdout)["rows"]) == 3
    for command in (("jobs", "cancel", "1"), ("jobs", "rerun", "3"), ("status",), ("sources", "list")):
        done = maskwatch(*command, env=as_role(logins, "producer"))
        assert "lacks a right" not in done.stderr, done.stderr


def test_the_producer_may_delete_slots_that_ended_long_ago(logins: Mapping[str, str], session: Session) -> None:
    engine = create_engine(logins["producer"])
    with Session(engine) as producer:
        assert schedule.prune_slots(producer) == 0
        session.execute(text("REVOKE DELETE ON camera_slots FROM maskwatch_producer"))
        session.commit()
        with pytest.raises(ProgrammingError, match="permission denied"):
            schedule.prune_slots(producer)
    engine.dispose()


def refused(url: str, statement: str) -> bool:
    """Whether the database refuses this for want of a right; it changes nothing in any case."""
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        try:
            connection.execute(statement)
        except psycopg.Error as error:
            return isinstance(error, psycopg.errors.InsufficientPrivilege)
        finally:
            connection.rollback()
    return False


#: What nobody but the owner may do.
NOBODY = (
    "DROP TABLE faces_default",
    "UPDATE oldest_versions SET version = '0.0.1'",
    "CREATE TABLE mine (id integer)",
    "ALTER TABLE faces ADD COLUMN mine text",
    "TRUNCATE faces",
    "DELETE FROM jobs",
    "DELETE FROM media_objects",
    "UPDATE faces SET status = 'with_mask'",
    "UPDATE job_attempts SET outcome = 'succeeded'",
    "DELETE FROM operator_actions",
    "UPDATE operator_actions SET by = 'somebody else'",
    "INSERT INTO purges (before, action_id) VALUES (now(), 1)",
    "DELETE FROM erased_objects",
    "UPDATE pipelines SET spec = '{}'",
    "SELECT make_faces_partition('2020-01-01'), pg_read_file('/etc/hostname')",
    "COPY faces TO PROGRAM 'true'",
    "CREATE ROLE mine",
)

#: And what each part may not do besides.
MAY_NOT = {
    "producer": (
        "SELECT p_with_mask FROM faces",
        "SELECT * FROM face_results",
        "INSERT INTO faces SELECT FROM faces",
        "INSERT INTO frame_counts SELECT FROM frame_counts",
        "DELETE FROM dirty_marks",
        "UPDATE compliance_hourly SET faces = 0",
        "UPDATE locations SET time_zone = 'UTC'",
    ),
    "worker": (
        "SELECT p_with_mask FROM faces",
        "SELECT make_faces_partition('2020-01-01')",
        "UPDATE compliance_hourly SET faces = 0",
        "SELECT * FROM compliance_hourly",
        "DELETE FROM dirty_marks",
        "INSERT INTO locations (name, time_zone) VALUES ('mine', 'UTC')",
        "UPDATE locations SET promoted_pipeline_id = 1",
        "INSERT INTO operator_actions (action, by) VALUES ('retry', 'me')",
        "SELECT * FROM backfills",
    ),
    "aggregator": (
        "SELECT x1 FROM faces",
        "SELECT * FROM jobs",
        "SELECT key FROM media_objects",
        "DELETE FROM faces",
        "DELETE FROM frame_counts",
        "INSERT INTO dirty_marks SELECT FROM dirty_marks",
        "SELECT make_faces_partition('2020-01-01')",
        "UPDATE locations SET promoted_pipeline_id = 1",
    ),
    "analyst": (
        "SELECT token FROM jobs",
        "INSERT INTO locations (name, time_zone) VALUES ('mine', 'UTC')",
        "UPDATE jobs SET state = 'pending'",
        "DELETE FROM faces",
        "DELETE FROM dirty_marks",
        "UPDATE compliance_hourly SET faces = 0",
        "SELECT * FROM erased_objects",
        "SELECT make_faces_partition('2020-01-01')",
        "SELECT id FROM media_objects FOR UPDATE",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_may_not_do(logins: Mapping[str, str], part: str) -> None:
    allowed = [statement for statement in (*NOBODY, *MAY_NOT[part]) if not refused(logins[part], statement)]
    assert allowed == []


@pytest.mark.parametrize("part", ["producer", "analyst"])
def test_who_may_read_coverage(logins: Mapping[str, str], part: str) -> None:
    """The control: a role that may not read `jobs`, which coverage is made from, is refused."""
    statement = "SELECT count(*) FROM cameras CROSS JOIN camera_coverage(id, '2026-03-01', '2026-04-01')"
    assert not refused(logins[part], statement)
    assert refused(logins["aggregator"], statement)


def test_the_same_check_refuses_an_administrator_nothing(services: Services) -> None:
    url = services.environment["MASKWATCH_DATABASE__URL"]
    everything = {statement for part in PARTS for statement in (*NOBODY, *MAY_NOT[part])}
    assert [statement for statement in everything if refused(url, statement)] == []


def test_a_migrator_owns_its_schema_and_is_no_administrator(logins: Mapping[str, str]) -> None:
    done = maskwatch("db", "upgrade", env=as_role(logins, "migrator"))
    assert done.returncode == 0, done.stderr
    assert "rights granted" in done.stderr
    for statement in (
        "CREATE ROLE mine",
        "COPY faces TO PROGRAM 'true'",
        "SELECT pg_read_file('/etc/hostname')",
        "ALTER ROLE maskwatch_worker SUPERUSER",
    ):
        assert refused(logins["migrator"], statement), statement
    purged = maskwatch("purge", "--before", "2020-01-01", "--yes", env=as_role(logins, "migrator"))
    assert purged.returncode == 0, purged.stderr
    for part in ("producer", "analyst"):
        denied = maskwatch("purge", "--before", "2020-01-01", "--yes", env=as_role(logins, part))
        assert denied.returncode == 1 and "lacks a right" in denied.stderr


def test_who_may_not_make_roles_is_told_what_to_do(services: Services, logins: Mapping[str, str]) -> None:
    done = maskwatch("db", "grant", env=as_role(logins, "worker"))
    assert done.returncode == 1 and "only the owner of the tables" in done.stderr
    printed = maskwatch("db", "grant", "--print")
    assert printed.returncode == 0 and "GRANT SELECT, INSERT, UPDATE ON jobs TO maskwatch_producer;" in printed.stdout


def test_roles_that_are_missing_are_named(services: Services, session: Session) -> None:
    url = make_url(services.environment["MASKWATCH_DATABASE__URL"])
    session.execute(text("CREATE ROLE test_plain LOGIN PASSWORD 'plain'"))
    session.execute(text("GRANT SELECT ON alembic_version, oldest_versions TO test_plain"))
    session.commit()
    plain = url.set(username="test_plain", password="plain").render_as_string(hide_password=False)
    done = maskwatch("db", "grant", env={"MASKWATCH_DATABASE__URL": plain})
    session.execute(text("DROP OWNED BY test_plain"))
    session.execute(text("DROP ROLE test_plain"))
    session.commit()
    assert done.returncode == 1
    assert "have an administrator run: CREATE ROLE maskwatch_aggregator NOLOGIN;" in done.stderr


def test_every_table_has_been_thought_of() -> None:
    """A new table is either granted to somebody or meant for the owner alone."""
    granted = {table for rights in roles.RIGHTS.values() for table in rights}
    assert {table.name for table in Base.metadata.sorted_tables} - granted == set()
    (columns,) = roles.RIGHTS["maskwatch_analyst"]["jobs"]
    named = set(columns.removeprefix("SELECT (").rstrip(")").replace(" ", "").split(","))
    assert {column.name for column in Base.metadata.tables["jobs"].columns} - named == {"token", "epoch"}
