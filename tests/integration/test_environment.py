"""Faults of the environment: a Redis that is full or frozen, a Postgres without a free connection, clocks that are off.
Each is named in a sentence, and costs no job."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.orm import Session

from common import ledger
from common.database.errors import DatabaseDownError
from common.database.sessions import engine, session_scope
from common.domain import Reason, SourceChangedError
from common.messaging.broker import BrokerDownError
from common.messaging.queues import Queue, queue_length, redis_client
from common.settings import Settings, StorageSettings, get_settings
from common.storage.opening import open_source
from producer.dispatch import dispatch, reconcile, request_summary
from producer.steps import TickFailedError
from tests.chaos.harness import SMALL, Lab
from tests.faults import Fault, faulty_s3
from tests.ledger_rows import claim, face, planned, register, register_many, states, take
from tests.ledger_rows import dispatch as dispatch_now
from tests.services import QUICK, Bucket, Services, forget_settings, maskwatch, wait_until
from workers.jobs.attempts import settle
from workers.jobs.recording import record_image
from workers.summaries.aggregation import summarize


@pytest.fixture
def lab(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Quick processes on the services of this test run."""
    for name, value in {**QUICK, **SMALL}.items():
        monkeypatch.setenv(name, value)
    forget_settings()
    lab = Lab(services, tmp_path, random.Random(1))
    yield lab
    lab.engine.dispose()


# --- Redis ------------------------------------------------------------------------------------------------


@contextmanager
def full(services: Services) -> Iterator[None]:
    """Redis has no memory left, and refuses every write instead of forgetting something."""
    with Redis.from_url(services.endpoints.redis_url) as client:
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


def logs(lab: Lab, command: str) -> str:
    """What the processes of a command have said."""
    return "".join(log.read_text() for log in lab.folder.glob(f"logs/*-{command}.log"))


def traced_ticks(lab: Lab) -> list[str]:
    """What failed in a tick, or in sending one, and was told with a stack instead of in a sentence."""
    lines = (logs(lab, "producer") + logs(lab, "aggregator")).splitlines()
    beat = ('"logger": "celery.beat"', '"logger": "celery.app.trace"')
    return [line for line in lines if '"exception"' in line and any(name in line for name in beat)]


def test_a_full_redis_is_named_and_what_it_refused_is_sent_later(lab: Lab, session: Session) -> None:
    settings = get_settings()
    register_many(session, 20)
    reconcile(settings)
    with full(lab.services):
        with pytest.raises(TickFailedError, match="maxmemory"):
            dispatch(settings)
        assert states(session)["queued"] > 0, "taken, and not sent: what the reconciler is for"
    with redis_client() as client:
        assert queue_length(client, Queue.MEDIA) == 0
    wait_until(lambda: reconcile(settings)["lost_messages"], what="the messages being found missing")
    assert dispatch(settings) == 20
    assert states(session) == {"queued": 20}


def test_workers_live_through_a_full_redis(lab: Lab) -> None:
    bucket = lab.bucket("full")
    lab.put(bucket, 24)
    with lab.processes("producer", "aggregator", "worker") as processes:
        lab.backfill(bucket)
        wait_until(lambda: lab.states().get("succeeded", 0) >= 4, what="the first pictures")
        with full(lab.services):
            before = lab.states().get("succeeded", 0)
            lab.put(bucket, 8, first=24)
            lab.backfill(bucket)
            # Long enough for a message to be taken, and for several ticks to be refused.
            lab.scalar("SELECT pg_sleep(4)")
            assert all(process.poll() is None for process in processes)
            assert lab.states().get("succeeded", 0) < 32, f"not full: {before} before"
        lab.wait_until_done(32, seconds=120)
        assert all(process.poll() is None for process in processes)
    assert "used memory > 'maxmemory'" in logs(lab, "producer") and traced_ticks(lab) == []
    assert (lab.lost(32), lab.doubled(), lab.summary_difference()) == (0, 0, 0)


def test_a_frozen_redis_is_given_up_on_and_work_goes_on_after_it(lab: Lab) -> None:
    bucket = lab.bucket("frozen")
    lab.put(bucket, 24)
    redis = lab.pid_of("redis")
    with lab.processes("producer", "aggregator", "worker"):
        lab.backfill(bucket)
        wait_until(lambda: lab.states().get("succeeded", 0) >= 4, what="the first pictures")
        os.kill(redis, signal.SIGSTOP)
        try:
            with pytest.raises(BrokerDownError, match="is Redis running"):
                dispatch(get_settings())
        finally:
            os.kill(redis, signal.SIGCONT)
        lab.wait_until_done(24, seconds=120)
    assert (lab.lost(24), lab.doubled(), lab.summary_difference()) == (0, 0, 0)


