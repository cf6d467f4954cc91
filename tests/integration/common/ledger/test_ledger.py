"""The state machine on a real Postgres: every transition, the fence, and what each promise rests on."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import places
from common.database.sessions import engine, make_engine, session_scope, sql
from common.domain import JobRef, JobState, Lane, MaskStatus, ObservedAt, ObservedAtSource, Reason
from common.ledger import ClaimedJob, StaleJobError, transitions
from common.ledger import attempts as attempts_of_ledger
from common.models.pipeline import pipeline_spec
from common.planning import PlannedObject
from common.settings import Settings, get_settings
from common.storage.store import FILE_BUCKET
from tests.ledger_rows import NOON, claim, dispatch, face, planned, register, register_many, rows, scalar, states, take
from tests.mutants import UNFENCED_CLAIM, UNFENCED_SUCCESS, planted
from tests.services import wait_until
from workers.jobs import attempts
from workers.jobs.recording import record_image

SEEN = ObservedAt(NOON, ObservedAtSource.KEY_PATTERN)


def test_registering_twice_changes_nothing(session: Session) -> None:
    first = register(session, planned("a.jpg"), planned("b.jpg"))
    second = register(session, planned("a.jpg"), planned("b.jpg"))
    assert (first.new, first.known) == (2, 0)
    assert (second.new, second.known) == (0, 2)
    assert states(session) == {"pending": 2}


def test_live_footage_goes_before_backfills(session: Session) -> None:
    register(session, planned("old.jpg"))
    register(session, planned("new.jpg"), lane=Lane.LIVE)
    (first,) = claim(session, dispatch(session, 1))
    assert first.key == "new.jpg"


def test_two_dispatchers_share_the_work(session: Session) -> None:
    register_many(session, 4)
    with Session(session.bind) as other:
        mine = take(session, 2)
        theirs = take(other, 9)  # would hang if it waited for mine
        assert len(mine) == len(theirs) == 2
        assert not {ref.id for ref in mine} & {ref.id for ref in theirs}


def test_a_message_runs_its_job_once(session: Session) -> None:
    register_many(session, 2)
    refs = dispatch(session)
    assert len(claim(session, refs)) == 2
    assert claim(session, refs) == []  # the same message, delivered again
    assert claim(session, [JobRef(refs[0].id, uuid.uuid4()), JobRef(10**9, uuid.uuid4())]) == []  # a forged one


def test_without_the_fence_a_message_runs_its_job_again(session: Session) -> None:
    register_many(session, 2)
    refs = dispatch(session)
    assert len(claim(session, refs)) == 2
    with planted(UNFENCED_CLAIM):
        assert len(claim(session, refs)) == 2


def test_success_writes_everything_in_one_transaction(session: Session) -> None:
    register(session, planned("a.jpg"), zone="Asia/Kolkata")
    (job,) = claim(session, dispatch(session))
    record_image(session, job, [face(), face(MaskStatus.WITHOUT_MASK)], SEEN)
    assert scalar(session, "SELECT count(*) FROM faces") == 0  # rolled back by the reader's helper: nothing stays
    assert states(session) == {"running": 1}
    record_image(session, job, [face(), face(MaskStatus.WITHOUT_MASK)], SEEN)
    session.commit()
    assert states(session) == {"succeeded": 1}
    assert rows(session, "SELECT status, size_px FROM faces ORDER BY id") == [("with_mask", 50), ("without_mask", 50)]
    # 12:00 UTC is 17:30 in Kolkata, whose hour began at 11:30 UTC.
    half_past = NOON - timedelta(minutes=30)
    assert rows(session, "SELECT hour, frames FROM frame_counts") == [(half_past, 1)]
    assert rows(session, "SELECT hour FROM dirty_marks") == [(half_past,)]
    assert rows(session, "SELECT attempt, outcome, worker FROM job_attempts") == [(1, "succeeded", "w/1")]


def _recorded_by(session: Session, *jobs: ClaimedJob, fence: bool) -> int:
    """How many faces there are after each of these has tried to record one."""
    with nullcontext() if fence else planted(UNFENCED_SUCCESS):
        for job in jobs:
            try:
                record_image(session, job, [face()], SEEN)
                session.commit()
            except StaleJobError:
                session.rollback()
    count = scalar(session, "SELECT count(*) FROM faces")
    assert isinstance(count, int)
    return count


@pytest.mark.parametrize(("fence", "faces"), [(True, 1), (False, 2)])
def test_a_worker_paused_past_its_lease_commits_nothing_because_of_the_fence(
    session: Session, fence: bool, faces: int
) -> None:
    """It is paused, another one does the job, then it wakes up."""
    register(session, planned("a.jpg"))
    (paused,) = claim(session, dispatch(session), worker="paused/1", lease=-1)
    assert ledger.recover_expired(session, max_lost_leases=10) == 1
    session.commit()
    (second,) = claim(session, dispatch(session, isolated=True), worker="second/2")
    assert _recorded_by(session, second, paused, fence=fence) == faces


@pytest.mark.parametrize(("fence", "faces"), [(True, 1), (False, 2)])
def test_a_claim_that_postgres_forgot_is_found_and_counted_once_because_of_the_fence(
    session: Session, fence: bool, faces: int
) -> None:
    """Postgres confirms a worker's claim and then loses it in a crash, for which the rollback stands."""
    register(session, planned("a.jpg"))
    refs = dispatch(session)
    (forgotten,) = ledger.claim(session, refs, worker="w/1", lease_seconds=60)
    session.rollback()
    assert lost_messages(session, overdue_seconds=0) == 1
    session.commit()
    (job,) = claim(session, dispatch(session))
    assert _recorded_by(session, job, forgotten, fence=fence) == faces


