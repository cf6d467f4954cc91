"""Constraints that the ledger relies on: a running job has a lease and a worker, an ended job has its time.

Claims continue during the migration: the constraints are added without a check of existing rows (0010 checks them),
and their lock is tried again and again with a short timeout. Rows that violate them are repaired later, in batches.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

from migrations.compatibility import execute_when_free, set_oldest
from migrations.ended_jobs import ENDED, ENDED_AT, refuse_what_has_no_right_value

revision = "0009"
down_revision = "0008"

#: Jobs that are checked in one transaction.
BATCH = 50_000

#: With the two settings a vacuum starts when 2 % of the jobs have moved, not 20 %, and does not pause: every move
#: leaves a dead row and dead index entries (`state` is indexed, so there are no HOT updates).
VACUUM_SOONER = """
ALTER TABLE jobs SET (
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 0
)
"""

#: Dropped first, because a run that was killed in its repairs has left them.
CONSTRAIN = """
ALTER TABLE jobs DROP CONSTRAINT IF EXISTS ck_jobs_running;
ALTER TABLE jobs DROP CONSTRAINT IF EXISTS ck_jobs_finished;
ALTER TABLE jobs ADD CONSTRAINT ck_jobs_running
    CHECK (state <> 'running' OR (lease_until IS NOT NULL AND worker IS NOT NULL)) NOT VALID;
ALTER TABLE jobs ADD CONSTRAINT ck_jobs_finished
    CHECK (state NOT IN ('succeeded', 'quarantined', 'source_changed', 'cancelled')
           OR finished_at IS NOT NULL) NOT VALID;
"""

#: A running job without a lease or a worker is lost: its lease runs out now, and the reconciler finds it.
REPAIR = f"""
UPDATE jobs
SET lease_until = CASE WHEN state = 'running' THEN coalesce(lease_until, clock_timestamp()) ELSE lease_until END,
    worker = CASE WHEN state = 'running' THEN coalesce(worker, 'unknown') ELSE worker END,
    finished_at = CASE WHEN state = 'running' THEN finished_at ELSE {ENDED_AT} END
WHERE id >= :first AND id < :behind
  AND ((state = 'running' AND (lease_until IS NULL OR worker IS NULL)) OR ({ENDED} AND finished_at IS NULL))
"""


def upgrade() -> None:
    set_oldest(producer="0.2.0", worker="0.2.0", aggregator="0.2.0", command="0.2.0")
    refuse_what_has_no_right_value()
    op.execute(VACUUM_SOONER)
    execute_when_free(CONSTRAIN)
    context = op.get_context()
    with context.autocommit_block():
        connection = op.get_bind()
        last = connection.scalar(text("SELECT max(id) FROM jobs")) or 0
        for first in range(1, last + 1, BATCH):
            connection.execute(text(REPAIR), {"first": first, "behind": first + BATCH})
