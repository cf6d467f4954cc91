"""Takes pending jobs to be sent: the given feeds take turns, a message each. Also due retries, and messages that are
taken back.

A feed is a group of jobs that are dispatched in the order of their ids and paused together: the jobs of a source that
belong to one backfill, or to none. `producer/dispatch.py` decides which feed comes first and how much may wait in
Redis, and sends the messages.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.domain import JobKind, JobRef, JobState, Lane, PausePolicy
from common.ledger import circuit_breaker
from common.ledger.transitions import Transition, move, transition

#: The two kinds of pending jobs, each with a partial index. Literals, not parameters, so that every plan can use it.
#: `recovery.py` sets `jobs.alone`: the job is isolated, which means that it is sent in a message of its own.
_HALVES = {False: "NOT jobs.alone", True: "jobs.alone"}


@dataclass(frozen=True, slots=True)
class DispatchedJob:
    """A job that is now queued; its message is sent after the commit."""

    ref: JobRef
    kind: JobKind
    pipeline_id: int


@dataclass(frozen=True, slots=True)
class Feed:
    """The jobs of a source that belong to one backfill, or to none (0)."""

    source_id: int
    backfill_id: int


#: The feeds of each lane that have pending jobs, found with one index look-up per feed: a statement over all sources
#: and backfills would read 100,000 finished ones to find the three that have work.
FEEDS = """
WITH RECURSIVE feeds AS (
    (SELECT source_id, coalesce(backfill_id, 0) AS backfill_id, lane
     FROM jobs
     WHERE state = 'pending' AND {half}
     ORDER BY source_id, coalesce(backfill_id, 0), lane
     LIMIT 1)
    UNION ALL
    SELECT next.*
    FROM feeds
    CROSS JOIN LATERAL (
        SELECT source_id, coalesce(backfill_id, 0), lane
        FROM jobs
        WHERE state = 'pending' AND {half}
          AND (source_id, coalesce(backfill_id, 0), lane) > (feeds.source_id, feeds.backfill_id, feeds.lane)
        ORDER BY source_id, coalesce(backfill_id, 0), lane
        LIMIT 1
    ) AS next
)"""

_SENDABLE = """
SELECT feeds.source_id, feeds.backfill_id, feeds.lane
FROM feeds
JOIN sources ON sources.id = feeds.source_id
LEFT JOIN backfills ON backfills.id = feeds.backfill_id
WHERE sources.paused_at IS NULL AND backfills.paused_at IS NULL
"""

_SENDABLE_FEEDS = {isolated: FEEDS.format(half=half) + _SENDABLE for isolated, half in _HALVES.items()}


def feeds_with_work(session: Session, *, isolated: bool = False) -> dict[Lane, list[Feed]]:
    """The feeds of each lane that have pending jobs and are not paused. `isolated`: count only isolated jobs, or only
    the others."""
    found: dict[Lane, list[Feed]] = {lane: [] for lane in Lane}
    for row in session.execute(sql(_SENDABLE_FEEDS[isolated])):
        found[Lane(row.lane)].append(Feed(row.source_id, row.backfill_id))
    return found


@dataclass(frozen=True, slots=True)
class Dispatch:
    """How jobs are put into Redis. `lane`: its list receives the messages. `epoch`: of this Redis. `message_size`:
    how many images fill a message; a video job always has a message of its own."""

    lane: Lane
    epoch: str
    message_size: int


def take_pending(
    session: Session,
    feeds: Sequence[Feed],
    to: Dispatch,
    *,
    lane: Lane,
    limit: int,
    isolated: bool = False,
    from_list: Lane | None = None,
) -> list[DispatchedJob]:
    """pending → queued for at most `limit` images of a lane; a video job counts as a whole message of images.

    Publish only after the commit. The jobs are in the order in which they should be sent: the feeds take turns, a
    message each. If there is no room for a message of each feed, the first feeds get one.

    `from_list` also takes jobs whose message still waits in that lane's list, and gives them a new token: the old
    message is dropped when a worker reads it. They are sent before the pending jobs of their feed.

    SKIP LOCKED: two dispatchers share the work instead of waiting for each other.
    """
    taken: dict[Feed, list[Any]] = {feed: [] for feed in feeds}
    left, waiting = limit, list(feeds)
    while waiting and left > 0:
        waiting = waiting[: math.ceil(left / to.message_size)]
        share = min(left, max(to.message_size, left // len(waiting)))
        rows = _take(session, waiting, share, to, lane=lane, isolated=isolated, from_list=from_list)
        by_feed: dict[Feed, list[Any]] = defaultdict(list)
        for row in rows:
            by_feed[Feed(row.source_id, row.backfill_id)].append(row)
        for feed, found in by_feed.items():
            taken[feed] += found
        left -= _weigh(rows, to.message_size)
        # Some feeds had less work than their share: give the rest to feeds that have more.
        full = share - to.message_size
        waiting = [feed for feed in waiting if _weigh(by_feed[feed], to.message_size) > full] if rows else []
    return [_dispatched(row) for row in _in_turns(list(taken.values()), to.message_size)]


def _dispatched(row: Any) -> DispatchedJob:
    return DispatchedJob(JobRef(row.id, row.token), JobKind(row.kind), row.pipeline_id)


def _weight(kind: str, message_size: int) -> int:
    return 1 if kind == JobKind.IMAGE.value else message_size


def _weigh(rows: Iterable[Any], message_size: int) -> int:
    return sum(_weight(row.kind, message_size) for row in rows)


def _in_turns(feeds: Sequence[Sequence[Any]], message_size: int) -> Iterator[Any]:
    """The jobs of all feeds, one message of each feed in turn; within a feed in the order of their ids."""
    messages: list[tuple[int, int, Any]] = []
    for number, rows in enumerate(feeds):
        filled = 0
        for row in sorted(rows, key=lambda row: row.id):
            messages.append((filled // message_size, number, row))
            filled += _weight(row.kind, message_size)
    return (row for _, _, row in sorted(messages, key=lambda entry: (entry[0], entry[1], entry[2].id)))


def _taking(half: str) -> Transition:
    """The statement that takes from each feed as many jobs as fit its share. It locks the chosen jobs by their ids, so
    that no more rows are locked than are sent; Postgres reads an array of ids by the primary key, whatever its estimate
    of their number."""
    return transition(
        (JobState.PENDING, JobState.QUEUED),
        JobState.QUEUED,
        """
        FROM jobs
        WHERE jobs.id = ANY (ARRAY(SELECT id FROM chosen))
          AND (jobs.state = 'pending' OR (jobs.sent_lane = :from_list AND jobs.epoch = :epoch))
        """,
        sets={"queued_at": "clock_timestamp()", "epoch": ":epoch", "sent_lane": ":to_list"},
        skip_locked=True,
        before=f"""
