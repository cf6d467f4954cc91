"""Which versions of Maskwatch may work on a database, and whether this one may.

Each migration writes, for each part, the oldest version that may work on the schema from then on (`oldest_versions`).
A program may work if the schema has all that it needs, and if the program's version is not older than the one written
there. So a program may work on a newer schema than it knows. docs/versions.md says what follows for operators.
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import text
from sqlalchemy.orm import Session

from common import __version__
from common.database.sessions import (
    NOT_MIGRATED,
    SCHEMA_REVISION,
    NotMigratedError,
    is_newer,
    schema_revision,
    session_scope,
    sql,
)
from common.domain import MaskwatchError

#: Held by a running migration, and (shared) by what must not run beside one: "maskwatch migrations".
MIGRATION_LOCK = 0x6D77_6D69

#: Held by each transaction of an aggregator that takes marks, and by a migration, from before it writes which
#: aggregators may work until it commits: "maskwatch aggregation".
AGGREGATION_LOCK = 0x6D77_6167


OLDEST_VERSION = """
SELECT version
FROM oldest_versions
WHERE part = :part
"""

_OLDEST_VERSIONS = """
SELECT part, version
FROM oldest_versions
ORDER BY part
"""


class Part(StrEnum):
    """A part of Maskwatch that works on the database, as `oldest_versions` names it."""

    PRODUCER = "producer"
    WORKER = "worker"
    AGGREGATOR = "aggregator"
    #: Every command but producer, worker and aggregator.
    COMMAND = "command"


class OutdatedProgramError(MaskwatchError):
    """This version may not work on the database any more."""


class NewerSchemaError(MaskwatchError):
    """The schema is newer than this version knows: this version can neither migrate it nor grant rights on it."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"the database is newer (schema {found}) than this version {__version__} knows (schema {SCHEMA_REVISION}): "
            "nothing was changed"
        )


def parse(version: str) -> tuple[int, ...]:
    """A version's numbers, which compare as versions do: 0.10.0 is newer than 0.9.0."""
    return tuple(int(number) for number in version.split("."))


def check_part(session: Session, part: Part, version: str = __version__) -> None:
    """Raise `OutdatedProgramError` if this version is older than the oldest one that may run as this part.

    One small read. A part for which the database names no version may run.
    """
    refuse_older(session.scalar(sql(OLDEST_VERSION), {"part": part.value}), part, version)


def refuse_older(oldest: str | None, part: Part, version: str = __version__) -> None:
    """Raise `OutdatedProgramError` if this version is older than the oldest one, as it was read; None: any may run."""
    if oldest is not None and parse(version) < parse(oldest):
        raise OutdatedProgramError(
            f"this is Maskwatch {version}, but the database needs {oldest} or newer as {part.value}: "
            f"install Maskwatch {oldest} or newer"
        )


def check_all_parts(session: Session, *, because: MaskwatchError) -> None:
    """Raise `OutdatedProgramError`, which begins with the error `because`, if this version is too old for any part."""
    for part in Part:
        try:
            check_part(session, part)
        except OutdatedProgramError as error:
            raise OutdatedProgramError(f"{because}; {error}") from error


def check_schema(part: Part = Part.COMMAND) -> None:
    """Raise unless this version may work on the database as this part: `NotMigratedError` if the schema lacks what this
    version needs, `OutdatedProgramError` if this version is too old for it."""
    with session_scope() as session:
        found = schema_revision(session)
        if found is None or (found != SCHEMA_REVISION and not is_newer(found)):
            raise NotMigratedError(NOT_MIGRATED.format(found=found or "no schema", need=SCHEMA_REVISION))
        check_part(session, part)


def hold_schema(session: Session) -> None:
    """Keep migrations from running until this transaction ends. Raises `NewerSchemaError` for a newer schema."""
    session.execute(text("SELECT pg_advisory_xact_lock_shared(:key)"), {"key": MIGRATION_LOCK})
    check_not_newer(schema_revision(session))


def check_not_newer(found: str | None) -> None:
    """Raise `NewerSchemaError` if this revision of the schema is newer than this version knows."""
    if found is not None and is_newer(found):
        raise NewerSchemaError(found)


def oldest_versions(session: Session) -> dict[str, str]:
    """The oldest version of each part that may work on the database, by the part's name."""
    return {row.part: row.version for row in session.execute(text(_OLDEST_VERSIONS))}