# --- Postgres ---------------------------------------------------------------------------------------------


@contextmanager
def without_a_free_connection(services: Services) -> Iterator[Callable[[], None]]:
    """Others hold every connection that Postgres has to give; what it yields takes away those that are ours again."""
    engine().dispose()  # ours go back to its pool, and must not be there for us
    url = make_url(services.endpoints.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with ExitStack() as stack:
        held: list[psycopg.Connection] = []

        def hold() -> None:
            for _ in range(200):
                try:
                    held.append(stack.enter_context(psycopg.connect(url, autocommit=True, application_name="crowd")))
                except psycopg.OperationalError as error:
                    assert "too many clients" in str(error)
                    return
            raise AssertionError("Postgres has more connections than expected")

        def push_out() -> None:
            ours = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'maskwatch'"
            held[0].execute(ours)
            hold()

        hold()
        yield push_out


@pytest.mark.parametrize("asked", [True, False])
def test_a_connection_that_was_dropped_is_noticed_before_it_is_used(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """The control: one that was used a moment ago is not asked, and breaks; those after it are new."""
    monkeypatch.setattr("common.database.sessions.ALIVE_SECONDS", 0.0 if asked else 60.0)
    with session_scope() as session:
        ours = session.scalar(text("SELECT pg_backend_pid()"))
    with lab.engine.begin() as others:
        others.execute(text("SELECT pg_terminate_backend(:ours, 5000)"), {"ours": ours})
    with (
        nullcontext() if asked else pytest.raises(DatabaseDownError, match="does not answer"),
        session_scope() as session,
    ):
        assert session.scalar(text("SELECT pg_backend_pid()")) != ours
    with session_scope() as session:
        assert session.scalar(text("SELECT pg_backend_pid()")) != ours


def test_without_a_free_connection_a_command_says_so_in_a_line(lab: Lab) -> None:
    with without_a_free_connection(lab.services):
        done = maskwatch("status")
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert "too many clients" in line, line
    assert maskwatch("status").returncode == 0


def test_without_a_free_connection_a_job_is_neither_failed_nor_lost(lab: Lab, session: Session) -> None:
    settings = get_settings()
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch_now(session), lease=2)
    session.close()
    assert isinstance(session.bind, Engine)
    session.bind.dispose()

    def work() -> None:
        assert job.observed_at is not None
        with session_scope() as own:
            record_image(own, job, [face()], job.observed_at)

    with without_a_free_connection(lab.services), pytest.raises(DatabaseDownError, match="too many clients"):
        settle(job, work, settings)
    assert states(session) == {"running": 1}
    session.rollback()
    wait_until(lambda: reconcile(settings)["expired_leases"], what="the end of the lease")
    assert states(session) == {"pending": 1}


def test_workers_live_through_a_postgres_without_a_free_connection(lab: Lab) -> None:
    bucket = lab.bucket("crowded")
    lab.put(bucket, 24)
    with lab.processes("producer", "aggregator", "worker") as processes:
        lab.backfill(bucket)
        wait_until(lambda: lab.states().get("succeeded", 0) >= 4, what="the first pictures")
        lab.engine.dispose()

        def the_producer_found_none() -> bool:
            # Repeatedly: a quick client gets the connection that was just taken from another client.
            push_out()
            return "too many clients" in logs(lab, "producer")

        with without_a_free_connection(lab.services) as push_out:
            wait_until(the_producer_found_none, what="a producer that found no connection")
        lab.wait_until_done(24, seconds=120)
        assert all(process.poll() is None for process in processes)
    assert (lab.lost(24), lab.doubled(), lab.summary_difference()) == (0, 0, 0)
    assert "tick failed" in logs(lab, "producer") and traced_ticks(lab) == []


# --- S3 ---------------------------------------------------------------------------------------------------


def read_both_ways(url: str, bucket: Bucket, etag: str) -> tuple[bytes, bytes]:
    """The object `a.jpg`, whole and by a range, pinned to this ETag."""
    store, _ = open_source(bucket.uri, Settings(storage=StorageSettings(endpoint_url=url)))
    whole = part = b""
    with suppress(SourceChangedError):
        whole = store.read("a.jpg", etag, 1000)
    with suppress(SourceChangedError):
        part = store.read_range("a.jpg", etag, 0, 3)
    return whole, part


def test_a_server_that_ignores_which_version_was_asked_for_is_noticed(services: Services, bucket: Bucket) -> None:
    planned = bucket.client.put_object(Bucket=bucket.name, Key="a.jpg", Body=b"planned")["ETag"].strip('"')
    bucket.put("a.jpg", b"another")
    fault = Fault(deaf=True)
    with faulty_s3(services.endpoints.s3_endpoint_url, lambda *_: fault) as url:
        assert read_both_ways(url, bucket, planned) == (b"", b"")
        # One that lies about what it sends can't be noticed: it is the ETag of the answer that counts.
        fault = Fault(deaf=True, lies=True)
        assert read_both_ways(url, bucket, planned) == (b"another", b"ano")


# --- clocks -----------------------------------------------------------------------------------------------


@contextmanager
def times_sent_to_postgres() -> Iterator[list[Any]]:
    """Every parameter sent by this process that is about now: a time of its own clock."""
    found: list[Any] = []

    def look(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        sets = parameters if isinstance(parameters, list) else [parameters]
        for values in sets:
            found.extend((statement, value) for value in flattened(values) if is_about_now(value))

    event.listen(engine(), "before_cursor_execute", look)
    try:
        yield found
    finally:
        event.remove(engine(), "before_cursor_execute", look)


def flattened(value: Any) -> Iterator[Any]:
    """All single values of a statement's parameters."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flattened(item)
    else:
        yield value


def is_about_now(value: Any) -> bool:
    """Whether a value is a time within a day of now, as a datetime or in seconds or ms since 1970."""
    now = datetime.now(UTC)
    if isinstance(value, datetime):
        return abs((value if value.tzinfo else value.replace(tzinfo=UTC)) - now) < timedelta(days=1)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return any(abs(value / scale - now.timestamp()) < 86400 for scale in (1, 1000))
    return False


def test_no_time_of_a_workers_or_producers_clock_reaches_the_ledger(lab: Lab, session: Session) -> None:
    settings = get_settings()
    register_many(session, 3)
    with times_sent_to_postgres() as sent:
        lead_a_life(settings)
    assert sent == []
    assert states(session) == {"succeeded": 1, "retry_wait": 1, "pending": 1}


def lead_a_life(settings: Settings) -> None:
    """Three jobs are sent and claimed: one succeeds, one fails, one is given back; then whatever ticks, ticks."""
    reconcile(settings)
    with session_scope() as session:
        sent = take(session, 10)
    with session_scope() as session:
        jobs = ledger.claim(session, sent, worker="w/1", lease_seconds=60)
    with session_scope() as session:
        assert len(ledger.renew(session, [job.ref for job in jobs], lease_seconds=60)) == 3
    done, failed, given_back = jobs
    assert done.observed_at is not None
    with session_scope() as session:
        record_image(session, done, [face()], done.observed_at)
    with session_scope() as session:
        ledger.retry_later(session, failed, Reason.STORAGE_UNAVAILABLE, "away", max_attempts=3, base=60, cap=60)
    with session_scope() as session:
        ledger.release(session, given_back)
    with session_scope() as session:
        ledger.wake_retries(session, limit=100)
        ledger.recover_expired(session, max_lost_leases=3)
        ledger.report_crash(session, "w/%", max_crashes=3)
    request_summary()
    summarize()


def test_a_time_of_our_own_clock_would_be_noticed(lab: Lab) -> None:
    with times_sent_to_postgres() as sent, session_scope() as session:
        session.execute(text("UPDATE jobs SET lease_until = :at"), {"at": datetime.now(UTC) + timedelta(minutes=1)})
        session.execute(text("UPDATE jobs SET attempt = attempt WHERE id = ANY(:ids)"), {"ids": [1, 2]})
    assert len(sent) == 1


def test_workers_whose_clocks_are_hours_off_do_their_work_once(lab: Lab) -> None:
    bucket = lab.bucket("skewed")
    lab.put(bucket, 24)
    # A lease that doesn't run out on a busy machine, and would at once by a clock hours ahead.
    lease = {"MASKWATCH_LEDGER__LEASE_SECONDS": "60"}
    slow, fast = (lab.injected(f"import time\nclock = time.time\ntime.time = lambda: clock() + {by}") for by in HOURS)
    with (
        lab.processes("producer", "aggregator"),
        lab.running("worker", env=slow | lease),
        lab.running("worker", env=fast | lease),
    ):
        lab.backfill(bucket)
        lab.wait_until_done(24, seconds=120)
    assert (lab.lost(24), lab.doubled(), lab.summary_difference()) == (0, 0, 0)
    assert lab.scalar("SELECT count(*) FROM job_attempts WHERE outcome <> 'succeeded'") == 0


#: How far off two clocks are, in seconds.
HOURS = (-7 * 3600, 7 * 3600)