sent AS MATERIALIZED (
    SELECT id, kind, source_id, coalesce(backfill_id, 0) AS backfill_id
    FROM jobs
    WHERE state = 'queued' AND sent_lane = :from_list AND lane = :lane AND epoch = :epoch AND {half}
      AND queued_at < transaction_timestamp()  -- not what this tick has just sent
), chosen AS (
    SELECT next.id
    FROM unnest(CAST(:sources AS integer[]), CAST(:backfills AS bigint[])) AS feed (source_id, backfill_id)
    JOIN sources ON sources.id = feed.source_id AND sources.paused_at IS NULL
    LEFT JOIN backfills ON backfills.id = feed.backfill_id
    CROSS JOIN LATERAL (
        SELECT id, sum(CASE kind WHEN 'image' THEN 1 ELSE :message_size END) OVER (ORDER BY id) AS weight
        FROM (
            (SELECT id, kind
             FROM sent
             WHERE sent.source_id = feed.source_id AND sent.backfill_id = feed.backfill_id
             ORDER BY id
             LIMIT :share)
            UNION ALL
            (SELECT id, kind
             FROM jobs
             WHERE source_id = feed.source_id AND coalesce(backfill_id, 0) = feed.backfill_id
               AND lane = :lane AND state = 'pending' AND {half}
             ORDER BY id
             LIMIT :share)
        ) AS waiting
    ) AS next
    WHERE next.weight <= :share
      AND backfills.paused_at IS NULL  -- since the feeds were looked for, too
)""",
        returning=("id", "token", "kind", "pipeline_id", "source_id", "backfill_id"),
        select="SELECT id, token, kind, pipeline_id, source_id, coalesce(backfill_id, 0) AS backfill_id FROM moved",
    )


_TAKE = {isolated: _taking(half) for isolated, half in _HALVES.items()}


def _take(
    session: Session,
    feeds: Sequence[Feed],
    share: int,
    to: Dispatch,
    *,
    lane: Lane,
    isolated: bool,
    from_list: Lane | None,
) -> Sequence[Any]:
    return move(
        session,
        _TAKE[isolated],
        {
            "sources": [feed.source_id for feed in feeds],
            "backfills": [feed.backfill_id for feed in feeds],
            "lane": lane,
            "share": share,
            "from_list": from_list,
            "to_list": to.lane,
            "epoch": to.epoch,
            "message_size": to.message_size,
        },
    )


def take_trials(session: Session, *, epoch: str, policy: PausePolicy) -> list[DispatchedJob]:
    """pending → queued for one job of each paused source whose trial is due; each is sent in a message of its own, to
    the live lane's list."""
    taken: list[DispatchedJob] = []
    for source_id in circuit_breaker.take_due_trials(session, policy):
        rows = move(session, _TAKE_TRIAL, {"source": source_id, "epoch": epoch, "live": Lane.LIVE})
        taken += map(_dispatched, rows)
    return taken


