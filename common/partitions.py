"""Monthly partitions of `faces`: made ahead by the migrator and the planner, never by a worker.

Each is made in a transaction of its own under an advisory lock: made concurrently, or inside a writer's
transaction, they fail or deadlock. Rows that arrived before their partition wait in `faces_default`
and are moved when it is made. While somebody reads `faces` for long, that is put off: nothing is lost by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import psycopg
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from common.telemetry import get_logger

log = get_logger(__name__)

#: Any constant that nothing else locks: "maskwatch partitions".
PARTITION_LOCK = 0x6D77_7061


def month_of(instant: datetime) -> datetime:
    """The first instant of the UTC month of an aware datetime."""
    return instant.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def next_month(month: datetime) -> datetime:
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def partition_name(month: datetime) -> str:
    return f"faces_{month:%Y_%m}"


def ensure_partitions(engine: Engine, instants: Iterable[datetime]) -> list[str]:
    """Make the partitions that these instants fall into; returns the names of the new ones.

    One whose lock can't be had within two seconds is left for the next call.
    """
    wanted = {month_of(instant) for instant in instants}
    made = []
    for month in sorted(wanted):
        if not _exists(engine, month):
            try:
                made += _make(engine, month)
            except OperationalError as error:
                if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                    raise
                log.warning("partition put off: its table is being read", partition=partition_name(month))
    return made


def split_default(engine: Engine) -> list[str]:
    """Make the partitions that rows in `faces_default` wait for; returns their names."""
    with engine.connect() as connection:
        waiting = connection.execute(text("SELECT DISTINCT date_trunc('month', observed_at, 'UTC') FROM faces_default"))
        months = [row[0] for row in waiting]
    return ensure_partitions(engine, months)


def _exists(engine: Engine, month: datetime) -> bool:
    with engine.connect() as connection:
        return _is_there(connection, partition_name(month))


def _is_there(connection: Connection, name: str) -> bool:
    # Read from pg_class as rows, because to_regclass() may answer from what this connection remembers from
    # before it waited for the lock.
    query = "SELECT FROM pg_class WHERE relname = :name AND relnamespace = current_schema()::regnamespace"
    return connection.execute(text(query), {"name": name}).first() is not None


def _make(engine: Engine, month: datetime) -> list[str]:
    name = partition_name(month)  # digits only: safe to put into DDL, which takes no parameters
    start, end = month.isoformat(), next_month(month).isoformat()
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": PARTITION_LOCK})
        if _is_there(connection, name):
            return []
        # Filled first and attached then, because ATTACH refuses while the default holds rows of this month.
        connection.execute(text("LOCK TABLE faces_default IN ACCESS EXCLUSIVE MODE"))
        connection.execute(text(f"CREATE TABLE {name} (LIKE faces INCLUDING DEFAULTS INCLUDING CONSTRAINTS)"))
        connection.execute(
            text(
                f"WITH moved AS (DELETE FROM faces_default WHERE observed_at >= '{start}'"
                f" AND observed_at < '{end}' RETURNING *) INSERT INTO {name} SELECT * FROM moved"
            )
        )
        connection.execute(text(f"ALTER TABLE faces ATTACH PARTITION {name} FOR VALUES FROM ('{start}') TO ('{end}')"))
    return [name]
