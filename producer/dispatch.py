"""Sends jobs from the ledger to Redis, up to a limit; recovers those that got lost; asks the aggregator to work."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from sqlalchemy.orm import Session

from common import ledger
from common.catalog import schedule
from common.database.partitions import split_default
from common.database.sessions import engine, session_scope
from common.domain import JobKind, JobRef, Lane
from common.ledger import Dispatch, DispatchedJob, Feed
from common.messaging.queues import (
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
from common.observability import metrics
from common.observability.logs import get_logger
from common.settings import Settings
from producer.steps import run_steps

log = get_logger(__name__)


#: How many due retries one tick makes pending: more than a tick sends, in a transaction of its own of about a tenth of
#: a second.
WOKEN_AT_ONCE = 2000

#: How long the first message of a list may have waited, in seconds, before its messages are taken back and sent anew in
#: turns. A list that moves faster delays no feed.
PATIENCE_SECONDS = 5.0


def dispatch(settings: Settings) -> int:
    """Send pending jobs while Redis holds fewer messages than the cap; returns how many jobs were sent.

    Live footage and backfills have a lane each, and workers take live footage first. While live footage keeps all
    workers busy, a share of the backfills' jobs is sent in the live lane, so that backfills go on. Within a lane the
    sources and backfills take turns.

    The messages are published after the commit: a message whose job is not queued yet would be dropped.
    `reconcile` finds jobs whose message was never published.
    """
    with redis_client() as client:
        epoch = read_epoch(client)
        if epoch is None:
            return 0  # a new or wiped Redis: the reconciler must begin its epoch first
        waiting = {lane: queue_length(client, Queue.MEDIA, lane) for lane in Lane}
    if all(length >= settings.dispatch.queue_cap for length in waiting.values()):
        return 0

    def wake() -> int:
        with session_scope() as session:
            return ledger.wake_retries(session, limit=WOKEN_AT_ONCE)

    def send_pending() -> int:
        return _send_pending(settings, epoch, waiting)

    # Each in a transaction of its own: one that moves a job twice would lock the media object after the job.
    return run_steps("dispatch", {"wake": wake, "send": send_pending})["send"]


def _send_pending(settings: Settings, epoch: str, waiting: Mapping[Lane, int]) -> int:
    """pending → queued for what there is room for, then publish it; returns how many jobs were sent."""
    with session_scope() as session:
        tick = _Tick(session, settings, epoch, waiting)
        recalled = tick.recall()
        taken = {} if recalled else tick.take()
    if recalled:
        with session_scope() as session:
            taken = _Tick(session, settings, epoch, waiting, recalled).take()
    sent = 0
    for lane, messages in taken.items():
        if messages:
            send(TaskName.ANALYZE, *([encode_refs(refs)] for refs in messages), priority=PRIORITIES[lane])
        jobs = sum(map(len, messages))
        # Isolated jobs and overtaking backfill jobs travel in the live lane, and count there.
        metrics.count(metrics.DISPATCHED, jobs, lane=metrics.LANES[lane])
        sent += jobs
    if sent:
        log.info("dispatched", jobs=sent, messages={metrics.LANES[lane]: len(found) for lane, found in taken.items()})
    return sent


class _Tick:
    """What one tick sends, in one transaction. `waiting`: messages in each lane's list when the tick began. `recalled`:
    lanes whose messages were taken back, and no longer count."""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        epoch: str,
        waiting: Mapping[Lane, int],
        recalled: Collection[Lane] = (),
    ) -> None:
        self.session, self.epoch, self.waiting, self.recalled = session, epoch, waiting, recalled
        self.cap, self.size = settings.dispatch.queue_cap, settings.worker.group_size
        self.backfill_share = settings.dispatch.backfill_share
        self.policy = settings.ledger.pause_policy
        self.pending = ledger.feeds_with_work(session)
        self.sent = ledger.sent_feeds(session, epoch=epoch, message_size=self.size)

    def recall(self) -> list[Lane]:
        """Take back the messages of lists in which one feed holds up another, to be sent anew in turns; returns the
        lanes."""
        held_up = [lane for lane in Lane if self._holds_up(lane)]
        for lane in held_up:
            ledger.recall(self.session, lane=lane, epoch=self.epoch)
        return held_up

    def take(self) -> dict[Lane, list[list[JobRef]]]:
        """pending → queued for what there is room for; returns the messages for each lane's list, in their order."""
        isolated = self.isolated()
        live = self.lane(Lane.LIVE, used=len(isolated))
        ahead = [[job.ref] for job in isolated] + list(group(live, self.size))
        # Messages left in the live lane mean that no worker was free for them.
        overtaking = _rounded(len(ahead) * self.backfill_share) if self.waiting[Lane.LIVE] else 0
        ahead += group(self.overtaking(overtaking), self.size)
        return {Lane.LIVE: ahead, Lane.BACKFILL: list(group(self.lane(Lane.BACKFILL), self.size))}

    def isolated(self) -> list[DispatchedJob]:
        """Isolated jobs, each for a message of its own: a process died or a lease ran out while they ran
        (`common/ledger/recovery.py`). They go to the live lane, because they have waited long enough; at most half of
        the free room, so that live footage goes on beside many of them."""
        room = _rounded(max(0, self.cap - self.waiting[Lane.LIVE]) / 2)
        jobs: list[DispatchedJob] = []
        waiting = {lane: feeds for lane, feeds in ledger.feeds_with_work(self.session, isolated=True).items() if feeds}
        for left, (lane, feeds) in zip(range(len(waiting), 0, -1), waiting.items(), strict=True):
            random.shuffle(feeds)  # nothing tells which had the last turn
            to = Dispatch(Lane.LIVE, self.epoch, message_size=1)
            share = _rounded((room - len(jobs)) / left)
            jobs += ledger.take_pending(self.session, feeds, to, lane=lane, limit=share, isolated=True)
        return jobs + ledger.take_trials(self.session, epoch=self.epoch, policy=self.policy)

    def lane(self, lane: Lane, *, used: int = 0) -> list[DispatchedJob]:
        """Pending jobs of a lane for its own list, as far as there is room in it; `used` messages of that room are
        taken already."""
        room = self.cap - used - (0 if lane in self.recalled else self.waiting[lane])
        return self._take(lane, self._least_sent_first(lane, self.pending[lane]), lane, room)

    def overtaking(self, messages: int) -> list[DispatchedJob]:
        """Jobs of backfills for the live lane's list; first those that wait in the backfill list, which no worker reads
        while live footage waits."""
        feeds = self._least_sent_first(Lane.BACKFILL, {*self.pending[Lane.BACKFILL], *self.sent[Lane.BACKFILL]})
        return self._take(Lane.BACKFILL, feeds, Lane.LIVE, messages, from_list=Lane.BACKFILL)

    def _take(
        self, lane: Lane, feeds: Sequence[Feed], to: Lane, messages: int, *, from_list: Lane | None = None
    ) -> list[DispatchedJob]:
        into = Dispatch(to, self.epoch, self.size)
        limit = messages * self.size
        return ledger.take_pending(self.session, feeds, into, lane=lane, limit=limit, from_list=from_list)

    def _least_sent_first(self, lane: Lane, feeds: Iterable[Feed]) -> list[Feed]:
        """The feeds with the fewest messages in Redis first, so that each gets its turn where there is no room for
        all."""
        return sorted(feeds, key=lambda feed: (self._messages(lane, feed), random.random()))

    def _messages(self, lane: Lane, feed: Feed) -> float:
        waits = self.sent[lane].get(feed)
        return waits.messages if waits is not None else 0.0

    def _holds_up(self, lane: Lane) -> bool:
        """Whether a feed would wait for another's messages much longer than taking turns with them would take: for
        example a small backfill of today behind one that began yesterday.

        A feed that has less than half of its share in the list lacks the rest, as far as it has pending jobs. To append
        what it lacks would take the list's length; to take turns, twice what it lacks. Less than one message is no
        reason: a feed that gets an image now and then would have the list sent anew again and again.
        False while replaced messages still lie in the list, so that a list never holds more than twice the cap.
        """
        sent = self.sent[lane]
        if self.waiting[lane] > self.cap or not sent:
            return False
        fair = self.cap / len({*self.pending[lane], *sent})
        most = max(sent.values(), key=lambda waits: waits.messages)
        if most.messages <= fair + 1 or most.oldest_seconds <= PATIENCE_SECONDS:
            return False
        missing = {feed: fair / 2 - self._messages(lane, feed) for feed in self.pending[lane]}
        short = [feed for feed, lacks in missing.items() if lacks >= 1]
        pending = ledger.pending_messages(self.session, short, lane=lane, message_size=self.size, at_most=fair)
        return any(1 <= min(missing[feed], pending[feed]) < self.waiting[lane] / 2 for feed in short)


