"""What got lost is found: jobs of processes that died, leases that ran out, messages that never arrive."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy.orm import Session

from common.domain import REFUSALS, AttemptOutcome, JobState, Lane, PausePolicy, Reason
from common.ledger.transitions import SAID, Attempt, Transition, Unless, move, transition


def _loses(condition: str, counter: str, by: str, outcome: AttemptOutcome) -> Transition:
    """running → pending, or → quarantined once the counter reaches its limit. Which of them was to blame is not known:
    each is isolated from now on."""
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


#: A job is only blamed for a crash that happened while it ran alone.
_CRASH = _loses(
    "jobs.worker LIKE :worker",
    "crashes",
    "(jobs.alone OR (SELECT count(*) FROM held) = 1)::int",
    AttemptOutcome.CRASHED,
)

_EXPIRE = _loses("jobs.lease_until < clock_timestamp()", "lost_leases", "1", AttemptOutcome.LEASE_EXPIRED)


def report_crash(session: Session, worker: str, *, max_crashes: int) -> int:
    """The process that ran these jobs died: running → pending, or → quarantined.

    `worker` is a LIKE pattern of `jobs.worker`. A job is only blamed for a crash that happened while it ran
    alone; from its first crash on it is isolated.
    """
    said = {"reason": Reason.CRASHED.value, "detail": "the worker process died while it ran this job"}
    return len(move(session, _CRASH, {"worker": worker, "limit": max_crashes, **said}))


def recover_expired(session: Session, *, max_lost_leases: int) -> int:
    """running → pending for jobs whose lease ran out, whatever the cause; → quarantined when that happened
    `max_lost_leases` times."""
    said = {"reason": Reason.LEASE_EXPIRED.value, "detail": "the worker stopped renewing its lease"}
    return len(move(session, _EXPIRE, {"limit": max_lost_leases, **said}))


def recover_queued(
    session: Session, *, epoch: str, overdue_seconds: float, empty_lanes: Collection[Lane], lost_seconds: float
) -> int:
    """queued → pending for jobs whose message is lost: sent to a Redis that was wiped since (another epoch), overdue
    although the list that it was put into is empty, or older than any message should get. (A message that was only slow
    is then dropped when it is read.)"""
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
    """quarantined → retry_wait for what a source refused before it was found to refuse everything."""
    refused = {"refusals": list(REFUSALS), "cap": policy.cap_seconds, "max": max_attempts}
    return len(move(session, _REFUSED, refused))


#: Those that ran out of tries are not among them: they were refused in earlier pauses, too.
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
