"""Who gets its turn: live footage before backfills, backfills beside it and beside each other, and what is lost on the
way. Workers are modelled: they take messages from Redis as kombu does, and end each job that is still theirs."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.database.sessions import engine, session_scope
from common.domain import JobRef, Lane, Reason
from common.messaging.queues import Queue, decode_refs, list_of, queue_length, redis_client
from common.settings import Settings
from producer import dispatch as dispatching
from producer.dispatch import dispatch, reconcile
from producer.steps import TickFailedError
from tests.ledger_rows import NOON, claim, planned, register, register_many, rows, scalar, take
from tests.mutants import Rewrite, planted
from workers.jobs.recording import record_image

#: Messages that all workers together take in a tick.
TAKEN_PER_TICK = 3


#: What lies in Redis is left there: only pending jobs overtake.
SENT_STAYS = Rewrite("WITH sent AS", r"(state = 'queued') AND (sent_lane = )", r"\1 AND false AND \2")
#: Whether a message is lost is judged by the lane of its job.
LOST_BY_LANE = Rewrite("queued_at", r"coalesce\(jobs\.sent_lane, jobs\.lane\)", "jobs.lane")
#: Nothing can be sent.
FAILING_TAKE = Rewrite("WITH sent AS", r"next\.weight <= ", "1 / 0 <= ")


def messages(lane: Lane) -> list[list[JobRef]]:
    """What waits in a lane's list, the next one first."""
    with redis_client() as client:
        found = client.lrange(list_of(Queue.MEDIA, lane), 0, -1)
    return [_refs(item) for item in reversed(found)]


def _refs(item: bytes | str) -> list[JobRef]:
    return decode_refs(json.loads(base64.b64decode(json.loads(item)["body"]))[0][0])


class Workers:
    """Takes messages, live ones first, and ends their jobs. What another message has replaced takes it no time."""

    def __init__(self) -> None:
        self.ended: list[list[int]] = []
        self.dropped = 0

    def work(self, count: int = TAKEN_PER_TICK) -> None:
        with redis_client() as client, session_scope() as session:
            while count:
                item = next((i for lane in Lane if (i := client.rpop(list_of(Queue.MEDIA, lane)))), None)
                if item is None:
                    return
                ended = session.execute(
                    text(
                        "UPDATE jobs SET state = 'succeeded', token = gen_random_uuid(), finished_at = now()"
                        " FROM unnest(CAST(:ids AS bigint[]), CAST(:tokens AS uuid[])) AS sent (id, token)"
                        " WHERE jobs.id = sent.id AND jobs.token = sent.token AND state = 'queued' RETURNING jobs.id"
                    ),
                    {"ids": [ref.id for ref in _refs(item)], "tokens": [str(ref.token) for ref in _refs(item)]},
                )
                if ids := list(ended.scalars()):
                    self.ended.append(ids)
                    count -= 1
                else:
                    self.dropped += 1


def pass_a_second() -> None:
    with session_scope() as session:
        session.execute(text("UPDATE jobs SET queued_at = queued_at - interval '1 second' WHERE state = 'queued'"))


def backfill(session: Session, name: str, count: int, *, source: str = "s3://footage") -> set[int]:
    """Pending images of a backfill of its own; returns the ids of their jobs."""
    if not scalar(session, "SELECT count(*) FROM pipelines"):
        register(session, planned("first.jpg"), lane=Lane.LIVE)
        session.execute(text("UPDATE jobs SET state = 'succeeded', finished_at = now()"))
    made = session.execute(
        text(
            "WITH s AS (INSERT INTO sources (bucket) VALUES (:source) ON CONFLICT (bucket)"
            " DO UPDATE SET bucket = :source RETURNING id"
            "), b AS (INSERT INTO backfills (source, source_id, location_id, pipeline_id)"
            " SELECT :source, id, 1, 1 FROM s RETURNING id), m AS ("
            "INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id)"
            " SELECT :source, :name || n, 'e', 'e', 1, now(), 'image', 1 FROM generate_series(1, :count) AS n"
            " RETURNING id) INSERT INTO jobs (media_object_id, source_id, pipeline_id, backfill_id, kind, lane)"
            " SELECT m.id, s.id, 1, b.id, 'image', 1 FROM m, s, b RETURNING id"
        ),
        {"source": source, "name": name, "count": count},
    )
    ids = set(made.scalars())
    session.commit()
    return ids


