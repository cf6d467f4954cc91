"""From the ledger to Redis, bounded, and back again for what got lost on the way."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator

from common import ledger, metrics, schedule
from common.database import engine, session_scope
from common.domain import JobKind, Lane
from common.ledger import DispatchedJob, JobRef
from common.partitions import split_default
from common.queues import (
    PRIORITIES,
    Queue,
    TaskName,
    encode_refs,
    ensure_epoch,
    queue_length,
    read_epoch,
    redis_client,
    send,
)
from common.settings import Settings
from common.telemetry import get_logger

log = get_logger(__name__)


def dispatch(settings: Settings) -> int:
    """Send pending jobs while Redis holds fewer messages than the cap; returns how many jobs were sent.

    Live footage and backfills have a lane each, and workers take live footage first. While it keeps all of them busy,
    a share of the backfills is sent in its lane, so that they go on.

    The messages are published after the commit: a message whose job is not queued yet would be dropped.
    One that never gets published is found by `reconcile`.
    """
    limits, size = settings.dispatch, settings.worker.group_size
    with redis_client() as client:
        epoch = read_epoch(client)
        if epoch is None:
            return 0  # a new or wiped Redis: the reconciler comes first, and begins its epoch
        waiting = {lane: queue_length(client, Queue.MEDIA, lane) for lane in Lane}
    room = {lane: max(0, limits.queue_cap - length) for lane, length in waiting.items()}
    if not any(room.values()):
        return 0
    with session_scope() as session:
        ledger.wake_retries(session)
        # Few, and held up long enough: not behind a backfill.
        suspects = ledger.take_pending(session, limit=room[Lane.LIVE], alone=True, epoch=epoch)
        suspects += ledger.take_trials(session, epoch=epoch, policy=settings.ledger.pause_policy)
        fits = max(0, room[Lane.LIVE] - len(suspects)) * size
        live = ledger.take_pending(session, limit=fits, alone=False, epoch=epoch, lane=Lane.LIVE, video_counts_as=size)
        ahead = [[job.ref] for job in suspects] + list(group(live, size))
        # What is left of the live lane is what no worker was free for.
        overtaking = _rounded(len(ahead) * limits.backfill_share) if waiting[Lane.LIVE] else 0
        fits = (room[Lane.BACKFILL] + overtaking) * size
        backfills = ledger.take_pending(
            session, limit=fits, alone=False, epoch=epoch, lane=Lane.BACKFILL, video_counts_as=size
        )
    behind = list(group(backfills, size))
    ahead, behind = ahead + behind[:overtaking], behind[overtaking:]
    for lane, groups in ((Lane.LIVE, ahead), (Lane.BACKFILL, behind)):
        if groups:
            send(TaskName.ANALYZE, *([encode_refs(refs)] for refs in groups), priority=PRIORITIES[lane])
    sent = len(suspects) + len(live) + len(backfills)
    # What travels ahead counts as live: suspects, and what of the backfills overtakes.
    for lane, groups in ((Lane.LIVE, ahead), (Lane.BACKFILL, behind)):
        metrics.count(metrics.DISPATCHED, sum(map(len, groups)), lane=metrics.LANES[lane])
    if sent:
        log.info("dispatched", jobs=sent, live=len(live), messages=len(ahead) + len(behind))
    return sent


def _rounded(number: float) -> int:
    """To a whole number, up as often as its fraction says: a tenth of three is not always nothing."""
    return math.floor(number + random.random())


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
    of a new Redis, moves faces that wait for their partition, and deletes camera slots that ended long ago. Returns
    what was found, by kind."""
    limits = settings.ledger
    # First what needs no Redis, so that expired leases are recovered while it is away.
    with session_scope() as session:
        found = {"expired_leases": ledger.recover_expired(session, max_lost_leases=limits.max_lost_leases)}
        found["refused"] = ledger.recover_refused(session, policy=limits.pause_policy, max_attempts=limits.max_attempts)
    with redis_client() as client:
        epoch = ensure_epoch(client)
        empty = [lane for lane in Lane if not queue_length(client, Queue.MEDIA, lane)]
    with session_scope() as session:
        found["lost_messages"] = ledger.recover_queued(
            session,
            epoch=epoch,
            overdue_seconds=limits.overdue_seconds,
            empty_lanes=empty,
            lost_seconds=limits.lost_seconds,
        )
    metrics.count(metrics.LEASE_LOSSES, found["expired_leases"], cause="expired")
    metrics.count(metrics.LOST_MESSAGES, found["lost_messages"])
    found["partitions"] = len(split_default(engine()))
    if any(found.values()):
        log.warning("reconciled", **found)
    with session_scope() as session:
        schedule.prune_slots(session)
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
