"""Backfills as rows: begun, listed in parts, paused, resumed, cancelled. Their jobs belong to the ledger.

A listing is divided into parts, each with a cursor that moves in the transaction that registers what was listed. So
after the process of a backfill was killed, the next one continues behind the last object in the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.orm import Session

from common import ledger
from common.database.tables import Backfill, BackfillPart, Camera, Location
from common.domain import ACTIVE_STATES, JobState, MaskwatchError, TimeRange
from common.ledger import audit

#: First key of the advisory lock that the process listing a backfill holds: "mwbf". The second is the backfill's id.
_LISTING_LOCK = 0x6D77_6266

#: Jobs cancelled per transaction: a backfill may have millions.
_CANCELLED_AT_ONCE = 5000


class ListingStoppedError(MaskwatchError):
    """Somebody paused or cancelled the backfill while it was being listed."""


@dataclass(frozen=True, slots=True)
class BackfillState:
    """A backfill, for people."""

    id: int
    source: str
    location: str
    camera: str | None
    started_at: datetime
    #: listing, working, done, paused or cancelled.
    state: str
    jobs: Mapping[str, int]


def find_unfinished(session: Session, wanted: Backfill) -> Backfill | None:
    """The newest backfill with the same options whose listing has not ended."""
    same = [
        getattr(Backfill, name).is_not_distinct_from(getattr(wanted, name))
        for name in (
            "source", "source_id", "inventory", "location_id", "camera_id", "pipeline_id", "since", "until",
            "time_pattern",
        )
    ]  # fmt: skip
    return session.scalar(
        select(Backfill)
        .where(*same, Backfill.finished_at.is_(None), Backfill.cancelled_at.is_(None))
        .order_by(Backfill.id.desc())
        .limit(1)
    )


def get(session: Session, backfill_id: int) -> Backfill:
    """Raises `MaskwatchError` if there is no backfill of that number."""
    found = session.get(Backfill, backfill_id)
    if found is None:
        raise MaskwatchError(f"there is no backfill {backfill_id}; list them: maskwatch backfills list")
    return found


@contextmanager
def listing(engine: Engine, backfill_id: int) -> Iterator[None]:
    """Be the one process that lists a backfill, until the end of the block or of this process.

    Raises `MaskwatchError` while another process lists it.
    """
    lock = {"space": _LISTING_LOCK, "id": backfill_id % 2**31}
    # A lock of the session: Postgres releases it when the process dies, and no transaction stays open.
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:space, :id)"), lock):
            raise MaskwatchError(f"backfill {backfill_id} is being listed by another process; wait for it, or stop it")
        try:
            yield
        finally:
            connection.scalar(text("SELECT pg_advisory_unlock(:space, :id)"), lock)


def add_parts(session: Session, backfill_id: int, parts: Sequence[Mapping[str, Any]]) -> None:
    """Divide a backfill's listing; each part is values of `BackfillPart`."""
    session.add_all(BackfillPart(backfill_id=backfill_id, number=number, **part) for number, part in enumerate(parts))


def open_parts(session: Session, backfill_id: int) -> list[BackfillPart]:
    """The parts that are still to be listed."""
    query = select(BackfillPart).where(BackfillPart.backfill_id == backfill_id, BackfillPart.finished_at.is_(None))
    return list(session.scalars(query.order_by(BackfillPart.number)))


def check_wanted(session: Session, backfill_id: int) -> None:
    """Raise `ListingStoppedError` if somebody has paused or cancelled the backfill; until this transaction ends, nobody
    can."""
    paused_at, cancelled_at = session.execute(
        select(Backfill.paused_at, Backfill.cancelled_at).where(Backfill.id == backfill_id).with_for_update(read=True)
    ).one()
    if cancelled_at is not None:
        raise ListingStoppedError(f"backfill {backfill_id} was cancelled; what it has analysed stays")
    if paused_at is not None:
        raise ListingStoppedError(
            f"backfill {backfill_id} is paused, nothing is lost; continue with: maskwatch backfills resume "
            f"{backfill_id}"
        )


def advance(session: Session, part: BackfillPart, cursor: str, counts: Counter[str]) -> None:
    """Store how far a part is registered, and its counts so far. Call it in the transaction that registers."""
    session.execute(_of(part).values(cursor=cursor, counts=dict(counts)))


def finish_part(session: Session, part: BackfillPart) -> None:
    """Store that the listing of a part has ended."""
    session.execute(_of(part).values(finished_at=func.clock_timestamp()))


