"""How Alembic reaches the database: through our settings, one migration at a time, and without waiting for ever."""

from __future__ import annotations

from alembic import context
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.sessions import make_engine, schema_revision
from common.database.tables import Base
from common.database.versions import MIGRATION_LOCK, check_not_newer
from common.settings import get_settings


def is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Whether an object is part of the schema to compare: partitions are not, because they come and go with time."""
    return not (kind == "table" and name is not None and name.startswith("faces_"))


def run() -> None:
    engine = context.config.attributes.get("engine") or make_engine(get_settings().database)
    with engine.connect() as connection:
        # Two deployments that start at once must not migrate at once. A lock that can't be had, or a statement that
        # hangs, fails the migration instead of blocking all writers behind it.
        connection.execute(text("SET lock_timeout = '10s'"))
        connection.execute(text("SET statement_timeout = '10min'"))
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        connection.commit()
        try:
            # After taking the lock: an older version's `db upgrade` may have waited for a newer version's.
            with Session(connection) as session:
                check_not_newer(schema_revision(session))
            context.configure(
                connection=connection,
                target_metadata=Base.metadata,
                transaction_per_migration=True,
                include_name=is_ours,
            )
            with context.begin_transaction():
                context.run_migrations()
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
            connection.commit()


run()
