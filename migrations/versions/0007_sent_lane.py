"""The lane whose list in Redis holds a job's message: this list, not the job's own lane, tells whether it is lost."""

from __future__ import annotations

from migrations.compatibility import execute_when_free
from migrations.ended_jobs import refuse_what_has_no_right_value

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    # What 0009 would refuse: said here, while the programs of the version before can still go on.
    refuse_what_has_no_right_value()
    # NULL for messages sent before this migration or by an older dispatcher: read as the job's own lane.
    execute_when_free("ALTER TABLE jobs ADD COLUMN sent_lane smallint;")
