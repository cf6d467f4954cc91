"""The states of a job and the moves between them, as data. `transitions` builds statements only for these moves;
docs/ledger.md is made from them (`python -m common.ledger`).

The states themselves are `domain.JobState`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.domain import ACTIVE_STATES, JobState

#: What each state means to a person who looks at a job.
MEANING: Mapping[JobState, str] = {
    JobState.PENDING: "to be sent",
    JobState.QUEUED: "a message with the job's id and token is on its way to a worker",
    JobState.RUNNING: "a worker holds the lease and the token",
    JobState.RETRY_WAIT: "waits after a transient error, for an archived object to be restored, or for a newer version"
    " of Maskwatch; pending again at `next_run_at`",
    JobState.SUCCEEDED: "final: its faces, frame counts and dirty marks were written in the same transaction",
    JobState.QUARANTINED: "needs a person; `reason` and `detail` say why",
    JobState.SOURCE_CHANGED: "the object was replaced after it was planned; the new version has a job of its own",
    JobState.CANCELLED: "cancelled by an operator, or replaced by a newer version of the key",
}

#: States that a job leaves only through an operator, other bytes, or a correction.
FINAL_STATES = frozenset(set(JobState) - set(ACTIVE_STATES))

#: The columns that are filled while a job is in a state, and only then. A move clears those of the state it leaves.
HOLDS: Mapping[JobState, tuple[str, ...]] = {
    JobState.PENDING: (),
    JobState.QUEUED: ("epoch", "sent_lane"),
    JobState.RUNNING: ("lease_until", "worker"),
    JobState.RETRY_WAIT: ("next_run_at",),
    **dict.fromkeys(FINAL_STATES, ("finished_at",)),
}


@dataclass(frozen=True, slots=True)
class Move:
    """A move of a job from one state to another, and when it happens."""

    old: JobState
    new: JobState
    when: str


def _moves(old: JobState, **moves: str) -> tuple[Move, ...]:
    return tuple(Move(old, JobState(new), when) for new, when in moves.items())


_WITHDRAWN = "a newer version of the key is registered, or a correction makes a new plan"
_ANEW = "bytes that were replaced are back, or a new pattern can place the object in time"

MOVES: tuple[Move, ...] = (
    *_moves(
        JobState.PENDING,
        queued="the dispatcher sends it; published after the commit",
        cancelled=f"an operator cancels it or its backfill; {_WITHDRAWN}",
    ),
    *_moves(
        JobState.QUEUED,
        queued="the dispatcher sends it again, ahead of live footage: the first message is dropped when it is read",
        pending="its message is lost (another epoch, overdue although its list is empty, or older than any should get);"
        " the dispatcher recalls it, so that feeds take turns; its location or camera is corrected",
        running="a worker claims it: compare-and-set on id, token and state",
        cancelled=f"an operator cancels it or its backfill; {_WITHDRAWN}",
    ),
    *_moves(
        JobState.RUNNING,
        succeeded="its worker commits its rows in the same transaction",
        retry_wait="a transient error, a paused source, an archived object whose restore was requested, or a pipeline"
        " that only a newer version knows",
        quarantined="a permanent error, or too many transient errors, crashes or lost leases",
        source_changed="the object is no longer the one that was planned",
        pending="its worker gives it back; its process died, or its lease ran out (it is then isolated: sent in a"
        " message of its own); its location or camera is corrected",
        cancelled=f"an operator cancels it or its backfill; {_WITHDRAWN}",
    ),
    *_moves(
        JobState.RETRY_WAIT,
        pending="it is due; the archived object that it waits for is listed as restored",
        cancelled=f"an operator cancels it or its backfill; {_WITHDRAWN}",
    ),
    *_moves(
        JobState.SUCCEEDED,
        pending="an operator reruns it, or a correction would split its hours: its rows are deleted",
        cancelled=f"{_WITHDRAWN}: its rows are deleted",
    ),
    *_moves(
        JobState.QUARANTINED,
        pending="an operator retries it; its object now has a time, or is out of the archive",
        retry_wait="its source refused everything and was paused; S3 was asked to restore the object",
        cancelled=_WITHDRAWN,
    ),
    *_moves(
        JobState.SOURCE_CHANGED,
        pending=f"{_ANEW}; a video is planned again",
    ),
    *_moves(
        JobState.CANCELLED,
        pending=f"an operator retries it; another backfill finds its object; {_ANEW}; a video is planned again",
        quarantined="a correction leaves its object without a time",
        cancelled="a newer version of the key replaces a job that an operator had cancelled: only the reason changes",
    ),
)

#: What `transitions` builds statements for.
LISTED = frozenset((move.old, move.new) for move in MOVES)


def as_markdown() -> str:
    """The tables of docs/ledger.md."""
    lines = ["| state | meaning | columns that are filled in it |", "|---|---|---|"]
    for state, meaning in MEANING.items():
        held = ", ".join(f"`{column}`" for column in HOLDS[state])
        lines.append(f"| `{state}` | {meaning} | {held} |")
    lines += ["", "| from | to | when |", "|---|---|---|"]
    lines += [f"| `{move.old}` | `{move.new}` | {move.when} |" for move in MOVES]
    return "\n".join(lines) + "\n"
