"""What an operator may do to jobs, and that it is recorded: cancel, retry, rerun."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session

from common import ledger
from common.domain import MediaKind, ObservedAt, ObservedAtSource, Reason, VideoInfo
from common.ledger import StaleJobError
from tests.ledger_rows import NOON, claim, dispatch, face, planned, register, register_many, rows, scalar, states
from tests.mutants import UNFENCED_SUCCESS, planted
from tests.services import maskwatch
from workers.jobs.recording import record_image
from workers.summaries.aggregation import summarize

SEEN = ObservedAt(NOON, ObservedAtSource.KEY_PATTERN)
ADA = {"MASKWATCH_OPERATOR": "Ada"}


def test_a_cancelled_job_whose_worker_lives_on_cannot_commit(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    assert ledger.cancel(session, [job.ref.id], by="Ada") == [job.ref.id]
    session.commit()
    assert ledger.renew(session, [job.ref], lease_seconds=60) == set()  # its heartbeat hears of it
    with pytest.raises(StaleJobError):
        record_image(session, job, [face()], SEEN)
    session.rollback()
    assert states(session) == {"cancelled": 1}
    assert rows(session, "SELECT outcome, reason, detail FROM job_attempts") == [
        ("cancelled", "cancelled_by_operator", "by Ada")
    ]
    assert scalar(session, "SELECT count(*) FROM faces") == 0


def test_without_the_fence_it_could(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    ledger.cancel(session, [job.ref.id], by="Ada")
    session.commit()
    with planted(UNFENCED_SUCCESS):
        record_image(session, job, [face()], SEEN)
    session.commit()
    assert states(session) == {"succeeded": 1} and scalar(session, "SELECT count(*) FROM faces") == 1


def test_every_active_state_can_be_cancelled_and_no_other(session: Session) -> None:
    register_many(session, 6)
    done, waiting, bad, running = claim(session, dispatch(session, 4))
    record_image(session, done, [], SEEN)
    ledger.retry_later(session, waiting, Reason.STORAGE_UNAVAILABLE, "", max_attempts=9, base=100, cap=100)
    ledger.quarantine(session, bad, Reason.EMPTY_FILE, "")
    session.commit()
    (queued,) = dispatch(session, 1)
    everything = [row.id for row in rows(session, "SELECT id FROM jobs ORDER BY id")]
    moved = ledger.cancel(session, everything, by="Ada")
    session.commit()
    assert moved == [waiting.ref.id, running.ref.id, queued.id, everything[5]]
    assert states(session) == {"cancelled": 4, "succeeded": 1, "quarantined": 1}
    assert claim(session, [queued]) == []  # its message is still on its way


def test_what_was_cancelled_is_not_planned_again_but_may_be_retried(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = rows(session, "SELECT id FROM jobs")
    ledger.cancel(session, [job.id], by="Ada")
    session.commit()
    assert register(session, planned("a.jpg")).new == 0
    assert ledger.retry(session, by="Ada") == []  # only by its number
    assert ledger.retry(session, [job.id], by="Ada") == [job.id]
    session.commit()
    assert states(session) == {"pending": 1}
    assert rows(session, "SELECT action, by FROM operator_actions ORDER BY id") == [("cancel", "Ada"), ("retry", "Ada")]


def test_a_cancelled_job_of_a_replaced_version_stays_so_and_starts_over_with_it(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = rows(session, "SELECT id FROM jobs")
    ledger.cancel(session, [job.id], by="Ada")
    session.commit()
    register(session, planned("a.jpg", etag="e2", modified=NOON + timedelta(hours=1)))
    assert ledger.retry(session, [job.id], by="Ada") == []
    register(session, planned("a.jpg", modified=NOON + timedelta(hours=2)))
    assert rows(session, "SELECT state, count(*) FROM jobs GROUP BY 1 ORDER BY 1") == [("cancelled", 1), ("pending", 1)]


def test_the_neighbour_of_a_cancelled_chunk_does_not_do_its_part(session: Session) -> None:
    """The last chunk of a video goes on to its end; a cancelled one is still the last."""
    register(session, replace(planned("a.mp4"), kind=MediaKind.VIDEO))
    (probe,) = claim(session, dispatch(session))
    info = VideoInfo("mp4", "h264", 64, 48, 25.0, 0, 4.0, None)
    ledger.plan_chunks(session, probe, info, [(0, 2000), (2000, 4000)])
    ledger.succeed(session, probe, SEEN)
    session.commit()
    (first, second) = rows(session, "SELECT id FROM jobs WHERE kind = 'chunk' ORDER BY range_start_ms")
    ledger.cancel(session, [second.id], by="Ada")
    session.commit()
    (job,) = claim(session, dispatch(session))
    assert job.ref.id == first.id and not job.last
    # Nor does a second plan of the video bring it back.
    assert ledger.plan_chunks(session, probe, info, [(0, 4000)]) == 0


def test_a_rerun_starts_over_in_one_transaction(session: Session) -> None:
    register(session, planned("a.jpg"), planned("b.jpg"))
    for job in claim(session, dispatch(session)):
        record_image(session, job, [face(), face()], SEEN)
    session.commit()
    summarize()
    first = scalar(session, "SELECT min(id) FROM jobs")
    assert ledger.rerun(session, [first], by="Ada") == [first]
    session.rollback()
    assert scalar(session, "SELECT count(*) FROM faces") == 4  # nothing without the commit
    ledger.rerun(session, [first], by="Ada")
    session.commit()
    assert states(session) == {"pending": 1, "succeeded": 1}
    summarize()
    assert rows(session, "SELECT frames, faces FROM compliance_hourly") == [(1, 2)]
    (again,) = claim(session, dispatch(session))
    record_image(session, again, [face()], SEEN)
    session.commit()
    summarize()
    assert rows(session, "SELECT frames, faces FROM compliance_hourly") == [(2, 3)]


def test_probes_and_what_has_not_succeeded_are_not_rerun(session: Session) -> None:
    register_many(session, 1)
    (job,) = rows(session, "SELECT id FROM jobs")
    assert ledger.rerun(session, [job.id, 99], by="Ada") == []
    assert scalar(session, "SELECT count(*) FROM operator_actions") == 0


def test_the_commands_say_what_they_did_and_the_job_tells_its_story(session: Session) -> None:
    register_many(session, 3)
    cancelled = maskwatch("jobs", "cancel", "1", "2", "--json", env=ADA)
    assert cancelled.returncode == 0 and json.loads(cancelled.stdout) == {"changed": [1, 2], "left": []}
    again = maskwatch("jobs", "cancel", "1", "3", env=ADA)
    assert again.returncode == 1 and "1 job(s) cancelled" in again.stderr
    assert "not changed, because they have ended or don't exist: 1" in again.stderr
    assert maskwatch("jobs", "retry", "1", env=ADA).returncode == 0
    story = json.loads(maskwatch("jobs", "show", "1", "--json").stdout)
    assert [(action["action"], action["by"]) for action in story["actions"]] == [("cancel", "Ada"), ("retry", "Ada")]
    assert story["actions"][0]["database_user"] == "maskwatch"
    shown = maskwatch("jobs", "show", "1")
    assert "cancel" in shown.stdout and "Ada" in shown.stdout
    nothing = maskwatch("jobs", "cancel")
    assert nothing.returncode == 2 and "Missing argument" in nothing.stderr
    rerun = maskwatch("jobs", "rerun", "3")
    assert rerun.returncode == 1 and "have not succeeded" in rerun.stderr
    nobody = maskwatch("jobs", "retry", "2", env={"MASKWATCH_OPERATOR": "\x07"})
    assert nobody.returncode == 1 and "MASKWATCH_OPERATOR" in nobody.stderr
