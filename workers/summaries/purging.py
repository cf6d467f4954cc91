"""Purging: faces seen before an instant are removed for good, and the sums made of them stay as they are.

In steps that a kill may interrupt anywhere; the next call goes on. Write down from when on nothing older is stored,
wait for the transactions that can't have seen that, bring the summaries of that time up to date a last time, freeze
them, and only then drop the faces: whole months with their partition, the rest of a month row by row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from common.database.partitions import month_of, partition_name
from common.database.sessions import session_scope
from common.database.tables import Purge
from common.database.versions import AGGREGATION_LOCK
from common.domain import MaskwatchError
from common.ledger import audit
from workers.summaries.aggregation import summarize

#: Rows that one DELETE takes, to stay within the statement timeout.
BATCH = 20_000

#: How long to wait for older transactions: longer than one may stay idle (`common/database/sessions.py`).
WAIT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge removed."""

    before: datetime
    partitions: list[str]
    #: Faces outside of those partitions.
    faces: int


def purge(before: datetime, *, by: str, on_step: Callable[[str], None] = lambda step: None) -> Purged:
    """Remove all faces seen before an aware instant. Purging again, or what is purged already, changes nothing more;
    one that was interrupted is finished, if it reaches further.

    Raises `MaskwatchError` for an instant in the future, and where an older transaction doesn't end.
    """
    if before > datetime.now(UTC):
        raise MaskwatchError(f"{before:%Y-%m-%d} is not past: what is purged would be refused when it arrives")
    with session_scope() as session:
        before = _begin(session, before, by)
    with session_scope() as session:
        # Every transaction that this one doesn't count as ended, and that has begun to write, has a lower id.
        begun = session.scalar(text("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"))
    assert isinstance(begun, int)
    on_step("waiting for transactions that began before")
    _wait_for_older(begun)
    on_step("bringing the summaries up to date")
    while not _freeze(before):
        summarize()
    on_step("removing faces")
    partitions = _drop_partitions(before)
    faces = _delete_faces(before)
    with session_scope() as session:
        session.execute(
            update(Purge)
            .where(Purge.before <= before, Purge.finished_at.is_(None))
            .values(finished_at=func.clock_timestamp())
        )
    return Purged(before, partitions, faces)


def _begin(session: Session, before: datetime, by: str) -> datetime:
    """Write the purge down, unless one that reaches as far is; returns the instant that holds now."""
    reached: datetime | None = session.scalar(select(func.max(Purge.before)))
    if reached is not None and reached >= before:
        return reached
    action = audit.record(session, "purge", by, detail=f"before {before.isoformat()}")
    session.add(Purge(before=before, action_id=action))
    return before


def _wait_for_older(xid: int) -> None:
    """Wait until every transaction that began to write before this id has ended: it may not know of the purge."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with session_scope() as session:
            oldest = session.scalar(text("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"))
        assert isinstance(oldest, int)
        if oldest >= xid:
            return
        if time.monotonic() > deadline:
            raise MaskwatchError(
                f"a transaction that began before the purge has been open for {WAIT_SECONDS:.0f} s; nothing was "
                "removed yet. End it (pg_stat_activity shows it) and purge again"
            )
        time.sleep(0.05)


def _freeze(before: datetime) -> bool:
    """Declare the summaries of that time final, if no mark of it is left."""
    with session_scope() as session:
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": AGGREGATION_LOCK})
        if session.scalar(text("SELECT EXISTS (SELECT FROM dirty_marks WHERE hour < :before)"), {"before": before}):
            return False
        session.execute(
            update(Purge)
            .where(Purge.before <= before, Purge.frozen_at.is_(None))
            .values(frozen_at=func.clock_timestamp())
        )
        return True


def _drop_partitions(before: datetime) -> list[str]:
    """Drop the months that ended before; returns their partitions' names."""
    with session_scope() as session:
        names = session.scalars(
            text(
                "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid"
                " WHERE inhparent = 'faces'::regclass AND relname <> 'faces_default' ORDER BY relname"
            )
        ).all()
    # Compared as names, which sort as their months do.
    dropped = [name for name in names if name < partition_name(month_of(before))]
    for name in dropped:
        try:
            with session_scope() as session:
                # Readers hold it up, and it them: shortly, or not at all.
                session.execute(text("SET LOCAL lock_timeout = '10s'"))
                session.execute(text(f"DROP TABLE {session.connection().dialect.identifier_preparer.quote(name)}"))
        except OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            raise MaskwatchError(
                f"{name} is being read for long; what was reached is kept: purge again when the query has ended"
            ) from error
    return dropped


def _delete_faces(before: datetime) -> int:
    """Delete, in batches, what lies in the month that is purged in part, or in no month's partition."""
    gone = 0
    while True:
        with session_scope() as session:
            deleted = len(
                session.execute(
                    text(
                        "DELETE FROM faces WHERE (id, observed_at) IN (SELECT id, observed_at FROM faces"
                        " WHERE observed_at < :before LIMIT :batch) RETURNING 1"
                    ),
                    {"before": before, "batch": BATCH},
                ).all()
            )
        gone += deleted
        if deleted < BATCH:
            return gone
