"""A dump of the database restored somewhere else is the same database, and work goes on in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.orm import Session

from common.database.partitions import ensure_partitions
from common.domain import ObservedAt, ObservedAtSource
from common.local.postgres import psql_command
from tests.ledger_rows import NOON, claim, dispatch, face, planned, register, register_many, states
from workers.jobs.recording import record_image
from workers.summaries.aggregation import summarize_batch

TABLES = """
SELECT table_name
FROM information_schema.tables
WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
ORDER BY 1
"""

#: Whether each constraint holds for all rows, and how each index is made.
RULES = """
SELECT conrelid::regclass::text AS of, conname AS name, pg_get_constraintdef(oid) AS rule, convalidated AS holds
FROM pg_constraint
WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT tablename, indexname, indexdef, true
FROM pg_indexes
WHERE schemaname = 'public'
ORDER BY 1, 2, 3
"""


def contents(connection: Connection) -> dict[str, list[str]]:
    """Every row of every table, and every rule."""
    tables = connection.execute(text(TABLES)).scalars().all()
    found = {
        table: sorted(connection.execute(text(f"SELECT to_json(t)::text FROM {table} t")).scalars()) for table in tables
    }
    # Postgres writes the casts of a CHECK in other places once it has read it from a dump.
    casts = re.compile(r"::(character varying|text)(\[\])?|[()]")
    found["(rules)"] = sorted(casts.sub("", str(tuple(row))) for row in connection.execute(text(RULES)))
    return found


def dump(source: str, target: str, file: Path, *options: str) -> None:
    """Dump a database and restore it into an empty one, with the programs that come with Postgres."""
    for name, url, arguments in (
        ("pg_dump", source, ["-Fc", "-f", str(file), *options]),
        ("pg_restore", target, ["--exit-on-error", str(file)]),
    ):
        (psql,), environment = psql_command(url)
        into = ["-d", environment["PGDATABASE"]] if name == "pg_restore" else []
        command = [str(Path(psql).with_name(name)), *into, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_restored_dump_is_the_same_database(
    session: Session, database_url: str, empty_database: str, tmp_path: Path
) -> None:
    register_many(session, 12)
    ensure_partitions(session.get_bind(), [NOON])  # type: ignore[arg-type]
    for job in claim(session, dispatch(session, 8))[:5]:
        record_image(session, job, [face()], ObservedAt(NOON, ObservedAtSource.KEY_PATTERN))
    session.commit()
    summarize_batch(session, 1)
    session.commit()
    with session.bind.connect() as connection:  # type: ignore[union-attr]
        before = contents(connection)
    assert states(session) == {"succeeded": 5, "running": 3, "pending": 4}

    dump(database_url, empty_database, tmp_path / "maskwatch.dump")
    engine = create_engine(empty_database)
    with engine.connect() as connection:
        after = contents(connection)
        assert {t: sorted(set(after[t]) ^ set(before[t])) for t in before if after[t] != before[t]} == {}
    with Session(engine, expire_on_commit=False) as restored:
        register(restored, planned("new.jpg"))  # its ids come after those that were restored
        assert len(claim(restored, dispatch(restored, 3))) == 3
        assert states(restored) == {"succeeded": 5, "running": 6, "pending": 2}
    engine.dispose()


def test_the_comparison_notices_what_a_dump_leaves_out(
    session: Session, database_url: str, empty_database: str, tmp_path: Path
) -> None:
    register_many(session, 2)
    dump(database_url, empty_database, tmp_path / "maskwatch.dump", "--exclude-table-data=oldest_versions")
    engine = create_engine(empty_database)
    with engine.connect() as restored, session.bind.connect() as connection:  # type: ignore[union-attr]
        found, expected = contents(restored), contents(connection)
    assert {table for table in expected if found[table] != expected[table]} == {"oldest_versions"}
    engine.dispose()
