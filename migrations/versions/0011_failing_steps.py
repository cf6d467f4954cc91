"""Steps of the producer's ticks that fail, for `status`, `doctor` and an alert."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.compatibility import set_oldest

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    # 0.2.0 writes nothing to it, and is not read by it.
    set_oldest(producer="0.2.0", worker="0.2.0", aggregator="0.2.0", command="0.2.0")
    clock = sa.text("clock_timestamp()")
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "failing_steps",
        sa.Column("tick", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("since", moment, server_default=clock, nullable=False),
        sa.Column("last_at", moment, server_default=clock, nullable=False),
        sa.Column("times", sa.BigInteger(), server_default=sa.text("1"), nullable=False),
        sa.PrimaryKeyConstraint("tick", "step", name=op.f("pk_failing_steps")),
    )
