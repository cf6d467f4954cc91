"""Metrics for Prometheus: the name of every metric, and how they are counted.

Counting is on the hot path, so it does nothing until a process serves metrics (`exporter.serving`), and it never
raises: a lost figure is no reason to lose a job. Prometheus's library is imported only when metrics are served.

The children of a worker count in files of a folder that the main process makes; the main process serves the sums
(`common/observability/exporter.py`). `producer/gauges.py` makes the metrics that are read from the ledger.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from common.domain import AttemptOutcome, Face, JobKind, JobState, Lane, MaskStatus, Reason
from common.files import replacing
from common.observability.logs import get_logger

log = get_logger(__name__)


class Role(StrEnum):
    """The kind of process that serves a metric."""

    PRODUCER = "producer"
    WORKER = "worker"
    AGGREGATOR = "aggregator"


class Stage(StrEnum):
    """A step of the work on an image or a video."""

    READ = "read"
    DECODE = "decode"
    DETECT = "detect"
    CLASSIFY = "classify"
    #: Images are written in groups.
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, with every value that its labels can have: so no key and no id can become a label."""

    name: str
    help: str
    roles: tuple[Role, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Upper bounds of a histogram, in seconds; a counter has none.
    buckets: tuple[float, ...] = ()

    def __hash__(self) -> int:
        return hash(self.name)


LANES = {lane: lane.name.lower() for lane in Lane}
_LANES = tuple(LANES.values())
_KINDS = tuple(kind.value for kind in JobKind)
_REASONS = tuple(reason.value for reason in Reason)

ATTEMPTS = Metric(
    "maskwatch_attempts",
    "Attempts at jobs that ended in a worker, by how they ended.",
    (Role.WORKER,),
    {"kind": _KINDS, "outcome": tuple(outcome.value for outcome in AttemptOutcome)},
)
ATTEMPT_SECONDS = Metric(
    "maskwatch_attempt_seconds",
    "Time from the begin of an attempt to its end.",
    (Role.WORKER,),
    {"kind": _KINDS},
    (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900),
)
QUEUE_SECONDS = Metric(
    "maskwatch_queue_seconds",
    "Time from when a job is queued to when a worker claims it.",
    (Role.WORKER,),
    {"lane": _LANES},
    (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600),
)
STAGE_SECONDS = Metric(
    "maskwatch_stage_seconds",
    "Time of a step: read (an object, or a block of a video), decode (an image, or the next frame of a video including"
    " the wait for its bytes), detect and classify (an image; on a GPU a batch), write (the transaction that ends it).",
    (Role.WORKER,),
    {"stage": tuple(stage.value for stage in Stage)},
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
FRAMES = Metric("maskwatch_frames", "Images and frames of video that were analysed.", (Role.WORKER,), {"kind": _KINDS})
FACES = Metric(
    "maskwatch_faces",
    "Faces found, by their classification.",
    (Role.WORKER,),
    {"status": tuple(status.value for status in MaskStatus)},
)
RETRIES = Metric("maskwatch_retries", "Attempts that will be tried again.", (Role.WORKER,), {"reason": _REASONS})
QUARANTINES = Metric(
    "maskwatch_quarantines", "Jobs put in quarantine by workers.", (Role.WORKER,), {"reason": _REASONS}
)
LEASE_LOSSES = Metric(
    "maskwatch_lease_losses",
    "Jobs that a worker lost: a lease ran out (counted by the producer), a child of a worker died, or a write was"
    " refused because the job was no longer this worker's (taken back, cancelled or replaced).",
    (Role.WORKER, Role.PRODUCER),
    {"cause": ("expired", "crashed", "refused")},
)
DISPATCHED = Metric("maskwatch_dispatched_jobs", "Jobs sent to workers.", (Role.PRODUCER,), {"lane": _LANES})
LOST_MESSAGES = Metric(
    "maskwatch_lost_messages", "Jobs whose message was lost, and that are sent again.", (Role.PRODUCER,)
)
TICKS = Metric(
    "maskwatch_ticks",
    "Ticks of the producer's schedule that were run.",
    (Role.PRODUCER,),
    {"task": ("dispatch", "reconcile", "request_summary", "look_at_cameras")},
)
SUMMARIZED = Metric("maskwatch_summarized_hours", "Hours that were summarized again.", (Role.AGGREGATOR,))

#: Every metric that is counted. (Those read from the ledger are in `producer/gauges.py`.)
METRICS = (
    ATTEMPTS, ATTEMPT_SECONDS, QUEUE_SECONDS, STAGE_SECONDS, FRAMES, FACES, RETRIES, QUARANTINES, LEASE_LOSSES,
    DISPATCHED, LOST_MESSAGES, TICKS, SUMMARIZED,
)  # fmt: skip

#: The folder in which the processes of a worker count: set by the main process, inherited by its children.
FOLDER = "MASKWATCH_METRICS_FOLDER"
#: Bytes that a process reserves in the folder before it counts: if a memory-mapped file grows on a full disk, SIGBUS
#: ends the process instead of an exception. The metrics above never need more.
FILE_BYTES = 512 * 1024

_on = FOLDER in os.environ
_NOTHING: AbstractContextManager[None] = nullcontext()


def count(metric: Metric, amount: float = 1, **labels: str) -> None:
    """Add to a counter. Does nothing if metrics are off; never raises."""
    if not _on or not amount:
        return
    try:
        series(metric, tuple(labels.items())).inc(amount)
    except Exception:  # the job must go on after any error here
        _give_up(metric)


def observe(metric: Metric, seconds: float, **labels: str) -> None:
    """Add a time to a histogram. Does nothing if metrics are off; never raises."""
    if not _on:
        return
    try:
        series(metric, tuple(labels.items())).observe(seconds)
    except Exception:
        _give_up(metric)


def switch(*, on: bool) -> None:
    """Turn counting in this process on or off. Its folder must be set before."""
    global _on
    _on = on


def stage(name: Stage) -> AbstractContextManager[None]:
    """Time a step of the work, also if it fails."""
    return timed(STAGE_SECONDS, stage=name.value)


def timed(metric: Metric, **labels: str) -> AbstractContextManager[None]:
    """Time a block for a histogram, also if it raises."""
    return _Timed(metric, labels) if _on else _NOTHING


def analysed(kind: JobKind, frames: Sequence[Sequence[Face]]) -> None:
    """Count the frames of a job that has succeeded, and their faces."""
    if not _on:
        return
    count(FRAMES, len(frames), kind=kind.value)
    for status, number in Counter(face.status for faces in frames for face in faces).items():
        count(FACES, number, status=status.value)


def failed(reason: Reason, state: JobState) -> None:
    """Count a failed attempt, as a retry or as a quarantine."""
    count(QUARANTINES if state is JobState.QUARANTINED else RETRIES, reason=reason.value)


class _Timed:
    def __init__(self, metric: Metric, labels: Mapping[str, str]) -> None:
        self._metric, self._labels = metric, labels

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        observe(self._metric, time.perf_counter() - self._began, **self._labels)


@lru_cache(maxsize=1024)
def series(metric: Metric, labels: tuple[tuple[str, str], ...]) -> Any:
    """One series of a metric. Raises `ValueError` for a label value that the metric doesn't name."""
    given = dict(labels)
    unknown = {name for name, value in given.items() if value not in metric.labels.get(name, ())}
    if unknown or set(given) != set(metric.labels):
        raise ValueError(f"{metric.name} has the labels {dict(metric.labels)}, got {given}")
    whole = _library_metric(metric)
    return whole.labels(**given) if given else whole


#: Held while a metric is made: the caches above and below would let two threads make the same one.
_making = threading.Lock()
_made: dict[str, Any] = {}


def _library_metric(metric: Metric) -> Any:
    with _making:
        if metric.name not in _made:
            _reserve()
            from prometheus_client import Counter as LibraryCounter
            from prometheus_client import Histogram

            # No registry: the exporter reads the files of all processes.
            if metric.buckets:
                _made[metric.name] = Histogram(
                    metric.name, metric.help, list(metric.labels), buckets=metric.buckets, registry=None
                )
            else:
                _made[metric.name] = LibraryCounter(metric.name, metric.help, list(metric.labels), registry=None)
        return _made[metric.name]


def _reserve() -> None:
    """Reserve this process's space in the folder. Raises `OSError` if the disk is full."""
    for kind in ("counter", "histogram"):
        path = _file(kind, os.getpid())
        if path.exists():
            continue
        # The file gets its name only when it is complete: a scrape would fail on an empty file, for all processes.
        with replacing(path) as part, part.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)


def _file(kind: str, process: int) -> Path:
    return Path(os.environ[FOLDER], f"{kind}_{process}.db")


def _give_up(metric: Metric) -> None:
    """Turn counting off in this process, and log that once: the same error would come each time."""
    global _on
    _on = False
    log.warning("metrics are off in this process: one could not be counted", metric=metric.name, exc_info=True)
