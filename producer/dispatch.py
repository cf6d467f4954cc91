"""From the ledger to Redis, bounded, and back again for what got lost on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from common import ledger
from common.database import engine, session_scope
from common.domain import JobKind
from common.ledger import DispatchedJob, JobRef
from common.partitions import split_default
from common.queues import Queue, TaskName, encode_refs, ensure_epoch, queue_length, read_epoch, redis_client, send
from common.settings import Settings
from common.telemetry import get_logger

log = get_logger(__name__)


def dispatch(settings: Settings) -> int:
    """Send pending jobs while Redis holds fewer messages than the cap; returns how many jobs were sent.

    The messages are published after the commit: a message whose job is not queued yet would be dropped.
    One that never gets published is found by `reconcile`.
    """
    with redis_client() as client:
        epoch = read_epoch(client)
        if epoch is None:
            return 0  # a new or wiped Redis: the reconciler comes first, and begins its epoch
        room = settings.dispatch.queue_cap - queue_length(client, Queue.MEDIA)
    if room <= 0:
        return 0
    with session_scope() as session:
        ledger.wake_retries(session)
        suspects = ledger.take_pending(session, limit=room, alone=True, epoch=epoch)
        suspects += ledger.take_trials(session, epoch=epoch, policy=settings.ledger.pause_policy)
        room = max(0, room - len(suspects))
        size = settings.worker.group_size
        others = ledger.take_pending(session, limit=room * size, alone=False, epoch=epoch, video_counts_as=size)
    groups = [[job.ref] for job in suspects] + list(group(others, size))
    if groups:
        send(TaskName.ANALYZE, *([encode_refs(refs)] for refs in groups))
        log.info("dispatched", jobs=len(suspects) + len(others), messages=len(groups))
    return len(suspects) + len(others)


def group(jobs: Iterable[DispatchedJob], size: int) -> Iterator[list[JobRef]]:
    """Groups of at most `size` image jobs of one pipeline, so that a worker need not switch models inside one.

    Jobs of videos travel alone: each is as much work as a group of pictures.
    """
    open_groups: dict[int, list[JobRef]] = defaultdict(list)
    for job in jobs:
        if job.kind is not JobKind.IMAGE:
            yield [job.ref]
            continue
        refs = open_groups[job.pipeline_id]
        refs.append(job.ref)
        if len(refs) == size:
            yield open_groups.pop(job.pipeline_id)
    yield from open_groups.values()


def reconcile(settings: Settings) -> dict[str, int]:
    """Find what got lost: expired leases, messages of a Redis that was wiped, overdue ones. Begins the epoch
    of a new Redis, and moves faces that wait for their partition. Returns what was found, by kind."""
    limits = settings.ledger
    # First what needs no Redis, so that expired leases are recovered while it is away.
    with session_scope() as session:
        found = {"expired_leases": ledger.recover_expired(session, max_lost_leases=limits.max_lost_leases)}
        found["refused"] = ledger.recover_refused(session, policy=limits.pause_policy, max_attempts=limits.max_attempts)
    with redis_client() as client:
        epoch = ensure_epoch(client)
        empty = queue_length(client, Queue.MEDIA) == 0
    with session_scope() as session:
        found["lost_messages"] = ledger.recover_queued(
            session, epoch=epoch, overdue_seconds=limits.overdue_seconds, queue_empty=empty
        )
    found["partitions"] = len(split_default(engine()))
    if any(found.values()):
        log.warning("reconciled", **found)
    return found


def request_summary() -> bool:
    """Ask the aggregator to work off the dirty marks, unless there are none or it has been asked already:
    while no aggregator runs, one message waits for it and not one per tick. Whether it was asked."""
    with session_scope() as session:
        waiting = ledger.unsummarized(session)
    if not waiting:
        return False
    with redis_client() as client:
        if queue_length(client, Queue.AGGREGATION):
            return False
    send(TaskName.SUMMARIZE, ())
    return True
