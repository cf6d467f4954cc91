"""A source that refuses everything pauses itself; a single denied object is the object's fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.cli.parts.waiting import wait_for
from common.domain import JobRef, MaskwatchError, PausePolicy, Reason
from common.ledger import StaleJobError, circuit_breaker
from common.settings import Settings, get_settings
from producer import dispatch as dispatching
from tests.faults import faulty_s3
from tests.ledger_rows import claim, dispatch, planned, register, register_many, rows, scalar, states, take
from tests.photos import face_jpeg
from tests.services import Bucket, locate, maskwatch
from workers.jobs.recording import record_image
from workers.jobs.run import run_jobs

POLICY = PausePolicy(after_refusals=3, seconds=60, cap_seconds=600)


def refuse(session: Session, count: int, reason: Reason = Reason.ACCESS_DENIED, policy: PausePolicy = POLICY) -> None:
    """Let this many jobs be dispatched, claimed and refused by their source."""
    for job in claim(session, dispatch(session, count)):
        ledger.refuse(session, job, reason, "denied", policy=policy, max_attempts=10, base=1, cap=1)
        session.commit()


def trial(session: Session) -> list[JobRef]:
    session.execute(text("UPDATE sources SET next_trial_at = now()"))
    taken = [job.ref for job in ledger.take_trials(session, epoch="epoch", policy=POLICY)]
    session.commit()
    return taken


def test_a_denied_object_among_good_ones_is_quarantined(session: Session) -> None:
    register_many(session, 6)
    for _ in range(3):
        refuse(session, 1)
        (good,) = claim(session, dispatch(session, 1))
        assert good.observed_at is not None
        record_image(session, good, [], good.observed_at)
        session.commit()
    assert states(session) == {"quarantined": 3, "succeeded": 3}
    assert circuit_breaker.list_paused(session) == []


def test_a_source_that_denies_everything_pauses_and_loses_nothing(session: Session) -> None:
    register_many(session, 8)
    refuse(session, 4)
    assert states(session) == {"pending": 4, "quarantined": 2, "retry_wait": 2}
    (paused,) = circuit_breaker.list_paused(session)
    assert (paused.bucket, paused.reason, paused.detail) == ("s3://footage", "access_denied", "denied")
    assert dispatch(session) == []
    # What was quarantined before the source was found out waits, too.
    assert ledger.recover_refused(session, policy=POLICY, max_attempts=10) == 2
    session.commit()
    assert states(session) == {"pending": 4, "retry_wait": 4}
    assert ledger.recover_refused(session, policy=POLICY, max_attempts=10) == 0


def test_without_a_pause_the_quarantine_fills(session: Session) -> None:
    register_many(session, 8)
    refuse(session, 8, policy=PausePolicy(after_refusals=10**6, seconds=60, cap_seconds=600))
    assert states(session) == {"quarantined": 8}


def test_what_was_quarantined_before_for_a_reason_of_its_own_stays(session: Session) -> None:
    register_many(session, 6)
    (broken,) = claim(session, dispatch(session, 1))
    ledger.quarantine(session, broken, Reason.ACCESS_DENIED, "long ago")
    session.commit()
    refuse(session, 1)
    (other,) = claim(session, dispatch(session, 1))
    ledger.quarantine(session, other, Reason.UNREADABLE_IMAGE, "the source gave it")  # and so answered
    session.commit()
    refuse(session, 3)
    assert len(circuit_breaker.list_paused(session)) == 1
    assert ledger.recover_refused(session, policy=POLICY, max_attempts=10) == 2
    session.commit()
    assert sorted(row.reason for row in rows(session, "SELECT reason FROM jobs WHERE state = 'quarantined'")) == [
        "access_denied",
        "access_denied",
        "unreadable_image",
    ]


def test_a_paused_source_is_tried_with_one_job_at_a_time(session: Session) -> None:
    register_many(session, 8)
    refuse(session, 3)
    assert ledger.take_trials(session, epoch="epoch", policy=POLICY) == []  # not due
    session.commit()
    (ref,) = trial(session)
    (job,) = claim(session, [ref])
    waits = "SELECT extract(epoch FROM next_trial_at - clock_timestamp())::integer FROM sources"
    assert 110 < scalar(session, waits) <= 120  # twice the first wait
    ledger.refuse(session, job, Reason.ACCESS_DENIED, "still", policy=POLICY, max_attempts=10, base=1, cap=1)
    session.commit()
    assert dispatch(session) == [] and len(circuit_breaker.list_paused(session)) == 1
    (ref,) = trial(session)
    assert ref.id != job.ref.id  # another object: the first may be the only bad one
    (job,) = claim(session, [ref])
    assert job.observed_at is not None
    record_image(session, job, [], job.observed_at)
    session.commit()
    assert circuit_breaker.list_paused(session) == []
    assert len(dispatch(session)) == 3


def test_other_sources_go_on(session: Session) -> None:
    register_many(session, 4)
    refuse(session, 3)
    elsewhere = planned("other.jpg")
    register(session, replace(elsewhere, info=replace(elsewhere.info, bucket="s3://other")))
    (job,) = claim(session, dispatch(session))
    assert job.bucket == "s3://other"


def test_a_job_that_is_refused_in_every_pause_ends_in_quarantine(session: Session) -> None:
    register_many(session, 1)
    policy = PausePolicy(after_refusals=1, seconds=60, cap_seconds=600)
    for _ in range(3):
        session.execute(text("UPDATE jobs SET next_run_at = now() WHERE state = 'retry_wait'"))
        ledger.wake_retries(session, limit=100)
        refs = trial(session) or dispatch(session)
        (job,) = claim(session, refs)
        ledger.refuse(session, job, Reason.ACCESS_DENIED, "no", policy=policy, max_attempts=3, base=1, cap=1)
        session.commit()
    assert states(session) == {"quarantined": 1}
    assert ledger.recover_refused(session, policy=policy, max_attempts=3) == 0


def test_a_refusal_is_fenced(session: Session) -> None:
    register_many(session, 1)
    (job,) = claim(session, dispatch(session), lease=0)
    ledger.recover_expired(session, max_lost_leases=9)
    session.commit()
    with pytest.raises(StaleJobError):
        ledger.refuse(session, job, Reason.ACCESS_DENIED, "", policy=POLICY, max_attempts=9, base=1, cap=1)
    assert scalar(session, "SELECT refusals FROM sources") == 0


def test_an_operator_resumes_a_source_and_that_is_recorded(session: Session) -> None:
    register_many(session, 4)
    refuse(session, 3)
    status = maskwatch("status")
    assert "s3://footage has been paused since" in status.stderr and "sources resume s3://footage" in status.stderr
    assert "access_denied" in maskwatch("sources", "list").stdout
    done = maskwatch("sources", "resume", "s3://footage", env={"MASKWATCH_OPERATOR": "Ada"})
    assert done.returncode == 0, done.stderr
    assert rows(session, "SELECT action, by, detail FROM operator_actions") == [("resume", "Ada", "s3://footage")]
    assert len(dispatch(session)) == 1
    again = maskwatch("sources", "resume", "s3://footage")
    assert again.returncode == 1 and "s3://footage is not paused (paused: none is)" in again.stderr
    with pytest.raises(MaskwatchError):
        circuit_breaker.resume(session, "s3://unheard-of")


def test_a_bucket_that_denies_and_then_gives(
    session: Session, bucket: Bucket, configure: Callable[..., Settings]
) -> None:
    """End to end: the worker meets the denials, the reconciler takes them back, a trial finds the end of it."""
    names = [f"{number}.jpg" for number in range(6)]
    for number, name in enumerate(names):
        bucket.put(name, face_jpeg(number))
    faults: dict[str, int | list[int]] = dict.fromkeys(names, 403)
    upstream = get_settings().storage.endpoint_url
    assert upstream is not None
    with faulty_s3(upstream, faults) as url:
        configure(
            storage__endpoint_url=url,
            ledger__pause_after_refusals=3,
            ledger__pause_seconds=0.01,
            ledger__pause_cap_seconds=0.02,
        )
        locate()
        assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
        settings = get_settings()
        work(session, settings)
        assert len(circuit_breaker.list_paused(session)) == 1
        dispatching.reconcile(settings)
        assert set(states(session)) <= {"retry_wait", "pending"}
        faults.clear()
        for _ in range(20):
            work(session, settings)
            if states(session) == {"succeeded": 6}:
                break
    assert states(session) == {"succeeded": 6}
    assert circuit_breaker.list_paused(session) == []


def test_who_waits_is_told_of_a_pause(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    register_many(session, 4)
    refuse(session, 3)
    ledger.cancel(session, [row.id for row in rows(session, "SELECT id FROM jobs")], by="Ada")
    session.commit()
    wait_for(get_settings())
    assert "s3://footage refuses every request and is paused (denied)" in " ".join(capsys.readouterr().err.split())


def work(session: Session, settings: Settings) -> None:
    """One round of the dispatcher's choices and a worker's work, without the queue between them."""
    session.rollback()
    ledger.wake_retries(session, limit=100)
    found = take(session, 10)
    found += [job.ref for job in ledger.take_trials(session, epoch="e", policy=settings.ledger.pause_policy)]
    session.commit()
    run_jobs(found, worker="w/1", settings=settings)