def live_footage(session: Session, name: str, count: int) -> None:
    """Images of the live lane; their source has no backfill."""
    ids = backfill(session, name, count, source="s3://live")
    session.execute(text("UPDATE jobs SET backfill_id = NULL, lane = 0 WHERE id = ANY(:ids)"), {"ids": sorted(ids)})
    session.commit()


def beside_live_footage(session: Session, settings: Settings, ticks: int) -> Workers:
    workers = Workers()
    for tick in range(ticks):
        live_footage(session, f"tick{tick}-", 80)  # more than the workers take
        dispatch(settings)
        workers.work()
        pass_a_second()
    return workers


@pytest.mark.parametrize(
    ("count", "ticks"),
    [(160, 60), pytest.param(160, 300, marks=pytest.mark.chaos), pytest.param(2000, 300, marks=pytest.mark.chaos)],
)
def test_a_backfill_gets_its_share_beside_steady_live_footage(
    session: Session, configure: Callable[..., Settings], count: int, ticks: int
) -> None:
    settings = configure()
    reconcile(settings)
    old = backfill(session, "old", count)
    workers = beside_live_footage(session, settings, ticks)
    of_backfill = [n for n, ids in enumerate(workers.ended) if old & {*ids}]
    done = sum(len(old & {*ids}) for ids in workers.ended)
    # While it had work to do: half of its share of the messages that workers took. It enters behind a full list.
    until = of_backfill[-1] if done == count else len(workers.ended)
    assert len(workers.ended) == ticks * TAKEN_PER_TICK
    assert len(of_backfill) >= settings.dispatch.backfill_share / 2 * until, (len(of_backfill), until, done)


def test_a_small_backfill_starves_if_what_lies_in_redis_is_left_there(
    session: Session, configure: Callable[..., Settings]
) -> None:
    """The control of the test above: all of it is sent at once, into the list that nobody gets to."""
    settings = configure()
    reconcile(settings)
    old = backfill(session, "old", 160)
    dispatch(settings)
    assert len(messages(Lane.BACKFILL)) == 10
    with planted(SENT_STAYS):
        workers = beside_live_footage(session, settings, 40)
    assert not any(old & {*ids} for ids in workers.ended)


def ticks_until_done(session: Session, settings: Settings, ids: set[int]) -> int:
    workers = Workers()
    left = set(ids)
    for tick in range(1, 400):
        dispatch(settings)
        began = len(workers.ended)
        workers.work(1)
        left -= {job for ended in workers.ended[began:] for job in ended}
        if not left:
            return tick
        pass_a_second()
    return 400


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("s3://footage", 5000),
        ("s3://elsewhere", 5000),
        pytest.param("s3://footage", 200_000, marks=pytest.mark.chaos),
    ],
)
def test_a_small_backfill_does_not_wait_for_a_huge_one(
    session: Session, configure: Callable[..., Settings], source: str, count: int
) -> None:
    settings = configure()
    reconcile(settings)
    alone = ticks_until_done(session, settings, backfill(session, "alone", 160))
    backfill(session, "huge", count)
    dispatch(settings)
    assert len(messages(Lane.BACKFILL)) == settings.dispatch.queue_cap
    small = backfill(session, "small", 160, source=source)
    assert ticks_until_done(session, settings, small) <= 3 * alone == 30


