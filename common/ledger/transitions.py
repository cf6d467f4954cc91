"""The one builder of the statements that move jobs. Nothing else writes a job's state, token or attempt.

A transition is one statement, for any number of jobs. It locks the chosen jobs that are in one of its old states, in
the order of their ids, moves them, clears the columns of the old state (`states.HOLDS`), and records in `job_attempts`
how a running attempt ended. It always changes the token. Building a transition for a move that `states.MOVES` does not
list is an error at import.

`RENEW` is the one write that keeps the token: a heartbeat.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import dedent, indent
from typing import Any

from sqlalchemy import CursorResult, Row
from sqlalchemy.orm import Session

from common.database.sessions import sql
from common.domain import AttemptOutcome, JobRef, JobState
from common.ledger.states import FINAL_STATES, HOLDS, LISTED


class StaleJobError(Exception):
    """The job is no longer this worker's: its token or state has changed. Nothing may be written."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A statement that moves jobs. `columns`: the names of its result's columns, or none; `parameters` are bound in
    each execution."""

    statement: str
    columns: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unless:
    """A job for which this SQL condition holds goes to another state."""

    condition: str
    new: JobState


@dataclass(frozen=True, slots=True)
class Attempt:
    """How the running attempt that a transition ends is recorded. `reason` and `detail` are SQL."""

    outcome: AttemptOutcome
    reason: str = "NULL"
    detail: str = "NULL"


#: Back to the start, as if the job had never been tried.
ANEW: Mapping[str, str] = {
    "failures": "0",
    "crashes": "0",
    "lost_leases": "0",
    "alone": "false",
    "reason": "NULL",
    "detail": "NULL",
}

#: Why a job is in its state, as parameters.
SAID: Mapping[str, str] = {"reason": ":reason", "detail": ":detail"}


def transition(
    old: Collection[JobState],
    new: JobState,
    chosen: str,
    *,
    sets: Mapping[str, str] | None = None,
    unless: Unless | None = None,
    attempt: Attempt | None = None,
    before: str = "",
    keep: Sequence[str] = (),
    skip_locked: bool = False,
    by_key: bool = False,
    limit: str = "",
    returning: Sequence[str] = ("id",),
    after: str = "",
    select: str = "SELECT id FROM moved ORDER BY id",
    columns: Sequence[str] = (),
    counted: bool = False,
    one: bool = False,
) -> Transition:
    """The statement that moves the chosen jobs from one of the old states to the new one.

    chosen: `FROM jobs ... WHERE ...`, to which the states are added. before, after: common table expressions before
    `chosen`, and after `moved`, which has the columns `returning` of the moved jobs. sets: columns and their new
    values, in SQL. unless: jobs that go to another state. attempt: how the end of a running attempt is recorded. keep:
    columns of `chosen` that `sets` and `select` find in `held`. skip_locked: skip jobs that another transaction has
    locked. by_key: the state is a parameter, so that no plan uses the index of all jobs in that state (ADR 11). limit:
    a clause such as ` LIMIT 1`. counted: the statement selects nothing, and its number of rows is that of the moved
    jobs, which is cheaper (`count_moved`); only where every moved job was running. one: `chosen` finds at most one job,
    so it need not be put in order.
    """
    new_states = {new} | ({unless.new} if unless else set())
    _check(old, new_states, attempt, counted=counted)
    names = ", ".join(f"'{state}'" for state in sorted(old))
    states = "jobs.state = :was" if by_key else f"jobs.state IN ({names})"
    kept = "".join(f", {column}" for column in keep)
    in_order = "" if one else f"    ORDER BY jobs.id{limit}\n"
    expressions = [
        _clean(before),
        f"held AS (\n"
        f"    SELECT jobs.id, jobs.state, jobs.attempt, jobs.worker, jobs.started_at{kept}\n"
        f"{indent(_clean(chosen), '    ')} AND {states}\n"
        f"{in_order}    FOR UPDATE OF jobs{' SKIP LOCKED' if skip_locked else ''}\n"
        f")",
        f"moved AS (\n"
        f"    UPDATE jobs\n"
        f"    SET {assignments(old, new, sets or {}, unless)}\n"
        f"    FROM held\n"
        f"    WHERE jobs.id = held.id\n"
        f"    RETURNING {', '.join(f'jobs.{column}' for column in returning)}\n"
        f")",
        _clean(after),
    ]
    if attempt and counted:
        end = _told(attempt, old)
    else:
        expressions.append(f"told AS (\n{indent(_told(attempt, old), '    ')}\n)" if attempt else "")
        end = _clean(select)
    statement = "WITH " + ", ".join(part for part in expressions if part) + "\n" + end
    if not by_key:
        return Transition(statement, tuple(columns))
    (was,) = old
    return Transition(statement, tuple(columns), {"was": was.value})


def _check(old: Collection[JobState], new: Collection[JobState], attempt: Attempt | None, *, counted: bool) -> None:
    unlisted = {(before, after) for before in old for after in new} - LISTED
    if unlisted:
        pairs = ", ".join(f"{before} to {after}" for before, after in sorted(unlisted))
        raise ValueError(f"no job may go from {pairs}: see states.MOVES")
    if (JobState.RUNNING in old) != (attempt is not None):
        raise ValueError("a transition needs `attempt` if it ends running attempts, and only then")
    if counted and set(old) != {JobState.RUNNING}:
        raise ValueError("a transition can be `counted` only if every job was running")


def assignments(old: Collection[JobState], new: JobState, sets: Mapping[str, str], unless: Unless | None = None) -> str:
    """The assignments of `UPDATE jobs SET`: the new state and token, NULL for the old states' columns, and `sets`."""
    values = {"state": f"'{new}'", "token": "gen_random_uuid()"}
    if unless:
        values["state"] = f"CASE WHEN {unless.condition} THEN '{unless.new}' ELSE '{new}' END"
    values |= {column: "NULL" for state in sorted(old) for column in HOLDS[state]}
    if new in FINAL_STATES:
        values["finished_at"] = "clock_timestamp()"
    elif unless and unless.new in FINAL_STATES:
        values["finished_at"] = f"CASE WHEN {unless.condition} THEN clock_timestamp() END"
    values |= sets
    return ",\n        ".join(f"{column} = {value}" for column, value in values.items())