def test_a_worker_s_claim_is_one_statement_without_a_transaction_around_it(session: Session) -> None:
    register(session, planned("a.jpg"))
    refs = dispatch(session)
    sent: list[tuple[str, bool]] = []

    def watch(connection: Any, cursor: Any, statement: str, *rest: object) -> None:
        sent.append((statement, connection.connection.driver_connection.autocommit))

    event.listen(engine(), "before_cursor_execute", watch)
    try:
        attempts.claim(refs, "w/1", get_settings())
        assert len(sent) == 1 and sent[0][1]
        assert states(session) == {"running": 1}
        # The connection goes back to the pool as it was.
        with suppress(RuntimeError), session_scope() as own:
            own.execute(text("UPDATE jobs SET state = 'pending'"))
            raise RuntimeError
    finally:
        event.remove(engine(), "before_cursor_execute", watch)
    assert len(sent) == 2 and not sent[1][1]
    assert states(session) == {"running": 1}


def test_only_claims_do_not_wait_for_the_disk(session: Session) -> None:
    def waits() -> bool:
        return bool(session.scalar(text("SELECT current_setting('synchronous_commit') = 'on'")))

    register(session, planned("a.jpg"))
    refs = dispatch(session)
    (job,) = ledger.claim(session, refs, worker="w/1", lease_seconds=60)
    assert not waits()
    session.commit()
    record_image(session, job, [], SEEN)
    assert waits()


@pytest.mark.parametrize("end", ["quarantine", "release", "retry", "renew", "changed"])
def test_every_write_of_a_worker_is_fenced(session: Session, end: str) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session), lease=-1)
    ledger.recover_expired(session, max_lost_leases=10)
    session.commit()
    if end == "renew":
        assert ledger.renew(session, [job.ref], lease_seconds=60) == set()
        return
    with pytest.raises(StaleJobError):
        match end:
            case "quarantine":
                ledger.quarantine(session, job, Reason.UNREADABLE_IMAGE, "no")
            case "release":
                ledger.release(session, job)
            case "changed":
                ledger.source_changed(session, job, "no")
            case _:
                ledger.retry_later(session, job, Reason.UNEXPECTED_ERROR, "no", max_attempts=3, base=1, cap=1)


def test_a_heartbeat_keeps_the_lease(session: Session) -> None:
    register(session, planned("a.jpg"), planned("b.jpg"))
    kept, lost = claim(session, dispatch(session), lease=-1)
    assert ledger.renew(session, [kept.ref], lease_seconds=60) == {kept.ref.id}
    session.commit()
    assert ledger.recover_expired(session, max_lost_leases=10) == 1
    session.commit()
    assert rows(session, "SELECT id FROM jobs WHERE state = 'pending'") == [(lost.ref.id,)]


