"""Engines, sessions and the state of the schema. Everything below the tasks, the commands and dispatch
receives a `session`; only those open one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import psycopg
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from common.domain import MaskwatchError
from common.settings import DatabaseSettings, get_settings

#: The newest migration. A test compares it with migrations/versions.
SCHEMA_REVISION = "0001"

NOT_MIGRATED = "the database is not migrated (found {found}, need {need}): run `maskwatch db upgrade`"


def make_engine(settings: DatabaseSettings, *, application: str = "maskwatch") -> Engine:
    """An engine for this process; never share one across a fork.

    Timeouts live in the connection, so that no statement of ours can hang for ever.
    """
    if settings.url is None:
        raise MaskwatchError(
            "no database is configured: set MASKWATCH_DATABASE__URL, or install the embedded one "
            "(pip install 'maskwatch[local]')"
        )
    statement_ms = int(settings.statement_timeout_seconds * 1000)
    return create_engine(
        settings.url.get_secret_value(),
        pool_size=settings.pool_size,
        max_overflow=2,
        # A connection that a restarted Postgres dropped is noticed before it is used.
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": settings.connect_timeout_seconds,
            "application_name": application,
            "options": f"-c statement_timeout={statement_ms} -c idle_in_transaction_session_timeout=60000"
            " -c timezone=UTC",
        },
    )


@lru_cache(maxsize=1)
def engine() -> Engine:
    """The engine of this process, made on first use (so in the child, not before a spawn)."""
    return make_engine(get_settings().database)


@contextmanager
def session_scope() -> Iterator[Session]:
    """One transaction: commits at the end, rolls back on any error. READ COMMITTED."""
    with explained(), Session(engine(), expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def explained() -> Iterator[None]:
    """Turn what a person can put right (unreachable, not migrated) into one clear sentence."""
    try:
        yield
    except OperationalError as error:
        if isinstance(error.orig, psycopg.OperationalError) and error.connection_invalidated is False:
            first_line = str(error.orig).strip().splitlines()[0]
            if is_unreachable(error):
                raise DatabaseDownError(f"the database does not answer ({first_line}): is Postgres running?") from error
        raise
    except ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.UndefinedTable):
            raise MaskwatchError(NOT_MIGRATED.format(found="no tables", need=SCHEMA_REVISION)) from error
        raise


class DatabaseDownError(MaskwatchError):
    """Postgres can't be reached."""


def is_unreachable(error: DBAPIError) -> bool:
    """Whether no connection could be made at all (the driver then has no SQLSTATE to report)."""
    return getattr(error.orig, "sqlstate", None) is None or str(getattr(error.orig, "sqlstate", "")).startswith("08")


def schema_revision(session: Session) -> str | None:
    """The migration the database stands at; None where there is none."""
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    found = session.scalar(text("SELECT version_num FROM alembic_version"))
    return None if found is None else str(found)


def check_schema() -> None:
    """Raise a `MaskwatchError` unless the database stands at this version's schema."""
    with session_scope() as session:
        found = schema_revision(session)
    if found != SCHEMA_REVISION:
        raise MaskwatchError(NOT_MIGRATED.format(found=found or "no schema", need=SCHEMA_REVISION))
