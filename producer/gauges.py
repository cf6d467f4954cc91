"""Gauges of the ledger and the queues, read when Prometheus asks: how much waits, and for how long.

Cheap, however large the ledger is: only what is still to be done is counted, by its indexes and up to a limit, and at
most every few seconds. Ended jobs are counted by the process that ended them (`common/observability/metrics.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from common import ledger
from common.catalog import schedule
from common.database.sessions import session_scope
from common.domain import ACTIVE_STATES, JobState, Lane, MaskwatchError, first_line
from common.ledger import circuit_breaker, failing_steps
from common.messaging.queues import PRIORITIES, Queue, queue_length, redis_client
from common.observability.logs import get_logger
from common.observability.metrics import LANES

log = get_logger(__name__)

#: How long an answer is kept, in seconds: two Prometheus servers, or a person who reloads, cost the database nothing.
CACHE_SECONDS = 10.0
#: Jobs counted per state, lane, source and backfill; more of them are reported as this many.
COUNT_LIMIT = 10_000
#: Timeout of each statement, in seconds: Prometheus waits for the answer.
STATEMENT_SECONDS = 5

#: Every gauge and its help, as they are served.
GAUGES = {
    "maskwatch_ledger_up": "Whether the database answered (1) or not (0); the other gauges come from it.",
    "maskwatch_broker_up": "Whether Redis answered (1) or not (0).",
    "maskwatch_jobs": f"Jobs by state and lane, in states that are not final, and in quarantine; counted up to"
    f" {COUNT_LIMIT:,} for each source and backfill.",
    "maskwatch_dispatch_backlog_jobs": "Pending jobs that may be sent, because neither their source nor their backfill"
    " is paused; counted up to the same limit as maskwatch_jobs.",
    "maskwatch_oldest_pending_seconds": "Age of the oldest job that may be sent and has not been; 0 if there is none.",
    "maskwatch_summary_lag_seconds": "Age of the oldest hour that waits to be summarized; 0 if there is none.",
    "maskwatch_paused_sources": "Sources that are paused because they refused every request.",
    "maskwatch_failing_steps": "Steps of the producer's ticks that failed when they were last tried; maskwatch status"
    " names them.",
    "maskwatch_camera_problems": "Cameras whose last poll failed; maskwatch cameras list names them.",
    "maskwatch_queue_messages": "Messages that wait in Redis.",
}

#: States with an index of their own.
COUNTED = (*ACTIVE_STATES, JobState.QUARANTINED)


class LedgerGauges(Collector):
    """The gauges, for a registry of Prometheus's library. Its server's threads read them, one at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._read_at = float("-inf")
        self._families: list[GaugeMetricFamily] = []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        with self._lock:
            if self._clock() - self._read_at >= CACHE_SECONDS:
                self._families = [*_from_ledger(), *_from_queues()]
                self._read_at = self._clock()
            return self._families


def _from_ledger() -> list[GaugeMetricFamily]:
    try:
        with session_scope() as session:
            session.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'"))
            waiting = ledger.waiting(session, limit=COUNT_LIMIT)
            lag = ledger.summary_lag(session)
            paused = len(circuit_breaker.list_paused(session))
            failing = len(failing_steps.list_all(session))
            cameras = schedule.count_problems(session)
    except (MaskwatchError, SQLAlchemyError) as error:
        log.warning("the ledger could not be read for metrics", detail=first_line(error))
        return [_gauge("maskwatch_ledger_up", 0)]
    by_state, backlog, oldest = _by_lane(waiting)
    return [
        _gauge("maskwatch_ledger_up", 1),
        _by("maskwatch_jobs", ("state", "lane"), {(state.value, LANES[lane]): n for (state, lane), n in by_state}),
        _by("maskwatch_dispatch_backlog_jobs", ("lane",), {(LANES[lane],): n for lane, n in backlog.items()}),
        _by("maskwatch_oldest_pending_seconds", ("lane",), {(LANES[lane],): age for lane, age in oldest.items()}),
        _gauge("maskwatch_summary_lag_seconds", lag),
        _gauge("maskwatch_paused_sources", paused),
        _gauge("maskwatch_failing_steps", failing),
        _gauge("maskwatch_camera_problems", cameras),
    ]


def _by_lane(
    waiting: Iterable[ledger.Waiting],
) -> tuple[Iterable[tuple[tuple[JobState, Lane], int]], dict[Lane, int], dict[Lane, float]]:
    """Jobs by state and lane, the dispatcher's backlog by lane, and the age of its oldest job."""
    by_state = {(state, lane): 0 for state in COUNTED for lane in Lane}
    backlog: dict[Lane, int] = dict.fromkeys(Lane, 0)
    oldest: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
    for row in waiting:
        by_state[row.state, row.lane] += row.jobs
        if row.state is JobState.PENDING and not row.held:
            backlog[row.lane] += row.jobs
            oldest[row.lane] = max(oldest[row.lane], row.oldest_seconds)
    return by_state.items(), backlog, oldest


def _from_queues() -> list[GaugeMetricFamily]:
    try:
        with redis_client() as client:
            lengths: dict[tuple[str, ...], int] = {
                (queue.value, LANES[lane]): queue_length(client, queue, lane)
                for queue in Queue
                # Only the workers' queue has lanes; messages of other queues have the first priority.
                for lane in (PRIORITIES if queue is Queue.MEDIA else (Lane.LIVE,))
            }
    except (MaskwatchError, OSError) as error:
        log.warning("the queues could not be read for metrics", detail=first_line(error))
        return [_gauge("maskwatch_broker_up", 0)]
    return [_gauge("maskwatch_broker_up", 1), _by("maskwatch_queue_messages", ("queue", "lane"), lengths)]


def _gauge(name: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, GAUGES[name], value=value)


def _by(name: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, GAUGES[name], labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
