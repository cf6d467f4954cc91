"""The steps of a tick, each by itself: one that fails keeps no other from its turn, and operators see that it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from common.database.errors import DatabaseDownError
from common.database.sessions import session_scope
from common.domain import MaskwatchError, first_line
from common.ledger import failing_steps
from common.observability.logs import get_logger

T = TypeVar("T")

log = get_logger(__name__)

#: Steps whose last outcome this process has written to the database, and whether they succeeded.
_told: dict[tuple[str, str], bool] = {}


class TickFailedError(MaskwatchError):
    """Some steps of a tick failed; the others were done."""


def run_steps(tick: str, steps: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Call every step, in order; returns what each returned.

    Raises `TickFailedError`, after all were called, if some failed. Each failure is logged and noted in the ledger.
    Raises `DatabaseDownError` at once.
    """
    done: dict[str, T] = {}
    failed: list[str] = []
    for name, step in steps.items():
        try:
            done[name] = step()
        except DatabaseDownError:
            raise  # the other steps would only wait for the same database
        except Exception as error:
            detail = str(error) if isinstance(error, MaskwatchError) else first_line(error)
            log.error("a step of a tick failed", task=tick, step=name, detail=detail, exc_info=_unexpected(error))
            failed.append(f"{name} ({detail})")
            _tell(tick, name, detail)
        else:
            _tell(tick, name, None)
    if failed:
        raise TickFailedError(f"failed: {'; '.join(failed)}")
    return done


def _unexpected(error: Exception) -> bool:
    """Whether the log needs a traceback: a service that is down explains itself."""
    return not isinstance(error, MaskwatchError)


def _tell(tick: str, step: str, problem: str | None) -> None:
    """Note or forget a failure. A success is written only after a failure, and once when this process begins."""
    if problem is None and _told.get((tick, step)):
        return
    try:
        with session_scope() as session:
            if problem is None:
                failing_steps.forget(session, tick, step)
            else:
                failing_steps.note(session, tick, step, problem)
        _told[tick, step] = problem is None
    except (MaskwatchError, SQLAlchemyError) as error:
        # The database is down, or of a schema without this table: the log has said what failed.
        log.debug("a failing step could not be noted", detail=first_line(error))
