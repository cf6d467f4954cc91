"""The schema: migrations and tables agree, partitions are made under a lock, and a wrong state says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, text

import migrations
from common.database import SCHEMA_REVISION
from common.partitions import ensure_partitions, month_of, next_month, split_default
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


def test_months() -> None:
    december = month_of(datetime(2026, 12, 31, 23, tzinfo=UTC))
    assert (december, next_month(december)) == (datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))


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
