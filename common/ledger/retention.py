"""Purged time: faces seen before an instant were removed, and the hours before it are frozen.

`workers/summaries/purging.py` purges; it stores the instant first. From then on workers leave out frames of hours that
began before the instant. Once the summaries of these hours are final (`Purge.frozen_at`), the aggregator no longer
changes them.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from common.database.tables import Purge

#: In SQL, the instant before which time is purged; -infinity if nothing was purged.
PURGED_BEFORE_SQL = "(SELECT coalesce(max(before), '-infinity') FROM purges)"


def purged_before(session: Session) -> datetime | None:
    """The instant before which time is purged: nothing may be stored for hours that began earlier. None if nothing was
    purged.

    Call it in the transaction that stores, after its first write: a purge waits for transactions that may not have seen
    it.
    """
    return session.scalar(select(func.max(Purge.before)))


def frozen_before(session: Session) -> datetime | None:
    """The instant before which the summaries of hours are final; None if none are."""
    return session.scalar(select(func.max(Purge.before)).where(Purge.frozen_at.is_not(None)))
