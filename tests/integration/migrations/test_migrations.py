"""The schema: migrations and tables agree, partitions are made under a lock, and a wrong state says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, text

import migrations
from common.database.partitions import ensure_partitions, month_of, split_default
from common.database.sessions import SCHEMA_REVISION
from common.domain import MaskwatchError
from tests.services import Services, maskwatch


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    engine = create_engine(empty_database)
    yield engine
    engine.dispose()


def test_migrations_make_what_the_tables_say(engine: Engine) -> None:
    migrations.upgrade(engine)
    command.check(migrations.config(engine))  # raises if a table or column differs
    assert ScriptDirectory.from_config(migrations.config()).get_heads() == [SCHEMA_REVISION]


def test_revisions_are_numbers_that_go_up_by_one() -> None:
    """By which a program knows a newer schema from an older one."""
    scripts = reversed(list(ScriptDirectory.from_config(migrations.config()).walk_revisions()))
    assert [script.revision for script in scripts] == [f"{n + 1:04}" for n in range(int(SCHEMA_REVISION))]


def test_the_comparison_notices_a_difference(engine: Engine) -> None:
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE locations ADD COLUMN unplanned integer"))
    with pytest.raises(Exception, match="unplanned"):
        command.check(migrations.config(engine))


def test_two_deployments_may_migrate_at_once(engine: Engine, empty_database: str) -> None:
    command_line = [sys.executable, "-m", "common.cli", "db", "upgrade"]
    environment = {**os.environ, "MASKWATCH_DATABASE__URL": empty_database}
    both = [subprocess.Popen(command_line, env=environment) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == SCHEMA_REVISION


def test_a_database_that_is_not_migrated_says_so(services: Services, empty_database: str) -> None:
    done = maskwatch("status", env={"MASKWATCH_DATABASE__URL": empty_database})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "maskwatch db upgrade" in done.stderr
    assert maskwatch("db", "upgrade", env={"MASKWATCH_DATABASE__URL": empty_database}).returncode == 0
    assert maskwatch("status", env={"MASKWATCH_DATABASE__URL": empty_database}).returncode == 0


def test_months_are_those_of_utc() -> None:
    assert month_of(datetime(2026, 12, 31, 23, tzinfo=UTC)) == datetime(2026, 12, 1, tzinfo=UTC)
    assert month_of(datetime.fromisoformat("2027-01-01T00:30+01:00")) == datetime(2026, 12, 1, tzinfo=UTC)


FACE = (
    "INSERT INTO faces (observed_at, job_id, media_object_id, location_id, pipeline_id, x1, y1, x2, y2, size_px,"
    " p_face, p_with_mask, p_without_mask, status) VALUES (:at, 1, 1, 1, 1, 0, 0, 9, 9, 9, 1, 1, 0, 'with_mask')"
)


def test_rows_that_came_before_their_partition_are_moved_into_it(engine: Engine) -> None:
    migrations.upgrade(engine)
    march = datetime(2024, 3, 15, tzinfo=UTC)
    with engine.begin() as connection:
        connection.execute(text(FACE), {"at": march})
    assert split_default(engine) == ["faces_2024_03"]
    assert split_default(engine) == []
    with engine.connect() as connection:
        places = connection.execute(text("SELECT tableoid::regclass::text FROM faces")).scalars().all()
    assert places == ["faces_2024_03"]


def test_partitions_made_by_many_at_once_are_made_once(engine: Engine, empty_database: str) -> None:
    migrations.upgrade(engine)
    months = [datetime(2025, month, 1, tzinfo=UTC) for month in range(1, 7)]
    made: list[str] = []
    errors: list[BaseException] = []

    def make() -> None:
        mine = create_engine(empty_database)
        try:
            made.extend(ensure_partitions(mine, months))
        except BaseException as error:
            errors.append(error)
        finally:
            mine.dispose()

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and sorted(made) == [f"faces_2025_{month:02}" for month in range(1, 7)]


def test_the_summary_refuses_sums_that_do_not_add_up(database_url: str) -> None:
    with (
        psycopg.connect(database_url.replace("+psycopg", "")) as connection,
        pytest.raises(psycopg.errors.CheckViolation),
    ):
        connection.execute(
            "INSERT INTO compliance_hourly (location_id, pipeline_id, hour, frames, seconds, faces, with_mask,"
            " without_mask, uncertain) VALUES (1, 1, now(), 1, 0, 5, 1, 1, 1)"
        )


# --- constraints of jobs ----------------------------------------------------------------------------------


@pytest.fixture
def before_constraints(engine: Engine) -> Engine:
    """A ledger of the time before 0009, with a job in each state that the constraints are about."""
    fill_a_ledger(engine, "0008")
    return engine


def fill_a_ledger(engine: Engine, revision: str) -> None:
    command.upgrade(migrations.config(engine), revision)
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO pipelines (fingerprint, detector, classifier, spec) VALUES ('f', 'd', 'c', '{}')",
            "INSERT INTO locations (name, time_zone) VALUES ('lobby', 'UTC')",
            "INSERT INTO sources (bucket) VALUES ('s3://footage')",
            "INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id)"
            " SELECT 's3://footage', n, 'e', 'e', 1, now(), 'image', 1 FROM generate_series(1, 5) AS n",
            "INSERT INTO jobs (media_object_id, source_id, pipeline_id, kind, lane) SELECT n, 1, 1, 'image', 1"
            " FROM generate_series(1, 5) AS n",
            "UPDATE jobs SET state = 'running', attempt = 1 WHERE id = 1",
            "UPDATE jobs SET state = 'succeeded', attempt = 1 WHERE id = 2",
            "INSERT INTO job_attempts (job_id, attempt, outcome, ended_at) VALUES (2, 1, 'succeeded', '2026-03-02')",
            "UPDATE jobs SET state = 'quarantined', reason = 'future_time' WHERE id = 3",
        ):
            connection.execute(text(statement))


def revision_of(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def test_rows_with_one_right_value_are_repaired(before_constraints: Engine) -> None:
    migrations.upgrade(before_constraints)
    with before_constraints.connect() as connection:
        lost, done, refused = connection.execute(
            text(
                "SELECT worker, lease_until <= now() AS out, finished_at, created_at FROM jobs WHERE id <= 3"
                " ORDER BY id"
            )
        ).all()
        unchecked = "SELECT count(*) FROM pg_constraint WHERE conrelid = 'jobs'::regclass AND NOT convalidated"
        assert connection.scalar(text(unchecked)) == 0
    assert (lost.worker, lost.out) == ("unknown", True)
    assert done.finished_at == datetime(2026, 3, 2, tzinfo=UTC)
    assert refused.finished_at == refused.created_at


@pytest.mark.parametrize(
    "statement",
    ["UPDATE jobs SET state = 'running', worker = 'w/1'", "UPDATE jobs SET state = 'succeeded'"],
)
def test_the_schema_refuses_what_the_ledger_relies_on(before_constraints: Engine, statement: str) -> None:
    """The control: before, it took it."""
    with before_constraints.begin() as connection:
        connection.execute(text(f"{statement} WHERE id = 5"))
        connection.rollback()
    migrations.upgrade(before_constraints)
    with pytest.raises(Exception, match="ck_jobs_"), before_constraints.begin() as connection:
        connection.execute(text(f"{statement} WHERE id = 5"))


@pytest.mark.parametrize("revision", ["0006", "0008"])
def test_a_row_without_a_right_value_is_named_and_nothing_is_changed(engine: Engine, revision: str) -> None:
    """From the version before (0006) the programs of that version can go on meanwhile."""
    fill_a_ledger(engine, revision)
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET state = 'cancelled' WHERE id IN (4, 5)"))
    with pytest.raises(MaskwatchError, match=r"2 job\(s\) have ended.*: 4 \(cancelled\), 5 \(cancelled\)\. Set their"):
        migrations.upgrade(engine)
    assert revision_of(engine) == revision
    with engine.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM jobs WHERE worker IS NULL AND finished_at IS NULL")) == 5
        connection.execute(text("UPDATE jobs SET finished_at = now() WHERE id IN (4, 5)"))
    migrations.upgrade(engine)
    assert revision_of(engine) == SCHEMA_REVISION


def test_a_migration_that_was_killed_in_its_repairs_is_done_again(before_constraints: Engine) -> None:
    """The constraints stand by then, and its number is not written yet."""
    migrations.upgrade(before_constraints)
    with before_constraints.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0008'"))
        connection.execute(text("DROP TABLE failing_steps"))  # 0011 comes after it
    migrations.upgrade(before_constraints)
    assert revision_of(before_constraints) == SCHEMA_REVISION


@pytest.mark.parametrize("revision", ["0006", "0008"])
def test_the_migration_waits_for_no_long_transaction_with_everybody_behind_it(engine: Engine, revision: str) -> None:
    """A claim that comes while the migration asks for its lock does not queue behind it."""
    fill_a_ledger(engine, revision)
    with engine.connect() as holder, engine.connect() as claimer:
        holder.execute(text("SELECT FROM jobs"))
        thread = threading.Thread(target=migrations.upgrade, args=(engine,))
        thread.start()
        waits = []
        for _ in range(20):
            began = time.monotonic()
            claimer.execute(text("SELECT id FROM jobs WHERE id = 5 FOR UPDATE"))
            waits.append(time.monotonic() - began)
            claimer.rollback()
            time.sleep(0.05)
        assert thread.is_alive() and revision_of(engine) == revision
        holder.rollback()
    thread.join(60)
    assert revision_of(engine) == SCHEMA_REVISION
    assert max(waits) < 0.5, waits
