"""`maskwatch db`: the schema, and the rights of the roles that use it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click
from sqlalchemy.orm import Session

import migrations
from common import __version__
from common.cli.parts.console import note
from common.cli.parts.sessions import Say, with_session
from common.database import roles, versions
from common.database.partitions import ensure_partitions
from common.database.sessions import engine, explained, session_scope


@click.group()
def db() -> None:
    """Migrate the database that MASKWATCH_DATABASE__URL names. (The embedded one migrates itself.)"""


@db.command()
def upgrade() -> None:
    """Bring the schema up to date, and make the partitions of this month and the next.

    Changes nothing if a newer version has migrated the database; exits with 1 if this version may not work on it.

    \b
    Example:
      maskwatch db upgrade
    """
    try:
        with explained():
            migrations.upgrade(engine())
            now = datetime.now(UTC)
            made = ensure_partitions(engine(), [now, now + timedelta(days=31)])
        with session_scope() as session:
            versions.hold_schema(session)
            granted = not roles.missing(session)
            if granted:  # also for what this version has added
                roles.grant(session)
    except versions.NewerSchemaError as error:
        # No failure, as long as this version may work on the newer schema: a rollback to an earlier version of the
        # programs begins with that version's `db upgrade`.
        with session_scope() as session:
            versions.check_all_parts(session, because=error)
        note(f"{error}; version {__version__} can still work on it")
        return
    note(
        f"the database is up to date{'; new partitions: ' + ', '.join(made) if made else ''}"
        f"{'; rights granted' if granted else ''}"
    )


@db.command("grant")
@click.option("--print", "only_print", is_flag=True, help="Print the SQL instead of running it.")
@with_session
def grant_rights(session: Session, only_print: bool) -> Say:
    """Make a role each for the producer, the workers, the aggregator and analysts, with only the rights it needs.

    Run it as the login that ran `db upgrade`. Then make logins that are members of these roles:

    \b
    Examples:
      maskwatch db grant
      psql -c "CREATE ROLE worker_1 LOGIN PASSWORD '...' IN ROLE maskwatch_worker"
    """
    versions.hold_schema(session)
    if only_print:
        new = [f"CREATE ROLE {role} NOLOGIN" for role in roles.missing(session)]
        statements = [*new, *roles.statements("public")]
        return lambda: click.echo("\n".join(f"{statement};" for statement in statements))
    made = roles.grant(session)
    return lambda: note(
        f"rights are granted to {', '.join(roles.RIGHTS)}{' (new: ' + ', '.join(made) + ')' if made else ''}"
    )
