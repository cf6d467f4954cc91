"""The faults that the state machine of the ledger must find: each takes one mechanism away, as a mistake would.

They are planted in the statements on their way to Postgres, and in the machine's own actors; the product has no switch
for them. Each is looked for by its harm: rows that are double or wrong, summaries that differ, jobs that are stuck.
"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.chaos.actors import Mutant
from tests.mutants import UNFENCED, Rewrite
from workers.summaries import aggregation

_MARKED = "INSERT INTO dirty_marks"


def _summarize_flags(session: Session, limit: int) -> tuple[int, int]:
    """An aggregator over flags: those that are set are recomputed, then cleared."""
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": aggregation.AGGREGATION_LOCK})
    marks = session.execute(
        text("SELECT id, location_id, pipeline_id, hour FROM dirty_marks ORDER BY id LIMIT :limit"), {"limit": limit}
    ).all()
    if marks:
        aggregation.recompute(session, [(mark.location_id, mark.pipeline_id, mark.hour) for mark in marks])
        session.execute(text("DELETE FROM dirty_marks WHERE id = ANY(:ids)"), {"ids": [mark.id for mark in marks]})
    return len(marks), len(marks)


NO_FENCE = Mutant("no fence", rewrites=UNFENCED, by_harm=True)

#: A worker's writes compare the token only, and a withdrawn job keeps its token.
STALE_TOKEN = Mutant(
    "a token that outlives a cancel",
    rewrites=(
        Rewrite("INSERT INTO job_attempts", r"(SET state = 'cancelled'),\s+token = gen_random_uuid\(\)", r"\1"),
        Rewrite("WITH held AS", r"(jobs\.token = %\(token\)s(::UUID)?) AND jobs\.state = %\(was\)s(::VARCHAR)?", r"\1"),
    ),
    by_harm=True,
)

#: A job that a worker gives back keeps its token. Dispatch changes it before anybody could do harm with it, so this is
#: found by the table of moves.
KEPT_TOKEN = Mutant(
    "a transition that keeps the token",
    rewrites=(Rewrite("'released'", r"(SET state = 'pending'),\s+token = gen_random_uuid\(\)", r"\1"),),
)

#: A flag per hour that is there or not, which writers set if it isn't.
UPSERTED_MARKS = Mutant(
    "upserted marks",
    rewrites=(
        Rewrite(_MARKED, r"(?s)(INSERT INTO dirty_marks.*?\sFROM (?:counted|gone))\b", r"\1 ON CONFLICT DO NOTHING"),
    ),
    before=("CREATE UNIQUE INDEX planted ON dirty_marks (location_id, pipeline_id, hour)",),
    after=("DROP INDEX planted",),
    summarize=_summarize_flags,
    by_harm=True,
)

#: What the schema says of the oldest version is not heeded: `actors.summarize_outdated` counts as an old one would.
OUTDATED_AGGREGATOR = Mutant(
    "an aggregator of a version that may not go on",
    rewrites=(Rewrite("FROM oldest_versions", r"SELECT version", "SELECT '0.0.0' AS version"),),
    by_harm=True,
)

#: Two aggregators side by side share the marks instead of waiting for each other.
NO_LOCK = Mutant(
    "aggregators without the lock",
    rewrites=(
        Rewrite(str(aggregation.AGGREGATION_LOCK), r"pg_advisory_xact_lock\((.*)\)", r"\1"),
        Rewrite(
            "DELETE FROM dirty_marks", r"ORDER BY id LIMIT (\S+)\)", r"ORDER BY id LIMIT \1 FOR UPDATE SKIP LOCKED)"
        ),
    ),
    by_harm=True,
)

#: Found by the stuck job; the rule for overdue messages would recover it, so it is taken away with it.
PUBLISHED_EARLY = Mutant("publish before commit", published_early=True, overdue=False, by_harm=True)

#: Not a fault: without that rule, and without messages that are lost, nothing is stuck as long as commits come first.
PUBLISHED_LATE = Mutant("publish after commit", overdue=False)

MUTANTS = (NO_FENCE, STALE_TOKEN, KEPT_TOKEN, UPSERTED_MARKS, NO_LOCK, OUTDATED_AGGREGATOR, PUBLISHED_EARLY)

#: Those for which `make test` has time.
QUICKLY_FOUND = (NO_FENCE, PUBLISHED_EARLY)
