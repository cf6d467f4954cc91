"""Engines, sessions and the revision of the schema; `errors` turns errors into sentences. Only tasks, commands and
dispatch open a session; what they call receives it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import psycopg
from sqlalchemy import URL, Engine, TextClause, TextualSelect, column, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError, ProgrammingError
from sqlalchemy.orm import Session

from common.database.errors import MissingRightError, down, is_lost
from common.domain import MaskwatchError, first_line
from common.settings import DatabaseSettings, get_settings

T = TypeVar("T")

#: The newest migration that this version knows. Revisions are four digits and go up by one; tests check that.
SCHEMA_REVISION = "0012"

#: A connection that was used within this many seconds is assumed to be alive.
ALIVE_SECONDS = 1.0

#: For a process that runs the same few statements over and over, each for rows given by their keys. Without these
#: settings Postgres assumes ten elements for an array parameter. Then it either plans each execution anew, which takes
#: longer than the execution, or reads all queued jobs, because its statistics say that there are few.
_BY_KEY = "".join(
    f" -c {setting}"
    for setting in (
        "plan_cache_mode=force_generic_plan",
        "enable_seqscan=off",
        "enable_bitmapscan=off",
        "enable_hashjoin=off",
        "enable_mergejoin=off",
        # A table without a suitable index is read sequentially all the same. Before Postgres 18 the estimated cost is
        # then so high that each execution would be compiled.
        "jit=off",
    )
)

_REVISION = re.compile(r"\d{4}")

NOT_MIGRATED = "the database is not migrated (found {found}, need {need}): run `maskwatch db upgrade`"


def make_engine(settings: DatabaseSettings) -> Engine:
    """An engine for this process; never share one across a fork.

    Timeouts are set per connection, so that no statement can hang for ever.
    """
    if settings.url is None:
        raise MaskwatchError(
            "no database is configured: set MASKWATCH_DATABASE__URL, or install the embedded one "
            "(pip install 'maskwatch[local]')"
        )
    url = _parsed(settings.url.get_secret_value())
    if settings.password is not None:
        url = url.set(password=settings.password.get_secret_value())
    statement_ms = int(settings.statement_timeout_seconds * 1000)
    made = create_engine(
        url,
        pool_size=settings.pool_size,
        max_overflow=2,
        connect_args={
            "connect_timeout": settings.connect_timeout_seconds,
            "application_name": "maskwatch",
            # The server enforces the statement timeout; these notice that the server or the network is gone.
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "options": f"-c statement_timeout={statement_ms} -c idle_in_transaction_session_timeout=60000"
            f" -c timezone=UTC{_BY_KEY if settings.by_key else ''}",
        },
    )
    _ask_idle_connections(made)
    return made


def _ask_idle_connections(made: Engine) -> None:
    """Notice a connection that a restarted Postgres has dropped before it is used, as `pool_pre_ping` does. But don't
    check a connection that was used a moment ago: with short jobs, that check took an eighth of a worker's time."""

    @event.listens_for(made, "checkin")
    def used(connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    @event.listens_for(made, "checkout")
    def ask(connection: Any, record: Any, proxy: Any) -> None:
        if time.monotonic() - record.info.get("used", time.monotonic()) > ALIVE_SECONDS:
            try:
                made.dialect.do_ping(connection)
            except psycopg.Error as error:
                raise InvalidatePoolError from error


@lru_cache(maxsize=256)
def sql(statement: str, *columns: str) -> TextClause | TextualSelect:
    """A statement of a hot path, parsed once: finding the parameters of a long statement takes 0.1 ms. For constants
    only, because the result is cached. With the columns' names, SQLAlchemy need not read them from each result.
    """
    read = text(statement)
    return read.columns(*map(column, columns)) if columns else read


def _parsed(text: str) -> URL:
    """Raises `MaskwatchError`, which shows no part of the URL: any part may belong to a password."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        url = None
    # An "@" in the host means that the password holds one that was not escaped.
    if url is None or url.drivername != "postgresql+psycopg" or "@" in (url.host or ""):
        raise MaskwatchError(
            "MASKWATCH_DATABASE__URL is no URL of the form postgresql+psycopg://user:password@host/name; "
            "percent-encode the password, or set MASKWATCH_DATABASE__PASSWORD"
        )
    return url


def address(settings: DatabaseSettings) -> str:
    """Where the database is, for people; without secrets, in whatever part of the URL they are."""
    assert settings.url is not None, "asked of a configured database"
    url = _parsed(settings.url.get_secret_value())
    shown = {name: value for name, value in url.query.items() if name in ("host", "port", "sslmode", "sslrootcert")}
    return url.set(query=shown).render_as_string(hide_password=True)


@lru_cache(maxsize=1)
def engine() -> Engine:
    """The engine of this process, made on first use: in a child process, not before its spawn."""
    return make_engine(get_settings().database)


@contextmanager
def session_scope(*, one_statement: bool = False) -> Iterator[Session]:
    """One transaction: commits at the end, rolls back on any error. READ COMMITTED.

    `one_statement`: the block executes a single statement, which is a transaction by itself; saves two messages to the
    server.
    """
    with explained(), Session(engine(), expire_on_commit=False) as session, session.begin():
        if one_statement:
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        yield session


def transact(work: Callable[[Session], T], *, tries: int = 3) -> T:
    """Do work in a transaction, and again in a new transaction if Postgres rolled it back to end a deadlock."""
    for left in reversed(range(tries)):
        try:
            with session_scope() as session:
                return work(session)
        except DBAPIError as error:
            if not left or not isinstance(error.orig, psycopg.errors.DeadlockDetected):
                raise
    raise AssertionError("tries is at least one")


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors that a person can fix (unreachable, not migrated, no right) into one clear sentence."""
    try:
        yield
    except ProgrammingError as error:
        if isinstance(error.orig, _MISSING) and (found := _revision_now()) is not None and is_newer(found):
            raise MaskwatchError(
                f"the database is newer (schema {found}) than this version knows (schema {SCHEMA_REVISION}), and "
                f"refused: {first_line(error)}; install a newer Maskwatch"
            ) from error
        if isinstance(error.orig, psycopg.errors.UndefinedTable):
            raise NotMigratedError(NOT_MIGRATED.format(found="no tables", need=SCHEMA_REVISION)) from error
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise MissingRightError(
                f"{_role()} lacks a right ({first_line(error)}): run `maskwatch db grant` as the owner of the tables"
            ) from error
        raise
    except DBAPIError as error:
        if is_lost(error):
            raise down(error) from error
        raise


#: The errors of a statement that needs something which a newer schema has dropped.
_MISSING = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.InsufficientPrivilege,
)


def _revision_now() -> str | None:
    """The schema's revision, read in a connection of its own because the transaction has failed; None if unreadable."""
    try:
        with Session(engine()) as session:
            return schema_revision(session)
    except (DBAPIError, MaskwatchError):
        return None


class NotMigratedError(MaskwatchError):
    """The schema is older than this version needs, or there is no schema."""


def _role() -> str:
    """The database role of this process, for a message."""
    configured = get_settings().database.url
    user = _parsed(configured.get_secret_value()).username if configured is not None else None
    return f"the database role {user}" if user else "this database role"


def schema_revision(session: Session) -> str | None:
    """The newest migration that the database has; None if it has no schema."""
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    found = session.scalar(text("SELECT version_num FROM alembic_version"))
    return None if found is None else str(found)


def is_newer(revision: str) -> bool:
    """Whether a revision of the schema is of a later version of Maskwatch than this one.

    Raises `MaskwatchError` for a revision that no version of Maskwatch has.
    """
    if not _REVISION.fullmatch(revision):
        raise MaskwatchError(
            f"the database has the schema {revision!r}, which is none of Maskwatch's: check MASKWATCH_DATABASE__URL"
        )
    return int(revision) > int(SCHEMA_REVISION)
