"""Waiting for the work to be done, with a bar to look at and a word when nothing moves."""

from __future__ import annotations

import time

from common import backfills, ledger, sources
from common.cli.console import bar, note
from common.database import session_scope
from common.queues import BrokerDownError, TaskName, send
from common.settings import Settings

#: Seconds without any change after which a person is told what may be missing.
PATIENCE = 30.0


def wait_for(settings: Settings, location: str | None = None, *, backfill_id: int | None = None) -> None:
    """Return when no job of the backfill, of the location or of all has anything left to do, and the location's
    summaries hold it all.

    Raises `MaskwatchError` when the backfill is paused or cancelled meanwhile.
    """
    before, changed_at, told = (-1, -1), time.monotonic(), False
    asked_for_summary, count_again_at = False, 0.0
    paused: set[str] = set()
    first: tuple[float, ledger.Progress] | None = None
    with bar("analysing", detail="objects") as shown:
        while True:
            with session_scope() as session:
                active = ledger.any_active(session, location, backfill_id=backfill_id)
                marks = ledger.unsummarized(session, location)
                if active and backfill_id is not None:
                    backfills.check_wanted(session, backfill_id)
                for source in sources.list_paused(session):
                    if source.bucket not in paused:
                        paused.add(source.bucket)
                        note(
                            f"{source.bucket} refuses everything and is paused ({source.detail}); it is tried again "
                            f"now and then. Put right: maskwatch sources resume {source.bucket}"
                        )
            if time.monotonic() >= count_again_at or not active:
                asked_at = time.monotonic()
                with session_scope() as session:
                    so_far = ledger.progress(session, location, backfill_id=backfill_id)
                # Counting a large ledger takes a while: never more than a tenth of the time.
                count_again_at = time.monotonic() + 9 * (time.monotonic() - asked_at)
                first = first or (asked_at, so_far)
                done = so_far.objects_ended - first[1].objects_ended
                shown.show(so_far.objects_ended, so_far.objects, in_words(so_far, done, asked_at - first[0]))
                if (so_far.jobs_active, marks) != before:
                    before, changed_at, told = (so_far.jobs_active, marks), time.monotonic(), False
            if not active and not marks:
                return
            if not active and not asked_for_summary:
                asked_for_summary = True
                _ask_for_summary()
            if not told and time.monotonic() - changed_at > PATIENCE:
                told = True
                note(
                    f"nothing has moved for {PATIENCE:.0f} s; are a producer, a worker and an aggregator running? "
                    "maskwatch status"
                )
            time.sleep(min(0.5, settings.dispatch.interval_seconds))


def in_words(so_far: ledger.Progress, done: int, seconds: float) -> str:
    """What a bar can't show: how quickly objects were done in the last so many seconds, and how much video is."""
    words = "objects"
    if done and seconds:
        rate = done / seconds
        words += f", {rate:.1f} per second" if rate >= 1 else f", {60 * rate:.1f} per minute"
    if so_far.footage_seconds:
        words += f", {so_far.footage_ended_seconds / 3600:.1f} of {so_far.footage_seconds / 3600:.1f} hours of video"
    return words


def _ask_for_summary() -> None:
    """The aggregator's next tick would do as well; this is sooner."""
    try:
        send(TaskName.SUMMARIZE, (), expires=60)
    except BrokerDownError as error:
        note(f"warning: {error}")
