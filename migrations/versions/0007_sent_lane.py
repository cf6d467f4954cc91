"""Where a job's message went: whether it is lost is judged by that list in Redis, and no longer by the job's lane."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # NULL of what was sent before, or by an older dispatcher: taken for the job's own lane.
    op.add_column("jobs", sa.Column("sent_lane", sa.SmallInteger()))
