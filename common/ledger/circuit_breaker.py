"""The circuit breaker: a source (bucket) that refuses everything is paused, with a reason, until it answers again.

Refusals in a row, without a success in between, pause a source: its jobs wait instead of filling the quarantine. From
time to time a single job of a paused source is sent as a trial, each after a longer wait. If the source answers the
trial, the pause ends.

A transaction that locks jobs and sources locks the jobs first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from common.database.tables import Source
from common.domain import MaskwatchError, PausePolicy, Reason


@dataclass(frozen=True, slots=True)
class PausedSource:
    """A paused source, for people."""

    bucket: str
    reason: str
    detail: str
    paused_at: datetime
    next_trial_at: datetime


def ensure(session: Session, bucket: str) -> int:
    """The id of a bucket's source."""
    find = select(Source.id).where(Source.bucket == bucket)
    found = session.scalar(find)
    if found is None:
        session.execute(insert(Source).values(bucket=bucket).on_conflict_do_nothing())
        found = session.scalar(find)
    assert found is not None
    return found


def refused(session: Session, source_id: int, reason: Reason, detail: str, policy: PausePolicy) -> bool:
    """Count a refusal of a source; returns whether the source is paused now."""
    return bool(
        session.scalar(
            text(
                """
                UPDATE sources
                SET refusals = refusals + 1,
                    -- when the transaction began: what it quarantines itself is refused since then
                    refusing_since = coalesce(refusing_since, now()),
                    reason = :reason,
                    detail = :detail,
                    paused_at = CASE WHEN refusals + 1 >= :limit THEN coalesce(paused_at, clock_timestamp()) END,
                    next_trial_at = CASE
                        WHEN refusals + 1 >= :limit
                        THEN coalesce(next_trial_at, clock_timestamp() + make_interval(secs => :seconds))
                    END
                WHERE id = :id
                RETURNING paused_at IS NOT NULL
                """
            ),
            {
                "id": source_id,
                "reason": reason.value,
                "detail": detail,
                "limit": policy.after_refusals,
                "seconds": policy.seconds,
            },
        )
    )


#: SQL assignments that clear a source's refusals and end its pause.
ANSWERED = (
    "refusals = 0, refusing_since = NULL, paused_at = NULL, next_trial_at = NULL, trials = 0, reason = NULL,"
    " detail = NULL"
)


def answered(session: Session, source_id: int) -> None:
    """The source gave an object: clear its refusals and end its pause."""
    session.execute(
        text(f"UPDATE sources SET {ANSWERED} WHERE id = :id AND refusals > 0"),
        {"id": source_id},
    )


def take_due_trials(session: Session, policy: PausePolicy) -> list[int]:
    """The paused sources whose trial is due; sets the time of their next trial."""
    rows = session.execute(
        text(
            """
            UPDATE sources
            SET trials = trials + 1,
                next_trial_at = clock_timestamp()
                    + make_interval(secs => least(:cap, :seconds * power(2, least(trials + 1, 30))))
            WHERE paused_at IS NOT NULL
              AND next_trial_at <= clock_timestamp()
            RETURNING id
            """
        ),
        {"seconds": policy.seconds, "cap": policy.cap_seconds},
    )
    return sorted(rows.scalars())


def resume(session: Session, bucket: str) -> None:
    """End the pause of a source, for an operator. Raises `MaskwatchError` if it isn't paused."""
    row = session.execute(
        text(f"UPDATE sources SET {ANSWERED} WHERE bucket = :bucket AND paused_at IS NOT NULL RETURNING id"),
        {"bucket": bucket},
    ).first()
    if row is None:
        paused = ", ".join(source.bucket for source in list_paused(session)) or "none is"
        raise MaskwatchError(f"{bucket} is not paused (paused: {paused})")


def list_all(session: Session) -> Sequence[Source]:
    """Every source, by name."""
    return session.scalars(select(Source).order_by(Source.bucket)).all()


def list_paused(session: Session) -> list[PausedSource]:
    """The paused sources, the one paused for the longest time first."""
    rows = session.scalars(select(Source).where(Source.paused_at.is_not(None)).order_by(Source.paused_at, Source.id))
    return [
        PausedSource(row.bucket, row.reason or "", row.detail or "", row.paused_at, row.next_trial_at)
        for row in rows
        if row.paused_at is not None and row.next_trial_at is not None
    ]