def _told(attempt: Attempt, old: Collection[JobState]) -> str:
    """Records the attempts of the moved jobs that were running."""
    some = f"\nWHERE held.state = '{JobState.RUNNING}'" if set(old) != {JobState.RUNNING} else ""
    return (
        "INSERT INTO job_attempts (job_id, attempt, outcome, worker, started_at, reason, detail)\n"
        f"SELECT held.id, held.attempt, '{attempt.outcome}', held.worker, held.started_at,"
        f" {attempt.reason}, {attempt.detail}\n"
        "FROM held\n"
        f"JOIN moved ON moved.id = held.id{some}"
    )


def _clean(part: str) -> str:
    return dedent(part).strip()


def move(session: Session, what: Transition, parameters: Mapping[str, Any]) -> Sequence[Row[Any]]:
    """Execute a transition; returns what it selects, by default the ids of the jobs that moved."""
    return session.execute(sql(what.statement, *what.columns), {**parameters, **what.parameters}).all()


def count_moved(session: Session, what: Transition, parameters: Mapping[str, Any]) -> int:
    """Execute a transition that is `counted`; returns how many jobs moved."""
    moved = session.execute(sql(what.statement), {**parameters, **what.parameters})
    assert isinstance(moved, CursorResult)
    return moved.rowcount


#: Chooses jobs by id and token; `held_refs` makes the parameters.
SENT = """
FROM jobs
JOIN unnest(CAST(:ids AS bigint[]), CAST(:tokens AS uuid[])) AS sent (id, token) ON jobs.id = sent.id
WHERE jobs.token = sent.token
"""


def held_refs(refs: Sequence[JobRef]) -> dict[str, str]:
    """The parameters of `SENT`."""
    # Arrays as text: for a list, psycopg would look at each element to find its type.
    return {
        "ids": f"{{{','.join(str(ref.id) for ref in refs)}}}",
        "tokens": f"{{{','.join(str(ref.token) for ref in refs)}}}",
    }


#: A heartbeat: renews the leases of jobs that their worker still holds. Keeps the token, because nothing moves.
RENEW = f"""
WITH held AS (
    SELECT jobs.id
    {indent(_clean(SENT), "    ").strip()} AND jobs.state = :running
    ORDER BY jobs.id
    FOR UPDATE OF jobs
)
UPDATE jobs
SET lease_until = clock_timestamp() + make_interval(secs => :lease)
FROM held
WHERE jobs.id = held.id
RETURNING jobs.id
"""
