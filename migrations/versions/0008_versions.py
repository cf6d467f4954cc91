"""The oldest version of each part of Maskwatch that may work on the schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.compatibility import set_oldest

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "oldest_versions",
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.CheckConstraint(r"version ~ '^\d+\.\d+\.\d+$'", name=op.f("ck_oldest_versions_version")),
        sa.PrimaryKeyConstraint("part", name=op.f("pk_oldest_versions")),
    )
    # Earlier versions don't read this table, and need not: they don't start on a schema that they don't know.
    set_oldest(producer="0.2.0", worker="0.2.0", aggregator="0.2.0", command="0.2.0")
