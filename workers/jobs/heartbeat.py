"""Holds the leases of a group of jobs, while there is progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from sqlalchemy.exc import DBAPIError

from common import ledger
from common.database.sessions import session_scope
from common.domain import MaskwatchError
from common.ledger import ClaimedJob
from common.observability.logs import get_logger
from common.settings import Settings

log = get_logger(__name__)


class Heartbeat:
    """Renews the leases of a group's unfinished jobs from a thread of its own, while there is progress.

    `lost` holds the ids of jobs that the ledger no longer leases to this process. Their work is not interrupted (native
    code can't be), but its commit would be refused.
    """

    def __init__(self, jobs: Sequence[ClaimedJob], settings: Settings) -> None:
        self.lost: set[int] = set()
        self._limits = settings.ledger
        self._held = {job.ref.id: job.ref for job in jobs}
        self._progress_at = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def done(self, job: ClaimedJob) -> None:
        """The job has ended: stop renewing its lease, and count it as progress."""
        with self._lock:
            self._held.pop(job.ref.id, None)
            self._progress_at = time.monotonic()

    def progress(self) -> None:
        """A part of a job is done."""
        with self._lock:
            self._progress_at = time.monotonic()

    def _beat(self) -> None:
        while not self._stop.wait(self._limits.heartbeat_seconds):
            with self._lock:
                held = dict(self._held)
                stalled = time.monotonic() - self._progress_at > self._limits.stall_seconds
            if stalled:
                log.error("no progress: leases are left to run out", jobs=sorted(held))
                continue
            try:
                with session_scope() as session:
                    mine = ledger.renew(session, list(held.values()), lease_seconds=self._limits.lease_seconds)
            except (MaskwatchError, DBAPIError):
                log.warning("heartbeat failed", exc_info=True)
                continue
            with self._lock:
                # A job that ended while the ledger was asked is done, not lost.
                self.lost |= {job_id for job_id in held if job_id not in mine and job_id in self._held}
