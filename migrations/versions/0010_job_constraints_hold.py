"""Checks all jobs against the constraints of 0009. The check blocks no reader or writer."""

from __future__ import annotations

from alembic import op

from migrations.compatibility import set_oldest

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    set_oldest(producer="0.2.0", worker="0.2.0", aggregator="0.2.0", command="0.2.0")
    op.execute("ALTER TABLE jobs VALIDATE CONSTRAINT ck_jobs_running")
    op.execute("ALTER TABLE jobs VALIDATE CONSTRAINT ck_jobs_finished")
