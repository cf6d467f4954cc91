"""Purging: faces seen before an instant are removed for good, and the sums made of them stay as they are.

A kill may interrupt it at any step; the next call goes on. The steps: record the instant before which nothing more is
stored, wait for the transactions that can't have seen that record, update the summaries before that instant a last
time, freeze them, and only then drop the faces: whole months with their partition, the rest of a month row by row.
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
    """Remove all faces seen before an aware instant. Purging the same or an earlier time again changes nothing;
    an interrupted purge that reaches further is finished.

    Raises `MaskwatchError` for an instant in the future, and if an older transaction doesn't end.
    """
    if before > datetime.now(UTC):
        raise MaskwatchError(
            f"{before:%Y-%m-%d} lies in the future: footage that is still to come would be refused; give a past date"
        )
    with session_scope() as session:
        before = _begin(session, before, by)
    with session_scope() as session:
        # Every transaction that this one doesn't count as ended, and that has begun to write, has a lower id.
        begun = session.scalar(text("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint"))
    assert isinstance(begun, int)
    on_step("waiting for older transactions to end")
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
    """Record the purge, unless one that reaches as far is recorded; returns the instant that holds now."""
    reached: datetime | None = session.scalar(select(func.max(Purge.before)))
    if reached is not None and reached >= before:
        return reached
    action = audit.record(session, "purge", by, detail=f"before {before.isoformat()}")
    session.add(Purge(before=before, action_id=action))
    return before


def _wait_for_older(xid: int) -> None:
    """Wait until all transactions with a lower id have ended: they may not have seen the record of the purge."""
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
    """Freeze the summaries before the instant, if no marks of that time are left; returns whether it did."""
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
                """
                SELECT relname
                FROM pg_inherits
                JOIN pg_class ON pg_class.oid = inhrelid
                WHERE inhparent = 'faces'::regclass
                  AND relname <> 'faces_default'
                ORDER BY relname
                """
            )
        ).all()
    # Compared as names, which sort as their months do.
    dropped = [name for name in names if name < partition_name(month_of(before))]
    for name in dropped:
        try:
            with session_scope() as session:
                # DROP waits for readers, and new readers wait for it: give up after a short while.
                session.execute(text("SET LOCAL lock_timeout = '10s'"))
                session.execute(text(f"DROP TABLE {session.connection().dialect.identifier_preparer.quote(name)}"))
        except OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            raise MaskwatchError(
                f"a long query is reading {name}; what was removed stays removed: purge again when the query has ended"
            ) from error
    return dropped


def _delete_faces(before: datetime) -> int:
    """Delete, in batches, the faces in the month that is purged in part, or in the default partition."""
    gone = 0
    while True:
        with session_scope() as session:
            deleted = len(
                session.execute(
                    text(
                        """
                        DELETE FROM faces
                        WHERE (id, observed_at) IN (
                            SELECT id, observed_at FROM faces WHERE observed_at < :before LIMIT :batch
                        )
                        RETURNING 1
                        """
                    ),
                    {"before": before, "batch": BATCH},
                ).all()
            )
        gone += deleted
        if deleted < BATCH:
            return gone