def test_transient_errors_wait_and_end_in_quarantine_with_the_last_reason(session: Session) -> None:
    register(session, planned("a.jpg"))
    for attempt in (1, 2, 3):
        (job,) = claim(session, dispatch(session))
        assert job.attempt == attempt
        state = ledger.retry_later(
            session, job, Reason.STORAGE_UNAVAILABLE, f"try {attempt}", max_attempts=3, base=1000, cap=50
        )
        session.commit()
        if attempt < 3:
            assert state is JobState.RETRY_WAIT
            wait = scalar(session, "SELECT extract(epoch FROM next_run_at - clock_timestamp()) FROM jobs")
            assert -1 < wait <= 50
            session.execute(text("UPDATE jobs SET next_run_at = clock_timestamp()"))
            assert ledger.wake_retries(session, limit=100) == 1
            session.commit()
    assert rows(session, "SELECT state, reason, detail FROM jobs") == [
        ("quarantined", "storage_unavailable", "try 3 (given up after 3 tries)")
    ]
    assert [row[0] for row in rows(session, "SELECT outcome FROM job_attempts ORDER BY id")] == [
        "retried",
        "retried",
        "quarantined",
    ]


def test_what_is_not_due_is_not_woken(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    ledger.retry_later(session, job, Reason.STORAGE_UNAVAILABLE, "", max_attempts=3, base=1e6, cap=1e6)
    session.execute(text("UPDATE jobs SET next_run_at = clock_timestamp() + interval '1 hour'"))
    session.commit()
    assert ledger.wake_retries(session, limit=100) == 0


def test_a_released_job_gets_its_attempt_back(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    ledger.release(session, job)
    session.commit()
    assert rows(session, "SELECT state, attempt FROM jobs") == [("pending", 0)]


def test_a_job_that_crashes_while_isolated_ends_in_quarantine_and_innocents_do_not(session: Session) -> None:
    register_many(session, 3)
    claim(session, dispatch(session), worker="w/group")
    assert ledger.report_crash(session, "%/group", max_crashes=3) == 3
    session.commit()
    # Who was to blame is not known yet: nobody is charged, each is isolated from now on.
    assert rows(session, "SELECT DISTINCT state, crashes, alone FROM jobs") == [("pending", 0, True)]
    assert dispatch(session) == []
    for expected in ("pending", "pending", "quarantined"):
        (poison, *_) = take(session, 1, isolated=True)
        claim(session, [poison], worker="w/solo")
        ledger.report_crash(session, "%/solo", max_crashes=3)
        session.commit()
        assert scalar(session, "SELECT state FROM jobs WHERE id = :id", id=poison.id) == expected
    assert scalar(session, "SELECT count(*) FROM jobs WHERE crashes = 0 AND state = 'pending'") == 2


def test_leases_that_keep_running_out_end_in_quarantine(session: Session) -> None:
    register(session, planned("a.jpg"))
    for isolated in (False, True):
        claim(session, dispatch(session, isolated=isolated), lease=-1)
        ledger.recover_expired(session, max_lost_leases=2)
        session.commit()
    assert rows(session, "SELECT state, reason, crashes, lost_leases FROM jobs") == [
        ("quarantined", "lease_expired", 0, 2)
    ]


def lost_messages(session: Session, *, epoch: str = "epoch", **conditions: Any) -> int:
    """How many are found under these conditions; none, if they are those of a dispatcher that works."""
    usual = {"overdue_seconds": 3600, "lost_seconds": 3600, "empty_lanes": list(Lane)}
    return ledger.recover_queued(session, epoch=epoch, **{**usual, **conditions})


def test_lost_messages_are_sent_again(session: Session) -> None:
    register(session, planned("a.jpg"))
    dispatch(session)
    assert lost_messages(session) == 0
    assert lost_messages(session, overdue_seconds=0, empty_lanes=[Lane.LIVE]) == 0
    assert lost_messages(session, overdue_seconds=0) == 1
    session.commit()
    dispatch(session)
    assert lost_messages(session, epoch="another", empty_lanes=[]) == 1
    session.commit()
    dispatch(session)
    assert lost_messages(session, empty_lanes=[], lost_seconds=0) == 1, "a queue that never gets empty holds it up"


def test_a_newer_version_takes_the_place_of_the_older(session: Session) -> None:
    register(session, planned("a.jpg"), planned("b.jpg"))
    for job in claim(session, dispatch(session)):
        record_image(session, job, [face()], SEEN)
    session.execute(text("DELETE FROM dirty_marks"))
    session.commit()
    result = register(session, planned("a.jpg", etag="e2", modified=NOON + timedelta(hours=1)))
    assert (result.new, result.superseded) == (1, 1)
    assert states(session) == {"cancelled": 1, "pending": 1, "succeeded": 1}
    assert scalar(session, "SELECT count(*) FROM faces") == 1
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 1
    assert rows(session, "SELECT hour FROM dirty_marks") == [(NOON,)]


def test_an_older_version_does_not_replace_a_newer_one(session: Session) -> None:
    register(session, planned("a.jpg", etag="e2", modified=NOON))
    result = register(session, planned("a.jpg", etag="e1", modified=NOON - timedelta(hours=1)))
    assert (result.new, result.superseded) == (0, 0)
    assert states(session) == {"pending": 1}


def test_a_worker_of_a_superseded_version_cannot_commit(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    register(session, planned("a.jpg", etag="e2", modified=NOON + timedelta(hours=1)))
    with pytest.raises(StaleJobError):
        record_image(session, job, [face()], SEEN)


def test_an_operator_retries_what_is_in_quarantine_and_nothing_else(session: Session) -> None:
    register(session, planned("a.jpg"), planned("b.jpg"))
    bad, good = claim(session, dispatch(session))
    ledger.quarantine(session, bad, Reason.ACCESS_DENIED, "denied \0 and long " + "x" * 5000)
    session.commit()
    assert len(scalar(session, "SELECT detail FROM jobs WHERE state = 'quarantined'")) == ledger.DETAIL_LIMIT
    assert ledger.retry(session, [bad.ref.id, good.ref.id], by="op") == [bad.ref.id]
    session.commit()
    assert states(session) == {"pending": 1, "running": 1}


def test_bytes_that_come_back_are_analysed_again(session: Session) -> None:
    hours = [NOON + timedelta(hours=n) for n in range(3)]
    for etag, modified in zip(("e1", "e2", "e1"), hours, strict=True):
        assert register(session, planned("a.jpg", etag=etag, modified=modified)).new == 1
        (job,) = claim(session, dispatch(session))
        assert job.etag == etag
        record_image(session, job, [face()], SEEN)
        session.commit()
    assert rows(session, "SELECT etag, superseded_at IS NULL FROM media_objects ORDER BY id") == [
        ("e1", True),
        ("e2", False),
    ]
    assert scalar(session, "SELECT count(*) FROM faces") == scalar(session, "SELECT count(*) FROM frame_counts") == 1
    assert register(session, planned("a.jpg", etag="e1", modified=hours[2])).known == 1


def test_a_local_file_is_what_it_is_now_whatever_its_time_says(session: Session) -> None:
    def local(etag: str, hour: int) -> PlannedObject:
        item = planned("a.jpg", etag=etag, modified=NOON + timedelta(hours=hour))
        return replace(item, info=replace(item.info, bucket=FILE_BUCKET))

    register(session, local("e1", 5))
    result = register(session, local("e2", 1))  # as `mv` and `cp -p` leave it
    assert (result.new, result.superseded) == (1, 1)


def test_a_commit_and_a_newer_version_do_not_deadlock(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lock the media object first. A commit that has done one of its two writes meets a newer version:
    with the job first, Postgres ends one of the two as a deadlock."""
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    failed: list[BaseException] = []

    def replace_it() -> None:
        try:
            with Session(session.bind) as other:
                register(other, planned("a.jpg", etag="e2", modified=NOON + timedelta(hours=1)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=replace_it)
    writes: list[str] = []

    def between_writes(name: str) -> None:
        real = getattr(attempts_of_ledger, name)

        def write(*args: Any, **options: Any) -> None:
            writes.append(name)
            if len(writes) == 2:
                thread.start()
                with Session(session.bind) as watcher:
                    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                    wait_until(lambda: scalar(watcher, waiting), what="the newer version's wait")
            real(*args, **options)

        monkeypatch.setattr(attempts_of_ledger, name, write)

    between_writes("_end")
    between_writes("set_observed_at")
    ledger.succeed(session, job, ObservedAt(NOON - timedelta(hours=1), ObservedAtSource.EXIF))
    session.commit()
    thread.join(30)
    assert len(writes) == 2 and failed == []
    assert states(session) == {"cancelled": 1, "pending": 1}


@pytest.mark.parametrize("anew", [True, False])
def test_registrations_that_overtake_each_other_do_not_wait_in_a_circle(
    session: Session, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """Somebody registers `a` after we have locked the versions that were there, and we insert `b`. A third replaces
    `a`, and waits for our `b`. The control: we lock `a` behind our insert, and Postgres has to stop one of us."""
    register(session, planned("z.jpg"))  # the location is there: nobody waits for that
    if not anew:
        monkeypatch.setattr(session, "begin_nested", nullcontext)
    failed: list[BaseException] = []

    def beside(*objects: PlannedObject) -> None:
        try:
            with Session(session.bind) as other:
                register(other, *objects)
        except BaseException as error:
            failed.append(error)

    replaced = planned("a.jpg", etag="e2", modified=NOON + timedelta(hours=1))
    third = threading.Thread(target=beside, args=(replaced, planned("b.jpg")))
    steps = iter(("FOR UPDATE", "INSERT INTO media_objects", ""))
    awaited = next(steps)

    def between(conn: object, cursor: object, statement: str, *rest: object) -> None:
        nonlocal awaited
        if not awaited or awaited not in statement or threading.current_thread() is not threading.main_thread():
            return
        step, awaited = awaited, ""
        if step == "FOR UPDATE":
            beside(planned("a.jpg"))
        else:
            third.start()
            with Session(session.bind) as watcher:
                wait_until(lambda: scalar(watcher, "SELECT count(*) FROM pg_locks WHERE NOT granted"), what="the third")
        awaited = next(steps)

    event.listen(session.get_bind(), "after_cursor_execute", between)
    try:
        register(session, planned("a.jpg"), planned("b.jpg"))
    except DBAPIError as error:
        failed.append(error)
        session.rollback()
    finally:
        event.remove(session.get_bind(), "after_cursor_execute", between)
    third.join(30)
    assert not awaited, "all of it happened"
    assert ["deadlock detected" in str(error) for error in failed] == ([] if anew else [True])
    if anew:
        current = "SELECT key, revision FROM media_objects WHERE superseded_at IS NULL ORDER BY key"
        assert rows(session, current) == [("a.jpg", "e2"), ("b.jpg", "e1"), ("z.jpg", "e1")]


def test_what_no_pattern_could_place_waits_for_one_that_can(session: Session) -> None:
    lost = replace(planned("a.jpg"), observed_at=None, reason=Reason.TIME_PATTERN_MISMATCH, detail="no")
    register(session, lost)
    assert ledger.retry(session, by="op") == []  # it would count under its upload time
    location = places.add_location(session, "tokyo", "Asia/Tokyo")
    pipeline = places.ensure_pipeline(session, pipeline_spec(get_settings()))
    ledger.register(
        session, [planned("a.jpg")], location=location, camera=None, pipeline=pipeline, lane=Lane.BACKFILL
    )  # another location's clock must not place it
    session.commit()
    assert states(session) == {"quarantined": 1}
    register(session, planned("a.jpg"))
    assert states(session) == {"pending": 1}


def test_a_cancelled_attempt_is_told(session: Session) -> None:
    register(session, planned("a.jpg"))
    claim(session, dispatch(session))
    register(session, planned("a.jpg", etag="e2", modified=NOON + timedelta(hours=1)))
    assert rows(session, "SELECT outcome, reason, worker FROM job_attempts") == [("cancelled", "superseded", "w/1")]


def test_the_work_left_is_seen_without_counting(session: Session) -> None:
    assert not ledger.any_active(session)
    register(session, planned("a.jpg"))
    assert ledger.any_active(session) and ledger.any_active(session, "lobby")
    assert not ledger.any_active(session, "elsewhere")
    (job,) = claim(session, dispatch(session))
    assert ledger.any_active(session)
    ledger.quarantine(session, job, Reason.EMPTY_FILE, "")
    session.commit()
    assert not ledger.any_active(session)


def test_a_job_that_moves_while_one_looks_is_not_missed(session: Session) -> None:
    """One statement sees one moment; state by state, a job could be past the one and not yet in the other."""
    register(session, planned("a.jpg"))
    statements: list[str] = []

    def watch(conn: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    event.listen(session.get_bind(), "before_cursor_execute", watch)
    assert ledger.any_active(session, "lobby")
    event.remove(session.get_bind(), "before_cursor_execute", watch)
    assert len(statements) == 1


def test_dispatch_and_recovery_read_only_what_they_are_about(session: Session) -> None:
    """However many jobs are done, each of the statements goes by the partial index of its state."""
    register_many(session, 60)
    claim(session, dispatch(session, 20))
    dispatch(session, 20)
    # Like chunks of one long video, because only their states matter here.
    session.execute(
        text(
            "INSERT INTO jobs (media_object_id, source_id, pipeline_id, kind, lane, range_start_ms, range_end_ms,"
            " state, finished_at) SELECT 1, 1, 1, 'chunk', 1, n, n + 1, 'succeeded', now()"
            " FROM generate_series(1, 50000) AS n"
        )
    )
    session.execute(text("UPDATE jobs SET state = 'retry_wait', next_run_at = now() WHERE id % 5000 = 0"))
    session.commit()
    session.execute(text("ANALYZE jobs"))
    session.commit()
    used = {
        "take_pending": plans(session, lambda: take(session, 16)),
        "alone": plans(session, lambda: take(session, 16, isolated=True)),
        "wake_retries": plans(session, lambda: ledger.wake_retries(session, limit=100)),
        "recover_expired": plans(session, lambda: ledger.recover_expired(session, max_lost_leases=3)),
        "recover_queued": plans(
            session,
            lambda: ledger.recover_queued(
                session, epoch="f", overdue_seconds=1, empty_lanes=list(Lane), lost_seconds=1
            ),
        ),
    }
    for name, plan in used.items():
        assert "Seq Scan on jobs" not in plan, f"{name}: {plan}"
    assert "ix_jobs_pending on jobs" in used["take_pending"] and "ix_jobs_pending_alone on jobs" in used["alone"]
    session.execute(text("DROP INDEX ix_jobs_pending"))
    without = plans(session, lambda: take(session, 16))
    assert "ix_jobs_pending on jobs" not in without, "control"
    session.rollback()


@pytest.mark.parametrize("by_key", [True, False])
def test_a_workers_statements_are_planned_once(
    session: Session, configure: Callable[..., Settings], by_key: bool
) -> None:
    """The control: left to itself Postgres plans for the job it sees, each time anew, when the ledger is not small."""
    refs = many_queued(session)
    session.execute(text("ANALYZE jobs"))
    session.commit()
    with a_worker(configure(database__by_key=by_key)) as worker:
        do(worker, refs[:12])  # psycopg prepares what it has seen five times
        statement = "SELECT sum(custom_plans) FROM pg_prepared_statements"
        before = scalar(worker, statement)
        do(worker, refs[12:32])
        anew = scalar(worker, statement) - before
    assert (anew == 0) == by_key, anew


def spell_out(read: str, state: str) -> str:
    """A statement with the state that a job must be in written out: claims are of queued jobs, ends of running ones."""
    return read.replace(":was", f"'{state}'") if ("SET state = 'running'" in read) == (state == "queued") else read


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_workers_statements_do_not_read_all_that_is_in_a_state(
    session: Session, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, state: str, by_id: bool
) -> None:
    """The control: the index of a state looks short to Postgres while its statistics are of an emptier day."""
    register_many(session, 1)
    session.execute(text("ANALYZE jobs"))
    refs = many_queued(session)
    if not by_id:
        monkeypatch.setattr(transitions, "sql", lambda read, *names: sql(spell_out(read, state), *names))
    # As long as our transaction holds it, autovacuum does not bring the statistics up to date.
    session.execute(text("LOCK TABLE jobs IN SHARE UPDATE EXCLUSIVE MODE"))
    statement = f"SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'ix_jobs_{state}'"
    with a_worker(configure(database__by_key=True)) as worker:
        if state == "running":
            claim(worker, refs[100:], worker="another/1")
        do(worker, refs[:12])
        before = scalar(worker, statement)
        do(worker, refs[12:32])
        read = scalar(worker, statement) - before
    assert read == 0 if by_id else read > 20 * len(refs) / 2, read


def many_queued(session: Session) -> list[JobRef]:
    register_many(session, 2000)
    return dispatch(session, 2000)


@contextmanager
def a_worker(settings: Settings) -> Iterator[Session]:
    made = make_engine(settings.database)
    try:
        with Session(made, expire_on_commit=False) as worker:
            yield worker
    finally:
        made.dispose()


def do(worker: Session, refs: list[JobRef]) -> None:
    """Claim jobs one by one, and record that they found nothing."""
    for ref in refs:
        (job,) = claim(worker, [ref])
        record_image(worker, job, [], SEEN)
        worker.commit()
    worker.execute(text("SELECT pg_stat_force_next_flush()"))
    worker.commit()


def plans(session: Session, act: Callable[[], object]) -> str:
    """How Postgres would go about the statements of an action on the jobs."""
    seen: list[tuple[str, Any]] = []

    def watch(conn: object, cursor: object, statement: str, parameters: Any, *rest: object) -> None:
        seen.append((statement, parameters))

    event.listen(session.get_bind(), "before_cursor_execute", watch)
    act()
    event.remove(session.get_bind(), "before_cursor_execute", watch)
    connection = session.connection()
    return "\n".join(
        line
        for statement, parameters in seen
        if "jobs" in statement
        for line in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars()
    )