def _rounded(number: float) -> int:
    """Round down or, with the fraction as the probability, up: 0.3 messages are one message in three of ten ticks."""
    return math.floor(number + random.random())


def group(jobs: Iterable[DispatchedJob], size: int) -> Iterator[list[JobRef]]:
    """Groups of at most `size` image jobs of one pipeline, so that a worker need not switch models inside a group.

    Each job of a video is sent in a message of its own: it is as much work as a group of images.
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
    """Recover what got lost: expired leases, messages of a Redis that was wiped, overdue messages. Begins the epoch
    of a new Redis, moves faces that wait for their partition, and deletes camera slots that ended long ago. Returns
    how many were found, by kind. Raises `TickFailedError` if a step failed, after the others were done."""
    limits = settings.ledger

    def expired_leases() -> int:
        with session_scope() as session:
            found = ledger.recover_expired(session, max_lost_leases=limits.max_lost_leases)
        metrics.count(metrics.LEASE_LOSSES, found, cause="expired")
        return found

    def refused() -> int:
        with session_scope() as session:
            return ledger.recover_refused(session, policy=limits.pause_policy, max_attempts=limits.max_attempts)

    def lost_messages() -> int:
        with redis_client() as client:
            epoch = ensure_epoch(client)
            empty = [lane for lane in Lane if not queue_length(client, Queue.MEDIA, lane)]
        with session_scope() as session:
            found = ledger.recover_queued(
                session,
                epoch=epoch,
                overdue_seconds=limits.overdue_seconds,
                empty_lanes=empty,
                lost_seconds=limits.lost_seconds,
            )
        metrics.count(metrics.LOST_MESSAGES, found)
        return found

    def partitions() -> int:
        return len(split_default(engine()))

    def old_slots() -> int:
        with session_scope() as session:
            return schedule.prune_slots(session)

    # First what needs no Redis, so that expired leases are recovered while Redis is down.
    steps = (expired_leases, refused, lost_messages, partitions, old_slots)
    found = run_steps("reconcile", {step.__name__: step for step in steps})
    if any(count for name, count in found.items() if name != "old_slots"):
        log.warning("reconciled", **found)
    return found


def request_summary() -> bool:
    """Ask the aggregator to work off the dirty marks, unless there are none or a request waits already: while no
    aggregator runs, one message waits for it and not one per tick. Returns whether it was asked."""
    with session_scope() as session:
        waiting = ledger.unsummarized(session)
    if not waiting:
        return False
    with redis_client() as client:
        if queue_length(client, Queue.AGGREGATION):
            return False
    send(TaskName.SUMMARIZE, ())
    return True
