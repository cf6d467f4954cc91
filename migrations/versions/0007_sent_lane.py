"""The lane whose list in Redis holds a job's message: this list, not the job's own lane, tells whether it is lost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # NULL for messages sent before this migration or by an older dispatcher: read as the job's own lane.
    op.add_column("jobs", sa.Column("sent_lane", sa.SmallInteger()))