def _of(part: BackfillPart) -> Any:
    return update(BackfillPart).where(BackfillPart.backfill_id == part.backfill_id, BackfillPart.number == part.number)


def counted(session: Session, backfill_id: int) -> Counter[str]:
    """What was found so far, over all parts."""
    total: Counter[str] = Counter()
    for counts in session.scalars(select(BackfillPart.counts).where(BackfillPart.backfill_id == backfill_id)):
        total.update(counts)
    return total


def finish(session: Session, backfill_id: int) -> None:
    """Store that the listing of a backfill has ended."""
    session.execute(
        update(Backfill)
        .where(Backfill.id == backfill_id)
        .values(finished_at=func.clock_timestamp(), counts=dict(counted(session, backfill_id)))
    )


def pause(session: Session, backfill_id: int, *, by: str) -> None:
    """Stop a backfill's listing, and send no more of its jobs; running jobs are finished. Recorded.

    Raises `MaskwatchError` if the backfill is paused already, or cancelled.
    """
    backfill = _lock(session, backfill_id)
    if backfill.paused_at is not None:
        raise MaskwatchError(f"backfill {backfill_id} is paused already, since {backfill.paused_at:%Y-%m-%d %H:%M} UTC")
    backfill.paused_at = func.clock_timestamp()
    audit.record(session, "pause", by, detail=f"backfill {backfill_id}")


def resume(session: Session, backfill_id: int, *, by: str) -> Backfill:
    """Resume a paused backfill. Recorded. Raises `MaskwatchError` if it isn't paused."""
    backfill = _lock(session, backfill_id)
    if backfill.paused_at is None:
        raise MaskwatchError(f"backfill {backfill_id} is not paused; see its state with: maskwatch backfills list")
    backfill.paused_at = None
    audit.record(session, "resume", by, detail=f"backfill {backfill_id}")
    return backfill


def stop(session: Session, backfill_id: int, *, by: str) -> None:
    """Cancel a backfill: its listing ends, and nothing more of it is sent. Recorded. `cancel_some` cancels its jobs.

    Doing it again is no error, because an earlier command may have been stopped before all jobs were cancelled.
    """
    backfill = get(session, backfill_id)
    session.refresh(backfill, with_for_update=True)
    if backfill.cancelled_at is None:
        backfill.cancelled_at = func.clock_timestamp()
        audit.record(session, "cancel", by, detail=f"backfill {backfill_id}")


def cancel_some(session: Session, backfill_id: int, *, by: str) -> list[int]:
    """Cancel at most `_CANCELLED_AT_ONCE` active jobs of a backfill; returns their ids, none when no job is active."""
    return ledger.cancel_backfill(session, backfill_id, by=by, limit=_CANCELLED_AT_ONCE)


def _lock(session: Session, backfill_id: int) -> Backfill:
    backfill = get(session, backfill_id)
    session.refresh(backfill, with_for_update=True)
    if backfill.cancelled_at is not None:
        raise MaskwatchError(
            f"backfill {backfill_id} was cancelled at {backfill.cancelled_at:%Y-%m-%d %H:%M} UTC; begin "
            "another one to analyse the rest"
        )
    return backfill


def within(backfill: Backfill) -> TimeRange:
    """The time range of a backfill's footage."""
    return TimeRange(backfill.since, backfill.until)


def list_all(session: Session, *, limit: int, backfill_id: int | None = None) -> list[BackfillState]:
    """The newest backfills, or the one of that number, with the number of jobs in each state."""
    query = (
        select(Backfill, Location.name, Camera.name)
        .join(Location, Location.id == Backfill.location_id)
        .outerjoin(Camera, Camera.id == Backfill.camera_id)
        .order_by(Backfill.id.desc())
        .limit(limit)
    )
    if backfill_id is not None:
        query = query.where(Backfill.id == backfill_id)
    found = []
    for row, location, camera in session.execute(query).tuples():
        jobs = ledger.counts_by_state(session, row.id)
        found.append(
            BackfillState(
                row.id,
                row.inventory or row.source,
                location,
                camera,
                row.started_at,
                _state(row, jobs),
                {state.value: count for state, count in jobs.items() if count},
            )
        )
    return found


def _state(row: Backfill, jobs: Mapping[JobState, int]) -> str:
    if row.cancelled_at is not None:
        return "cancelled"
    if row.paused_at is not None:
        return "paused"
    if row.finished_at is None:
        return "listing"
    return "working" if any(jobs[state] for state in ACTIVE_STATES) else "done"
