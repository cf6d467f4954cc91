"""Purged time: faces seen before an instant are gone, and that time is frozen. What follows from it for everybody else.

`workers/summaries/purging.py` purges; it writes the instant down first. From then on workers leave out frames of hours
that began before it, and once the summaries of that time are final (`Purge.frozen_at`), the aggregator leaves them as
they are.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from common.database.tables import Purge

#: In SQL, the instant before which time is purged; -infinity where nothing was.
PURGED_BEFORE_SQL = "(SELECT coalesce(max(before), '-infinity') FROM purges)"


def purged_before(session: Session) -> datetime | None:
    """Nothing new may be stored of hours that began before this; None where nothing was purged.

    Ask in the transaction that stores, after its first write: a purge waits for those that may not have seen it yet.
    """
    return session.scalar(select(func.max(Purge.before)))


def frozen_before(session: Session) -> datetime | None:
    """Summaries of hours that began before this are final; None where none are."""
    return session.scalar(select(func.max(Purge.before)).where(Purge.frozen_at.is_not(None)))
