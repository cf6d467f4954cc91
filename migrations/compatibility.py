"""What every migration writes first: which versions of Maskwatch may work on the schema that it makes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from common.database.versions import AGGREGATION_LOCK, Part

#: An aggregator's transaction may take as long as its statement timeout allows. Only other aggregators wait behind this
#: lock, so this wait may be longer than the wait for a table.
_LOCK = f"""
DO $$
DECLARE
    before CONSTANT text := current_setting('lock_timeout');
BEGIN
    PERFORM set_config('lock_timeout', '2min', true);
    PERFORM pg_advisory_xact_lock({AGGREGATION_LOCK});
    PERFORM set_config('lock_timeout', before, true);
END $$
"""

_WRITE = """
INSERT INTO oldest_versions (part, version)
VALUES (:part, :version)
ON CONFLICT (part) DO UPDATE
SET version = excluded.version
"""


def set_oldest(*, producer: str, worker: str, aggregator: str, command: str) -> None:
    """Write the oldest version of each part that may work on the schema from this migration on.

    Call it first in a migration, before it locks any table: it waits for the end of running aggregator transactions,
    and the next one sees what is written here. (A later commit within the migration changes nothing about that.)
    """
    op.execute(_LOCK)
    oldest = {
        Part.PRODUCER: producer,
        Part.WORKER: worker,
        Part.AGGREGATOR: aggregator,
        Part.COMMAND: command,
    }
    for part, version in oldest.items():
        op.execute(sa.text(_WRITE).bindparams(part=part.value, version=version))


_WHEN_FREE = """
DO $$
DECLARE
    before CONSTANT text := current_setting('lock_timeout');
BEGIN
    FOR tried IN 1..300 LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '100ms', true);
            {statements}
            PERFORM set_config('lock_timeout', before, true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_sleep(0.1 + random() / 5);
        END;
    END LOOP;
    RAISE EXCEPTION 'the table was never free for 100 ms within a minute: migrate when less is going on';
END $$
"""


def execute_when_free(statements: str) -> None:
    """Execute statements that need a table for themselves, without letting others queue behind a long wait for it: the
    lock is asked for again and again, a tenth of a second each time. The last statements of a transaction, since the
    lock is held until it ends."""
    op.execute(_WHEN_FREE.format(statements=statements))
