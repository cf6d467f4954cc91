"""Waiting for jobs to end, with a progress bar, and a note when nothing moves."""

from __future__ import annotations

import time

from common import ledger
from common.catalog import backfills
from common.cli.parts.console import Bar, bar, note
from common.database.sessions import session_scope
from common.ledger import circuit_breaker
from common.messaging.queues import BrokerDownError, TaskName, send
from common.settings import Settings

#: Seconds without any change after which a note says what may be missing.
PATIENCE = 30.0


def wait_for(settings: Settings, location: str | None = None, *, backfill_id: int | None = None) -> None:
    """Return when all jobs of the backfill, of the location, or of all locations have ended, and the summaries include
    their results.

    Raises `MaskwatchError` when the backfill is paused or cancelled meanwhile.
    """
    waiting = _Waiting(location, backfill_id)
    asked_for_summary = False
    with bar("analysing", detail="objects") as shown:
        while True:
            active, marks = waiting.ask()
            waiting.show(shown, active=active, marks=marks)
            if not active and not marks:
                return
            if not active and not asked_for_summary:
                asked_for_summary = True
                _ask_for_summary()
            waiting.tell_if_nothing_moves()
            time.sleep(min(0.5, settings.dispatch.interval_seconds))


class _Waiting:
    """What is waited for, and which notes have been printed about it."""

    def __init__(self, location: str | None, backfill_id: int | None) -> None:
        self._location, self._backfill_id = location, backfill_id
        self._paused: set[str] = set()
        self._first: tuple[float, ledger.Progress] | None = None
        self._count_again_at = 0.0
        self._before, self._changed_at, self._told = (-1, -1), time.monotonic(), False

    def ask(self) -> tuple[bool, int]:
        """Whether a job has not ended, and how many marks wait to be summarized. Prints sources that have been paused
        meanwhile."""
        with session_scope() as session:
            active = ledger.any_active(session, self._location, backfill_id=self._backfill_id)
            marks = ledger.unsummarized(session, self._location)
            if active and self._backfill_id is not None:
                backfills.check_wanted(session, self._backfill_id)
            paused = [source for source in circuit_breaker.list_paused(session) if source.bucket not in self._paused]
        for source in paused:
            self._paused.add(source.bucket)
            note(
                f"{source.bucket} refuses every request and is paused ({source.detail}); it is tried again from time "
                f"to time. When the cause is put right: maskwatch sources resume {source.bucket}"
            )
        return active, marks

    def show(self, shown: Bar, *, active: bool, marks: int) -> None:
        """Count the objects and update the bar; while jobs are active, counting takes at most a tenth of the time."""
        asked_at = time.monotonic()
        if active and asked_at < self._count_again_at:
            return
        with session_scope() as session:
            so_far = ledger.progress(session, self._location, backfill_id=self._backfill_id)
        # Counting a large ledger takes a while.
        self._count_again_at = time.monotonic() + 9 * (time.monotonic() - asked_at)
        self._first = self._first or (asked_at, so_far)
        done = so_far.objects_ended - self._first[1].objects_ended
        shown.show(so_far.objects_ended, so_far.objects, in_words(so_far, done, asked_at - self._first[0]))
        if (so_far.jobs_active, marks) != self._before:
            self._before, self._changed_at, self._told = (so_far.jobs_active, marks), time.monotonic(), False

    def tell_if_nothing_moves(self) -> None:
        """Print once what may be missing, when nothing has changed for `PATIENCE` seconds."""
        if not self._told and time.monotonic() - self._changed_at > PATIENCE:
            self._told = True
            note(
                f"no progress for {PATIENCE:.0f} s; check that a producer, a worker and an aggregator are running "
                "(maskwatch status)"
            )


def in_words(so_far: ledger.Progress, done: int, seconds: float) -> str:
    """What a bar can't show: the rate at which `done` objects ended in `seconds`, and how many hours of video ended."""
    words = "objects"
    if done and seconds:
        rate = done / seconds
        words += f", {rate:.1f} per second" if rate >= 1 else f", {60 * rate:.1f} per minute"
    if so_far.footage_seconds:
        words += f", {so_far.footage_ended_seconds / 3600:.1f} of {so_far.footage_seconds / 3600:.1f} hours of video"
    return words


def _ask_for_summary() -> None:
    """Ask the aggregator to work now, sooner than at its next tick."""
    try:
        send(TaskName.SUMMARIZE, (), expires=60)
    except BrokerDownError as error:
        note(f"warning: {error}")