_TAKE_TRIAL = transition(
    (JobState.PENDING,),
    JobState.QUEUED,
    """
    FROM jobs
    WHERE jobs.source_id = :source
      AND NOT EXISTS (SELECT FROM backfills b WHERE b.id = jobs.backfill_id AND b.paused_at IS NOT NULL)
    """,
    sets={"queued_at": "clock_timestamp()", "epoch": ":epoch", "sent_lane": ":live"},
    limit=" LIMIT 1",
    skip_locked=True,
    returning=("id", "token", "kind", "pipeline_id"),
    select="SELECT id, token, kind, pipeline_id FROM moved",
)


def recall(session: Session, *, lane: Lane, epoch: str) -> int:
    """queued → pending for all jobs that wait in their own lane's list, except isolated ones: they are sent again in
    another order. Their old messages are dropped when a worker reads them."""
    return len(move(session, _RECALL, {"lane": lane, "epoch": epoch}))


#: Not the trial of a source that has paused: it would wait for the next one.
_RECALL = transition(
    (JobState.QUEUED,),
    JobState.PENDING,
    """
    FROM jobs
    JOIN sources ON sources.id = jobs.source_id AND sources.paused_at IS NULL
    WHERE jobs.sent_lane = :lane AND jobs.lane = :lane AND jobs.epoch = :epoch AND NOT jobs.alone
    """,
    skip_locked=True,
)


def pending_messages(
    session: Session, feeds: Sequence[Feed], *, lane: Lane, message_size: int, at_most: float
) -> dict[Feed, float]:
    """How many messages the pending jobs of each feed would fill, counted up to about `at_most`; less than one where a
    few images wait."""
    found = dict.fromkeys(feeds, 0.0)
    parameters = {
        "sources": [feed.source_id for feed in feeds],
        "backfills": [feed.backfill_id for feed in feeds],
        "lane": lane,
        "message_size": message_size,
        "limit": math.ceil(at_most) * message_size,
    }
    for row in session.execute(sql(_PENDING_MESSAGES), parameters) if feeds else ():
        found[Feed(row.source_id, row.backfill_id)] = float(row.images) / message_size
    return found


_PENDING_MESSAGES = """
SELECT feed.source_id, feed.backfill_id, sum(CASE kind WHEN 'image' THEN 1 ELSE :message_size END) AS images
FROM unnest(CAST(:sources AS integer[]), CAST(:backfills AS bigint[])) AS feed (source_id, backfill_id)
CROSS JOIN LATERAL (
    SELECT kind
    FROM jobs
    WHERE source_id = feed.source_id AND coalesce(backfill_id, 0) = feed.backfill_id
      AND lane = :lane AND state = 'pending' AND NOT alone
    LIMIT :limit
) AS waiting
GROUP BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class SentFeed:
    """How much of a feed waits in the list of its own lane, by the ledger."""

    #: Number of full messages; less than one if only a few images wait.
    messages: float
    #: How long the oldest of these jobs has waited.
    oldest_seconds: float


def sent_feeds(session: Session, *, epoch: str, message_size: int) -> dict[Lane, dict[Feed, SentFeed]]:
    """How much of each feed waits in each lane's list; without paused feeds and isolated jobs."""
    found: dict[Lane, dict[Feed, SentFeed]] = {lane: {} for lane in Lane}
    for row in session.execute(sql(_SENT_FEEDS), {"epoch": epoch, "message_size": message_size}):
        waits = SentFeed(float(row.images) / message_size, row.oldest_seconds)
        found[Lane(row.lane)][Feed(row.source_id, row.backfill_id)] = waits
    return found


_SENT_FEEDS = """
SELECT lane, jobs.source_id, coalesce(backfill_id, 0) AS backfill_id,
       sum(CASE kind WHEN 'image' THEN 1 ELSE :message_size END) AS images,
       extract(epoch FROM clock_timestamp() - min(queued_at))::float AS oldest_seconds
FROM jobs
JOIN sources ON sources.id = jobs.source_id
LEFT JOIN backfills ON backfills.id = jobs.backfill_id
WHERE state = 'queued' AND sent_lane = lane AND epoch = :epoch AND NOT alone
  AND sources.paused_at IS NULL AND backfills.paused_at IS NULL
GROUP BY 1, 2, 3
"""


def wake_retries(session: Session, *, limit: int) -> int:
    """retry_wait → pending for at most `limit` due jobs, the longest overdue first."""
    return len(move(session, _WAKE, {"limit": limit}))


#: Due jobs are chosen by their index, then locked in the order that all transactions use.
_WAKE = transition(
    (JobState.RETRY_WAIT,),
    JobState.PENDING,
    """
    FROM jobs
    WHERE jobs.id = ANY (ARRAY(SELECT id FROM due)) AND jobs.next_run_at <= clock_timestamp()
    """,
    skip_locked=True,
    before="""
due AS (
    SELECT id
    FROM jobs
    WHERE state = 'retry_wait' AND next_run_at <= clock_timestamp()
    ORDER BY next_run_at
    LIMIT :limit
)""",
)