def test_it_would_wait_if_feeds_did_not_take_turns_with_what_lies_in_redis(
    session: Session, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    settings = configure()
    reconcile(settings)
    monkeypatch.setattr(dispatching, "PATIENCE_SECONDS", 1e9)
    backfill(session, "huge", 5000)
    dispatch(settings)
    assert ticks_until_done(session, settings, backfill(session, "small", 160)) > 64


def test_a_list_is_shared_out_once_and_not_at_every_tick(session: Session, configure: Callable[..., Settings]) -> None:
    """What is sent anew leaves its old message behind: at most one more list of them."""
    settings = configure(dispatch__queue_cap=16, worker__group_size=4)
    reconcile(settings)
    for name in ("a", "b", "c"):
        backfill(session, name, 500)
        dispatch(settings)
        pass_a_second()
    workers = Workers()
    for _ in range(60):
        dispatch(settings)
        with redis_client() as client:
            assert queue_length(client, Queue.MEDIA, Lane.BACKFILL) <= 2 * settings.dispatch.queue_cap
        workers.work(1)
        pass_a_second()
    assert workers.dropped <= 2 * settings.dispatch.queue_cap
    of = dict(rows(session, "SELECT id, backfill_id FROM jobs"))
    ended = [of[ids[0]] for ids in workers.ended]
    assert all(15 <= ended.count(number) <= 25 for number in (1, 2, 3)), ended


def test_every_feed_gets_its_turn_where_there_is_no_room_for_all(
    session: Session, configure: Callable[..., Settings]
) -> None:
    settings = configure(dispatch__queue_cap=4)
    reconcile(settings)
    feeds = [backfill(session, f"{number}-", 200) for number in range(10)]
    workers = Workers()
    for _ in range(40):
        dispatch(settings)
        workers.work(2)
    served = {number for number, ids in enumerate(feeds) if any(ids & {*ended} for ended in workers.ended)}
    assert len(served) == 10, served


def test_sources_of_live_footage_take_turns(session: Session, configure: Callable[..., Settings]) -> None:
    settings = configure()
    reconcile(settings)
    live_footage(session, "early", 3000)
    dispatch(settings)
    late = backfill(session, "late", 160, source="s3://elsewhere")
    session.execute(text("UPDATE jobs SET backfill_id = NULL, lane = 0 WHERE id = ANY(:ids)"), {"ids": sorted(late)})
    session.commit()
    assert ticks_until_done(session, settings, late) <= 30


def test_a_tick_locks_what_it_sends_and_looks_at_feeds_with_work_only(session: Session) -> None:
    for name in ("a", "b", "c"):
        backfill(session, name, 50)
    backfill(session, "done", 5)
    session.execute(text("UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE backfill_id = 4"))
    session.execute(text("UPDATE backfills SET paused_at = now() WHERE id = 3"))
    session.commit()
    feeds = ledger.feeds_with_work(session)
    assert {feed.backfill_id for feed in feeds[Lane.BACKFILL]} == {1, 2} and not feeds[Lane.LIVE]
    sent = take(session, 32, message_size=16)
    with engine().connect() as other:
        free = set(other.execute(text("SELECT id FROM jobs FOR UPDATE SKIP LOCKED")).scalars())
    locked = rows_in(session, "SELECT id, backfill_id FROM jobs WHERE id <> ALL(:ids)", free)
    assert {row.id for row in locked} == {ref.id for ref in sent}
    assert Counter(row.backfill_id for row in locked) == {1: 16, 2: 16}


def rows_in(session: Session, query: str, ids: Iterable[int]) -> list[Any]:
    """As `rows`, in the transaction that is open."""
    return list(session.execute(text(query), {"ids": sorted(ids)}))


# --- sent anew, and not without need ----------------------------------------------------------------------


def sent_and_done(session: Session, settings: Settings, ticks: int, arrive: Callable[[int], object]) -> tuple[int, int]:
    """Jobs that were sent, and that workers ended, when they take a message a tick."""
    workers, sent = Workers(), 0
    for tick in range(ticks):
        arrive(tick)
        sent += dispatch(settings)
        workers.work(1)
        pass_a_second()
    return sent, sum(map(len, workers.ended))


def test_a_source_that_gets_an_image_now_and_then_has_nothing_sent_anew(
    session: Session, configure: Callable[..., Settings]
) -> None:
    settings = configure(dispatch__queue_cap=16)
    reconcile(settings)
    backfill(session, "backlog", 2000)
    sent, done = sent_and_done(
        session, settings, 40, lambda tick: backfill(session, f"{tick}-", 1, source="s3://elsewhere")
    )
    assert sent - done <= (16 + 1) * 16, "what was sent is done, or waits in the list"


def test_more_feeds_than_messages_have_nothing_sent_anew(session: Session, configure: Callable[..., Settings]) -> None:
    settings = configure(dispatch__queue_cap=8, worker__group_size=4)
    reconcile(settings)
    for number in range(12):
        backfill(session, f"{number}-", 60)
    sent, done = sent_and_done(session, settings, 40, lambda tick: None)
    assert sent - done <= 8 * 4


def test_the_trial_of_a_paused_source_stays_in_redis(session: Session, configure: Callable[..., Settings]) -> None:
    settings = configure(dispatch__queue_cap=8, worker__group_size=4)
    reconcile(settings)
    (trial,) = backfill(session, "trial", 1, source="s3://paused")
    pause = (
        "UPDATE sources SET paused_at = now(), next_trial_at = now(), reason = 'r', detail = 'd'"
        " WHERE bucket = 's3://paused'"
    )
    session.execute(text(pause))
    session.execute(text("UPDATE jobs SET lane = 0, backfill_id = NULL WHERE id = :id"), {"id": trial})
    session.commit()
    live_footage(session, "early", 200)
    dispatch(settings)
    ids = backfill(session, "late", 40, source="s3://elsewhere")
    session.execute(text("UPDATE jobs SET backfill_id = NULL, lane = 0 WHERE id = ANY(:ids)"), {"ids": sorted(ids)})
    session.commit()
    for _ in range(8):
        pass_a_second()
    before = rows(session, "SELECT token FROM jobs WHERE state = 'queued' AND id <> :id ORDER BY id", id=trial)
    token = scalar(session, "SELECT token FROM jobs WHERE id = :id", id=trial)
    dispatch(settings)
    assert rows(session, "SELECT token FROM jobs WHERE state = 'queued' AND id <> :id ORDER BY id", id=trial) != before
    assert scalar(session, "SELECT token FROM jobs WHERE id = :id AND state = 'queued'", id=trial) == token


def test_a_source_that_pauses_during_a_tick_is_not_sent(session: Session) -> None:
    backfill(session, "a", 5)
    feeds = ledger.feeds_with_work(session)[Lane.BACKFILL]
    to = ledger.Dispatch(Lane.BACKFILL, "epoch", 1)
    for pause in ("UPDATE sources SET paused_at = now()", "UPDATE backfills SET paused_at = now()"):
        session.execute(text(pause))
        assert ledger.take_pending(session, feeds, to, lane=Lane.BACKFILL, limit=9) == []
        session.rollback()
        feeds = ledger.feeds_with_work(session)[Lane.BACKFILL]
    assert len(ledger.take_pending(session, feeds, to, lane=Lane.BACKFILL, limit=9)) == 5


def test_isolated_jobs_of_all_sources_and_both_lanes_get_their_turn(
    session: Session, configure: Callable[..., Settings]
) -> None:
    settings = configure(dispatch__queue_cap=4)
    reconcile(settings)
    ids = [backfill(session, f"{n}-", 30, source=f"s3://{n}") for n in range(6)]
    session.execute(text("UPDATE jobs SET alone = true WHERE state = 'pending'"))
    session.execute(
        text("UPDATE jobs SET lane = 0, backfill_id = NULL WHERE id = ANY(:ids)"),
        {"ids": sorted(set().union(*ids[:3]))},
    )
    session.commit()
    workers = Workers()
    for _ in range(60):
        dispatch(settings)
        workers.work(2)
    done = {job for ended in workers.ended for job in ended}
    assert all(each & done for each in ids), [len(each & done) for each in ids]


# --- what is lost -----------------------------------------------------------------------------------------


def an_isolated_job_of_a_backfill_behind_live_footage(session: Session, settings: Settings) -> None:
    reconcile(settings)
    register(session, planned("b.jpg"))
    session.execute(text("UPDATE jobs SET alone = true"))
    session.commit()
    register(session, *(planned(f"l{n:04}.jpg") for n in range(400)), lane=Lane.LIVE)
    dispatch(settings)
    assert not messages(Lane.BACKFILL) and sum(1 in {ref.id for ref in refs} for refs in messages(Lane.LIVE)) == 1


def lost_over_ticks(session: Session, settings: Settings) -> int:
    lost = 0
    for _ in range(4):
        session.execute(text("UPDATE jobs SET queued_at = queued_at - interval '1 minute' WHERE state = 'queued'"))
        session.commit()
        lost += reconcile(settings)["lost_messages"]
        dispatch(settings)
    return lost


def test_a_message_is_lost_by_the_list_it_went_to(session: Session, configure: Callable[..., Settings]) -> None:
    """An isolated job of a backfill travels with live footage; that its own lane's list is empty says nothing of it."""
    settings = configure(ledger__overdue_seconds=30)
    an_isolated_job_of_a_backfill_behind_live_footage(session, settings)
    assert lost_over_ticks(session, settings) == 0


def test_by_its_lane_it_would_be_lost_again_and_again(session: Session, configure: Callable[..., Settings]) -> None:
    """The control of the test above."""
    settings = configure(ledger__overdue_seconds=30)
    an_isolated_job_of_a_backfill_behind_live_footage(session, settings)
    with planted(LOST_BY_LANE):
        assert lost_over_ticks(session, settings) == 4


def test_what_was_sent_before_the_column_is_judged_by_its_lane(session: Session) -> None:
    register(session, planned("b.jpg"))
    take(session)
    session.execute(text("UPDATE jobs SET sent_lane = NULL"))
    lost = {"epoch": "epoch", "overdue_seconds": 0, "lost_seconds": 3600}
    assert ledger.recover_queued(session, empty_lanes=[Lane.LIVE], **lost) == 0
    assert ledger.recover_queued(session, empty_lanes=[Lane.BACKFILL], **lost) == 1


# --- isolated jobs ----------------------------------------------------------------------------------------


def lose_a_lease(session: Session) -> None:
    register(session, planned("a.jpg"))
    claim(session, take(session), lease=-1)
    assert ledger.recover_expired(session, max_lost_leases=1_000) == 1
    session.commit()
    assert scalar(session, "SELECT alone FROM jobs")


def test_a_job_that_succeeds_travels_with_others_again(session: Session) -> None:
    lose_a_lease(session)
    (job,) = claim(session, take(session, isolated=True))
    assert job.observed_at is not None
    record_image(session, job, [], job.observed_at)
    session.commit()
    ledger.rerun(session, [job.ref.id], by="op")
    session.commit()
    assert rows(session, "SELECT state, alone FROM jobs") == [("pending", False)]


def test_a_job_that_an_operator_starts_anew_travels_with_others_again(session: Session) -> None:
    lose_a_lease(session)
    (job,) = claim(session, take(session, isolated=True))
    ledger.quarantine(session, job, Reason.UNREADABLE_IMAGE, "no")
    session.commit()
    assert ledger.retry(session, [job.ref.id], by="op") == [job.ref.id]
    session.commit()
    assert rows(session, "SELECT state, alone, lost_leases, next_run_at, worker FROM jobs") == [
        ("pending", False, 0, None, None)
    ]


def test_many_isolated_jobs_leave_live_footage_its_half(session: Session, configure: Callable[..., Settings]) -> None:
    settings = configure(dispatch__queue_cap=8, worker__group_size=1)
    reconcile(settings)
    register_many(session, 50)
    session.execute(text("UPDATE jobs SET alone = true"))
    session.commit()
    register(session, *(planned(f"live{n}.jpg") for n in range(50)), lane=Lane.LIVE)
    dispatch(settings)
    assert rows(session, "SELECT alone, count(*) FROM jobs WHERE state = 'queued' GROUP BY 1 ORDER BY 1") == [
        (False, 4),
        (True, 4),
    ]


# --- bounded batches --------------------------------------------------------------------------------------


def test_due_retries_are_woken_in_batches_the_longest_due_first(
    session: Session, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "WOKEN_AT_ONCE", 4)
    settings = configure(dispatch__queue_cap=1, worker__group_size=1)
    reconcile(settings)
    register_many(session, 10)
    session.execute(text("UPDATE jobs SET state = 'retry_wait', next_run_at = now() - make_interval(secs => id)"))
    session.commit()
    dispatch(settings)
    woken = rows(session, "SELECT id FROM jobs WHERE state <> 'retry_wait' ORDER BY id")
    assert [row.id for row in woken] == [7, 8, 9, 10]


def test_waking_and_sending_are_two_transactions(session: Session, configure: Callable[..., Settings]) -> None:
    """A tick that fails to send has woken what was due all the same."""
    settings = configure()
    reconcile(settings)
    register_many(session, 3)
    session.execute(text("UPDATE jobs SET state = 'retry_wait', next_run_at = now()"))
    session.commit()
    with pytest.raises(TickFailedError, match="division by zero"), planted(FAILING_TAKE):
        dispatch(settings)
    assert rows(session, "SELECT DISTINCT state FROM jobs") == [("pending",)]


def test_a_job_that_is_superseded_while_it_runs_has_no_worker_any_more(session: Session) -> None:
    register(session, planned("a.jpg"))
    claim(session, take(session), worker="host/1")
    register(session, planned("a.jpg", etag="e2", modified=NOON + timedelta(days=1)))
    assert rows(session, "SELECT state, worker, lease_until FROM jobs ORDER BY id LIMIT 1") == [
        ("cancelled", None, None)
    ]
