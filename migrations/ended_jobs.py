"""When jobs ended that say nothing of it themselves: for the migrations that make the schema ask for it."""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

from common.domain import MaskwatchError

ENDED = "state IN ('succeeded', 'quarantined', 'source_changed', 'cancelled')"

#: An ended job without its time gets the end of its last attempt; one that was quarantined at its registration gets the
#: time of that.
ENDED_AT = """
coalesce(
    (SELECT max(a.ended_at) FROM job_attempts a WHERE a.job_id = jobs.id),
    CASE WHEN state = 'quarantined' AND attempt = 0 THEN created_at END
)"""

_HOPELESS = f"""
SELECT count(*) OVER () AS jobs, id, state
FROM jobs
WHERE {ENDED} AND finished_at IS NULL AND {ENDED_AT} IS NULL
ORDER BY id
LIMIT 10
"""


def refuse_what_has_no_right_value() -> None:
    """Raise `MaskwatchError`, before anything is changed, for ended jobs whose time is unknown."""
    rows = op.get_bind().execute(text(_HOPELESS)).all()
    if rows:
        named = ", ".join(f"{row.id} ({row.state})" for row in rows)
        raise MaskwatchError(
            f"{rows[0].jobs} job(s) have ended, but neither finished_at nor an attempt tells when: {named}"
            f"{', ...' if rows[0].jobs > len(rows) else ''}. Set their finished_at, then run `maskwatch db upgrade` "
            "again; nothing was changed"
        )
