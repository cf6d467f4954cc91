"""Each of the 64 pairs of states is fired: jobs go through those that the table lists, and through no other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.database.tables import Location
from common.domain import AttemptOutcome, JobKind, JobRef, JobState, Lane, ObservedAt, ObservedAtSource, Reason
from common.ledger import ClaimedJob, Placement, StaleJobError, registration
from common.ledger.states import FINAL_STATES, HOLDS, LISTED, MEANING, as_markdown
from common.ledger.transitions import Attempt, Unless, transition
from tests import ROOT
from tests.ledger_rows import NOON, planned, register, rows
from tests.pipelines import default_spec

POLICY = ledger.recovery.PausePolicy(after_refusals=1, seconds=1, cap_seconds=1)
SEEN = ObservedAt(NOON, ObservedAtSource.KEY_PATTERN)
AGAIN = {"max_attempts": 3, "base": 1.0, "cap": 1.0}
FROM_JOBS = "FROM jobs WHERE jobs.id = :id"


@pytest.mark.parametrize(("old", "new"), list(product(JobState, JobState)))
def test_a_statement_is_built_for_the_listed_pairs_only(old: JobState, new: JobState) -> None:
    attempt = Attempt(AttemptOutcome.RELEASED) if old is JobState.RUNNING else None
    if (old, new) in LISTED:
        statement = transition((old,), new, FROM_JOBS, attempt=attempt).statement
        assert "token = gen_random_uuid()" in statement
        assert all(f"{column} = " in statement for column in HOLDS[old])
    else:
        with pytest.raises(ValueError, match=f"no job may go from {old} to {new}"):
            transition((old,), new, FROM_JOBS, attempt=attempt)


def test_a_running_attempt_does_not_end_untold() -> None:
    with pytest.raises(ValueError, match="needs `attempt`"):
        transition((JobState.RUNNING,), JobState.PENDING, FROM_JOBS)
    with pytest.raises(ValueError, match="needs `attempt`"):
        transition((JobState.QUEUED,), JobState.PENDING, FROM_JOBS, attempt=Attempt(AttemptOutcome.RELEASED))
    with pytest.raises(ValueError, match="pending to succeeded"):
        transition((JobState.PENDING,), JobState.QUEUED, FROM_JOBS, unless=Unless("true", JobState.SUCCEEDED))


def test_the_table_leaves_out_no_state() -> None:
    assert set(MEANING) == set(HOLDS) == {state for pair in LISTED for state in pair} == set(JobState)


def test_the_document_is_made_from_the_table() -> None:
    assert as_markdown() in (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, "-m", "common.ledger"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert shown.stdout == as_markdown()


def test_nothing_else_writes_states() -> None:
    """Statements that move jobs stand in one file, those that insert them in another."""
    writes = re.compile(r"UPDATE jobs|INTO jobs|DO UPDATE SET state")
    found = {
        str(path.relative_to(ROOT))
        for package in ("common", "producer", "workers")
        for path in (ROOT / package).rglob("*.py")
        if writes.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"common/ledger/transitions.py", "common/ledger/registration.py"}


# --- every operation on a job in every state --------------------------------------------------------------


class Fired:
    """One job in a state, and what an operation makes of it."""

    def __init__(self, session: Session, state: JobState, reason: str | None, kind: JobKind = JobKind.IMAGE) -> None:
        self.session = session
        register(session, planned("a.jpg"), lane=Lane.BACKFILL)
        held = {column: FILLED[column] for column in HOLDS[state]}
        held |= {"queued_at": "now()", "started_at": "now()"}
        values = ", ".join(f"{column} = {value}" for column, value in held.items())
        backfill = (
            "INSERT INTO backfills (source, source_id, location_id, pipeline_id) VALUES ('s3://footage', 1, 1, 1)"
        )
        session.execute(text(backfill))
        session.execute(
            text(
                "UPDATE jobs SET state = :state, kind = :kind, reason = :reason, backfill_id = 1, attempt = 1,"
                f" {values}"
            ),
            {"state": state.value, "kind": kind.value, "reason": reason},
        )
        session.commit()
        (row,) = rows(session, "SELECT id, token FROM jobs")
        self.ref = JobRef(row.id, row.token)

    @property
    def job(self) -> ClaimedJob:
        return ClaimedJob(
            self.ref, JobKind.IMAGE, 1, 1, 1, "s3://footage", "a.jpg", "e1", 1, NOON, SEEN, 1, "UTC", None, 1, 1,
            Lane.BACKFILL, default_spec().as_dict(),
        )  # fmt: skip


FILLED = {
    "epoch": "'e'",
    "sent_lane": "1",
    "lease_until": "now() - interval '1 hour'",
    "worker": "'w/1'",
    "next_run_at": "now() - interval '1 hour'",
    "finished_at": "now()",
}


def _send(fired: Fired, **options: Any) -> None:
    feed = [ledger.Feed(1, 1)]
    ledger.take_pending(fired.session, feed, ledger.Dispatch(Lane.LIVE, "e", 1), lane=Lane.BACKFILL, limit=5, **options)


def _register(fired: Fired, etag: str, hours: int = 0, **changed: Any) -> None:
    item = planned("a.jpg", etag=etag, modified=NOON + timedelta(hours=hours))
    register(fired.session, item)


def _came_back(fired: Fired) -> None:
    """Other bytes took the place of these, and these are back."""
    fired.session.execute(text("UPDATE media_objects SET superseded_at = now()"))
    fired.session.execute(
        text(
            "INSERT INTO media_objects (bucket, key, revision, etag, size_bytes, last_modified, kind, location_id)"
            " SELECT bucket, key, 'e2', 'e2', 1, last_modified, 'image', location_id FROM media_objects"
        )
    )
    _register(fired, "e1", 2)


def _restored(fired: Fired) -> None:
    fired.session.execute(text("UPDATE jobs SET reason = 'archived'"))
    _register(fired, "e1")


def _paused(fired: Fired) -> None:
    fired.session.execute(
        text("UPDATE sources SET paused_at = now(), refusing_since = now() - interval '1 hour', refusals = 9")
    )
    ledger.recover_refused(fired.session, policy=POLICY, max_attempts=9)


def _place(fired: Fired, reason: Reason | None, seen: ObservedAt | None, hours: int = 0) -> None:
    location = fired.session.get_one(Location, 1)
    place = Placement(1, seen, timedelta(hours=hours), reason, "planted" if reason else None)
    ledger.correct(fired.session, [place], location, detail="planted")


def _plan_chunks(fired: Fired) -> None:
    fired.session.execute(text("UPDATE jobs SET kind = 'chunk', range_end_ms = 1000"))
    of = {"media": 1, "source": 1, "pipeline": 1, "backfill": 1, "lane": 1}
    registration.insert_chunks(fired.session, [(0, 1000)], **of)


def _lost(fired: Fired) -> None:
    ledger.recover_queued(fired.session, epoch="f", overdue_seconds=1, empty_lanes=(), lost_seconds=1)


#: Everything in the product that moves jobs, as far as it can be called on any of them.
OPERATIONS: dict[str, Callable[[Fired], object]] = {
    "send": _send,
    "send what waits": lambda f: _send(f, from_list=Lane.BACKFILL),
    "recall": lambda f: ledger.recall(f.session, lane=Lane.BACKFILL, epoch="e"),
    "wake": lambda f: ledger.wake_retries(f.session, limit=9),
    "claim": lambda f: ledger.claim(f.session, [f.ref], worker="w/2", lease_seconds=9),
    "renew": lambda f: ledger.renew(f.session, [f.ref], lease_seconds=9),
    "succeed": lambda f: ledger.succeed(f.session, f.job, SEEN),
    "succeed together": lambda f: ledger.succeed_all(f.session, [(f.job, SEEN)]),
    "retry later": lambda f: ledger.retry_later(f.session, f.job, Reason.UNEXPECTED_ERROR, "", **AGAIN),
    "give up": lambda f: ledger.retry_later(
        f.session, f.job, Reason.UNEXPECTED_ERROR, "", max_attempts=1, base=1.0, cap=1.0
    ),
    "quarantine": lambda f: ledger.quarantine(f.session, f.job, Reason.EMPTY_FILE, ""),
    "refuse": lambda f: ledger.refuse(f.session, f.job, Reason.ACCESS_DENIED, "", policy=POLICY, **AGAIN),
    "await restore": lambda f: ledger.await_restore(f.session, f.job, "", check_seconds=1, wait_seconds=1),
    "source changed": lambda f: ledger.source_changed(f.session, f.job, ""),
    "release": lambda f: ledger.release(f.session, f.job),
    "give back": lambda f: ledger.give_back(f.session, f.job, "", check_seconds=1),
    "crash": lambda f: ledger.report_crash(f.session, "w/1", max_crashes=3),
    "crash again": lambda f: ledger.report_crash(f.session, "w/1", max_crashes=1),
    "expire": lambda f: ledger.recover_expired(f.session, max_lost_leases=3),
    "expire again": lambda f: ledger.recover_expired(f.session, max_lost_leases=1),
    "lost message": _lost,
    "refused source": _paused,
    "retry": lambda f: ledger.retry(f.session, by="op"),
    "retry this": lambda f: ledger.retry(f.session, [f.ref.id], by="op"),
    "cancel": lambda f: ledger.cancel(f.session, [f.ref.id], by="op"),
    "cancel backfill": lambda f: ledger.cancel_backfill(f.session, 1, by="op", limit=9),
    "rerun": lambda f: ledger.rerun(f.session, [f.ref.id], by="op"),
    "restore requested": lambda f: ledger.restore_requested(f.session, "s3://footage", ["a.jpg"], check_seconds=1),
    "erase": lambda f: ledger.erase(f.session, "s3://footage", "a.jpg", by="op"),
    "register again": lambda f: _register(f, "e1"),
    "register restored": _restored,
    "register newer": lambda f: _register(f, "e2", 1),
    "register what came back": _came_back,
    "plan chunks": _plan_chunks,
    "correct": lambda f: _place(f, None, SEEN),
    "correct by hours": lambda f: _place(f, None, SEEN, hours=5),
    "correct to nowhere": lambda f: _place(f, Reason.FUTURE_TIME, None),
}

#: What a state's `reason` can be, as far as moves go by it.
REASONS: dict[JobState, tuple[str | None, ...]] = {
    JobState.QUARANTINED: ("empty_file", "archived", "access_denied", "time_pattern_mismatch", "purged"),
    JobState.CANCELLED: ("superseded", "cancelled_by_operator", "cancelled_with_backfill"),
    JobState.RETRY_WAIT: ("unexpected_error", "archived"),
    JobState.SUCCEEDED: (None, "purged"),
}


@pytest.fixture
def moved(session: Session) -> Iterator[list[tuple[str, str]]]:
    """Every pair of states that a job goes through, as a trigger sees it."""
    session.execute(text("CREATE TABLE seen (old text, new text, same_token boolean)"))
    session.execute(
        text(
            "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO seen VALUES (OLD.state, NEW.state, OLD.token = NEW.token); RETURN NEW; END $$"
        )
    )
    session.execute(text("CREATE TRIGGER see AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION see()"))
    session.commit()
    yield []
    session.rollback()
    session.execute(text("DROP TRIGGER see ON jobs"))
    session.execute(text("DROP FUNCTION see"))
    session.execute(text("DROP TABLE seen"))
    session.commit()


def test_jobs_go_through_the_listed_pairs_and_no_others(session: Session, moved: list[tuple[str, str]]) -> None:
    kept: dict[str, set[str]] = {}
    pairs: set[tuple[JobState, JobState]] = set()
    for state in JobState:
        for reason in REASONS.get(state, (None,)):
            for name, operation in OPERATIONS.items():
                _start_over(session)
                fired = Fired(session, state, reason, JobKind.CHUNK if name in OF_CHUNKS else JobKind.IMAGE)
                session.execute(text("TRUNCATE seen"))
                with suppress(StaleJobError):
                    operation(fired)
                for row in session.execute(text("SELECT old, new, same_token FROM seen")):
                    if row.same_token:
                        kept.setdefault(name, set()).add(row.old)
                    else:
                        pairs.add((JobState(row.old), JobState(row.new)))
                _check_rows(session)
    assert pairs == LISTED, (pairs - LISTED, LISTED - pairs)
    assert {name: states for name, states in kept.items() if name not in SETS_UP} == {"renew": {"running"}}


#: Operations that move chunks otherwise than images.
OF_CHUNKS = ("plan chunks", "correct by hours")

#: Their set-up writes to jobs by itself, and keeps the token.
SETS_UP = ("plan chunks", "register restored")


def _start_over(session: Session) -> None:
    session.rollback()
    session.execute(
        text(
            "TRUNCATE jobs, job_attempts, media_objects, backfills, sources, operator_actions, operator_action_jobs,"
            " erased_objects, dirty_marks RESTART IDENTITY CASCADE"
        )
    )
    session.commit()


def _check_rows(session: Session) -> None:
    """A job in a state has what that state holds, and nothing of the others'."""
    for row in session.execute(text("SELECT * FROM jobs")).mappings():
        state = JobState(row["state"])
        if state is JobState.RUNNING:
            assert row["lease_until"] is not None and row["worker"] is not None, row
        if state in FINAL_STATES:
            assert row["finished_at"] is not None, row
        others = {column for columns in HOLDS.values() for column in columns} - {*HOLDS[state]}
        assert not {column: row[column] for column in others if row[column] is not None}, row
