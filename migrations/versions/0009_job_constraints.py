"""Constraints that the ledger relies on: a running job has a lease and a worker, an ended job has its time.

Claims continue during the migration: the constraints are added without a check of existing rows (0010 checks them),
and their lock is tried again and again with a short timeout. Rows that violate them are repaired later, in batches.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

from common.domain import MaskwatchError
from migrations.compatibility import set_oldest

revision = "0009"
down_revision = "0008"

#: Jobs that are checked in one transaction.
BATCH = 50_000

#: An ended job without its time gets the end of its last attempt; one that was quarantined at its registration gets the
#: time of that.
ENDED_AT = """
coalesce(
    (SELECT max(a.ended_at) FROM job_attempts a WHERE a.job_id = jobs.id),
    CASE WHEN state = 'quarantined' AND attempt = 0 THEN created_at END
)"""

ENDED = "state IN ('succeeded', 'quarantined', 'source_changed', 'cancelled')"

HOPELESS = f"""
SELECT count(*) OVER () AS jobs, id, state
FROM jobs
WHERE {ENDED} AND finished_at IS NULL AND {ENDED_AT} IS NULL
ORDER BY id
LIMIT 10
"""

#: With the two settings a vacuum starts when 2 % of the jobs have moved, not 20 %, and does not pause: every move
#: leaves a dead row and dead index entries (`state` is indexed, so there are no HOT updates).
CONSTRAIN = """
DO $$
BEGIN
    ALTER TABLE jobs SET (
        autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_cost_delay = 0
    );
    FOR tried IN 1..300 LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '100ms', true);
            ALTER TABLE jobs DROP CONSTRAINT IF EXISTS ck_jobs_running;
            ALTER TABLE jobs DROP CONSTRAINT IF EXISTS ck_jobs_finished;
            ALTER TABLE jobs ADD CONSTRAINT ck_jobs_running
                CHECK (state <> 'running' OR (lease_until IS NOT NULL AND worker IS NOT NULL)) NOT VALID;
            ALTER TABLE jobs ADD CONSTRAINT ck_jobs_finished
                CHECK (state NOT IN ('succeeded', 'quarantined', 'source_changed', 'cancelled')
                       OR finished_at IS NOT NULL) NOT VALID;
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.1 + random() / 5);
        END;
    END LOOP;
    RAISE EXCEPTION 'jobs was never free for 100 ms within a minute: migrate when less is going on';
END $$
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
    op.execute(CONSTRAIN)
    context = op.get_context()
    with context.autocommit_block():
        connection = op.get_bind()
        last = connection.scalar(text("SELECT max(id) FROM jobs")) or 0
        for first in range(1, last + 1, BATCH):
            connection.execute(text(REPAIR), {"first": first, "behind": first + BATCH})


def refuse_what_has_no_right_value() -> None:
    """Raise `MaskwatchError`, before anything is changed, for ended jobs whose time is unknown."""
    rows = op.get_bind().execute(text(HOPELESS)).all()
    if rows:
        named = ", ".join(f"{row.id} ({row.state})" for row in rows)
        raise MaskwatchError(
            f"{rows[0].jobs} job(s) have ended, but neither finished_at nor an attempt tells when: {named}"
            f"{', ...' if rows[0].jobs > len(rows) else ''}. Set their finished_at, then run `maskwatch db upgrade` "
            "again; nothing was changed"
        )
