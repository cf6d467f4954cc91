"""Migrations, forward only: a migration that has landed is never edited.

`upgrade()` is what `maskwatch db upgrade` and the embedded stack call.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine


def config(engine: Engine | None = None) -> Config:
    """Alembic's configuration, made here instead of read from an ini file."""
    alembic = Config()
    alembic.set_main_option("script_location", str(Path(__file__).parent))
    if engine is not None:
        alembic.attributes["engine"] = engine
    return alembic


def upgrade(engine: Engine | None = None) -> None:
    """Bring the database to the newest schema; does nothing if it has that schema already.

    Raises `common.database.versions.NewerSchemaError`, with nothing changed, if a newer version has migrated it.
    """
    command.upgrade(config(engine), "head")
