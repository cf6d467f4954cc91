"""Recovers lost jobs: those of processes that died, those whose lease ran out, those whose message never arrives."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy.orm import Session

from common.domain import REFUSALS, AttemptOutcome, JobState, Lane, PausePolicy, Reason
from common.ledger.transitions import SAID, Attempt, Transition, Unless, move, transition


def _loses(condition: str, counter: str, by: str, outcome: AttemptOutcome) -> Transition:
    """running → pending, or → quarantined once the counter reaches its limit. Any of the jobs may be the cause, so each
    is isolated from now on."""
    return transition(
        (JobState.RUNNING,),
        JobState.PENDING,
        f"""
        FROM jobs
        WHERE {condition}
        """,
        sets={counter: f"jobs.{counter} + {by}", "alone": "true", **SAID},
        unless=Unless(f"jobs.{counter} + {by} >= :limit", JobState.QUARANTINED),
        attempt=Attempt(outcome, ":reason", ":detail"),
        skip_locked=True,
    )


#: A crash counts against a job only if the job was isolated, or was the only one that ran.
_CRASH = _loses(
    "jobs.worker LIKE :worker",
    "crashes",
    "(jobs.alone OR (SELECT count(*) FROM held) = 1)::int",
    AttemptOutcome.CRASHED,
)

_EXPIRE = _loses("jobs.lease_until < clock_timestamp()", "lost_leases", "1", AttemptOutcome.LEASE_EXPIRED)


def report_crash(session: Session, worker: str, *, max_crashes: int) -> int:
    """The process that ran these jobs died: running → pending, or → quarantined.

    `worker` is a LIKE pattern for `jobs.worker`. A crash counts against a job only if no other job ran beside it; from
    its first crash on a job is isolated.
    """
    said = {"reason": Reason.CRASHED.value, "detail": "the worker process died while it ran this job"}
    return len(move(session, _CRASH, {"worker": worker, "limit": max_crashes, **said}))


def recover_expired(session: Session, *, max_lost_leases: int) -> int:
    """running → pending for jobs whose lease ran out, whatever the cause; → quarantined at the `max_lost_leases`-th
    time."""
    said = {"reason": Reason.LEASE_EXPIRED.value, "detail": "the worker stopped renewing its lease"}
    return len(move(session, _EXPIRE, {"limit": max_lost_leases, **said}))


def recover_queued(
    session: Session, *, epoch: str, overdue_seconds: float, empty_lanes: Collection[Lane], lost_seconds: float
) -> int:
    """queued → pending for jobs whose message is lost: it was sent to a Redis that was wiped since (another epoch), or
    it is overdue although its list is empty, or it is older than any message should get. (If the message was only
    late, it is dropped when it is read.)"""
    lost = {"epoch": epoch, "empty": list(empty_lanes), "overdue": overdue_seconds, "lost": lost_seconds}
    return len(move(session, _RECOVER, lost))


_RECOVER = transition(
    (JobState.QUEUED,),
    JobState.PENDING,
    """
    FROM jobs
    WHERE (jobs.epoch IS DISTINCT FROM :epoch
           OR jobs.queued_at < clock_timestamp() - make_interval(
               secs => CASE WHEN coalesce(jobs.sent_lane, jobs.lane) = ANY(:empty) THEN :overdue ELSE :lost END))
    """,
    skip_locked=True,
)


def recover_refused(session: Session, *, policy: PausePolicy, max_attempts: int) -> int:
    """quarantined → retry_wait for jobs that a paused source refused before it was paused."""
    refused = {"refusals": list(REFUSALS), "cap": policy.cap_seconds, "max": max_attempts}
    return len(move(session, _REFUSED, refused))


#: Not jobs that have used up their tries: they were refused in earlier pauses, too.
_REFUSED = transition(
    (JobState.QUARANTINED,),
    JobState.RETRY_WAIT,
    """
    FROM sources
    JOIN jobs ON jobs.source_id = sources.id
    WHERE sources.paused_at IS NOT NULL AND jobs.finished_at >= sources.refusing_since
      AND jobs.reason = ANY(:refusals) AND jobs.failures + 1 < :max
    """,
    sets={
        "failures": "jobs.failures + 1",
        "next_run_at": "clock_timestamp() + make_interval(secs => random() * :cap)",
    },
    skip_locked=True,
)
