"""The steps of the producer's ticks that fail: noted where operators see them, and forgotten once they succeed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.ledger.registration import storable


@dataclass(frozen=True, slots=True)
class FailingStep:
    """A step that failed when it was last tried. `times`: how often, since `since`."""

    tick: str
    step: str
    detail: str
    since: datetime
    last_at: datetime
    times: int


_NOTE = """
INSERT INTO failing_steps (tick, step, detail)
VALUES (:tick, :step, :detail)
ON CONFLICT (tick, step) DO UPDATE
SET detail = excluded.detail,
    last_at = clock_timestamp(),
    times = failing_steps.times + 1
"""

_LIST = """
SELECT tick, step, detail, since, last_at, times
FROM failing_steps
ORDER BY since, tick, step
"""


def note(session: Session, tick: str, step: str, detail: str) -> None:
    """Note that a step has failed, and why."""
    session.execute(text(_NOTE), {"tick": tick, "step": step, "detail": storable(detail)})


def forget(session: Session, tick: str, step: str) -> None:
    """A step has succeeded: forget that it failed."""
    session.execute(text("DELETE FROM failing_steps WHERE tick = :tick AND step = :step"), {"tick": tick, "step": step})


def list_all(session: Session) -> list[FailingStep]:
    """The steps that fail, the one that has failed for the longest time first."""
    return [FailingStep(*row) for row in session.execute(text(_LIST))]
