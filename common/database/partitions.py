"""Monthly partitions of `faces`: made ahead by the migrator and the planner, never by a worker.

Each is made in a transaction of its own, by a function of the schema (`make_faces_partition`) under an advisory lock:
partitions made concurrently, or inside a writer's transaction, fail or deadlock. Rows that arrive before their
partition wait in `faces_default` and are moved when it is made. While a long query reads `faces`, making a partition
is put off; nothing is lost by that.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import psycopg
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from common.domain import first_line
from common.observability.logs import get_logger
from common.timestamps import END, FIRST, is_storable

log = get_logger(__name__)


def month_of(instant: datetime) -> datetime:
    """The first instant of the UTC month of an aware datetime."""
    return instant.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def partition_name(month: datetime) -> str:
    return f"faces_{month:%Y_%m}"


def ensure_partitions(engine: Engine, instants: Iterable[datetime]) -> list[str]:
    """Make the partitions that these instants fall into; returns the names of the new ones.

    A month whose partition can't be made is left for the next call and keeps no other month from its own: its rows wait
    in `faces_default`. Instants that can't be stored are passed over.
    """
    days = {instant.astimezone(UTC).date() for instant in instants if is_storable(instant)}
    wanted = {datetime(day.year, day.month, 1, tzinfo=UTC) for day in days}
    made = []
    for month in sorted(wanted):
        try:
            if not _exists(engine, month):
                made += _make(engine, month)
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            if isinstance(error.orig, psycopg.errors.LockNotAvailable):
                log.warning("partition put off: its table is being read", partition=partition_name(month))
            else:
                log.error("a partition can't be made", partition=partition_name(month), detail=first_line(error))
    return made


def split_default(engine: Engine) -> list[str]:
    """Make the partitions of the rows in `faces_default`; returns their names."""
    with engine.connect() as connection:
        months = connection.execute(text(_WAITING), {"first": FIRST, "end": END}).scalars().all()
    return ensure_partitions(engine, months)


#: Bounded, because an earlier version stored faces at times that have no partition: year 1, or before it, which Python
#: can't read.
_WAITING = """
SELECT DISTINCT date_trunc('month', observed_at, 'UTC')
FROM faces_default
WHERE observed_at >= :first
  AND observed_at < :end
"""


def _exists(engine: Engine, month: datetime) -> bool:
    query = "SELECT FROM pg_class WHERE relname = :name AND relnamespace = current_schema()::regnamespace"
    with engine.connect() as connection:
        return connection.execute(text(query), {"name": partition_name(month)}).first() is not None


def _make(engine: Engine, month: datetime) -> list[str]:
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        # The function runs with the rights of the schema's owner: the planner needs no right to change tables.
        made = connection.scalar(text("SELECT make_faces_partition(:month)"), {"month": month})
    return [partition_name(month)] if made else []
