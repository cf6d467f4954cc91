"""Whether the ledger grows with what it has done: the time to cancel a large backfill, and the room of jobs that are
done over and over.

The claims: a job of a backfill of 200,000 is cancelled in at most 1.3 times the time that one of 50,000 takes; `jobs`
with its indexes takes at most 1.5 times as much room after ten passes of 200,000 jobs as after one, with the settings
that the migrations give and no VACUUM by hand.

    python -m benchmarks.ledger_size [--cancel 50000 --cancel 200000] [--rounds 3] [--jobs 200000] [--passes 10]
        [--pause 60] [--json]
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
from sqlalchemy import text

from benchmarks.dispatch import autocommit, begin_backfills, fill

#: Jobs that are claimed and ended in a transaction, and that are begun anew in one: more than a worker takes (16), so
#: that a pass takes a minute and not three. A dead row is one, whatever else dies in its transaction.
CLAIMED_AT_ONCE, RERUN_AT_ONCE = 256, 5000

ROOM = "SELECT pg_total_relation_size('jobs') / 1048576.0"

VACUUMS = """
SELECT autovacuum_count
FROM pg_stat_user_tables
WHERE relname = 'jobs'
"""


@click.command()
@click.option(
    "--cancel", "sizes", type=int, multiple=True, default=(50_000, 200_000), show_default=True, help="Jobs cancelled."
)
@click.option("--rounds", default=3, show_default=True, help="Of cancelling; the median counts.")
@click.option("--jobs", default=200_000, show_default=True, help="Jobs of a pass.")
@click.option("--passes", default=10, show_default=True)
@click.option(
    "--pause",
    default=60.0,
    show_default=True,
    help="Seconds between two passes. Autovacuum looks at a table once a minute (autovacuum_naptime). A deployment "
    "takes hours for a pass; this one takes a minute, so that without a pause it would hardly get its turn.",
)
@click.option("--json", "as_json", is_flag=True)
def main(sizes: tuple[int, ...], rounds: int, jobs: int, passes: int, pause: float, as_json: bool) -> None:
    """Cancel backfills of several sizes; then do the same jobs over and over."""
    folder = Path(tempfile.mkdtemp(prefix="maskwatch-bench-"))
    try:
        os.environ["MASKWATCH_STATE_DIR"] = str(folder / "cancelled")
        result = measure_cancelling(sorted(sizes), rounds)
        os.environ["MASKWATCH_STATE_DIR"] = str(folder / "passes")
        result |= measure_room(jobs, passes, pause)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for size, seconds in result["cancelled"].items():
        print(f"{size:>9,} jobs cancelled in {seconds:.1f} s, {1e6 * seconds / size:.0f} µs a job")
    print(f"a job of the largest against one of the smallest: {result['cancel_ratio']:.2f} (the claim: 1.3)")
    for number, (room, vacuums) in enumerate(zip(result["room_mib"], result["vacuums"], strict=True)):
        when = f"after pass {number}" if number else "as registered"
        print(f"{when:<14} {room:6.1f} MiB, {vacuums} autovacuums so far")
    print(f"room after {passes} passes against one: {result['room_ratio']:.2f} (the claim: 1.5)")


def measure_cancelling(sizes: list[int], rounds: int) -> dict:  # type: ignore[type-arg]
    """Seconds that it takes to cancel all jobs of a backfill, by the number of its jobs; pending ones."""
    from common.cli.parts.deployment import deployment

    took: dict[int, list[float]] = {size: [] for size in sizes}
    with deployment() as settings, autocommit() as connection:
        begin_backfills(settings, rounds * len(sizes))
        first = 0
        # In turn, so that a ledger that grows weighs on all.
        for backfill, size in enumerate(sizes * rounds, start=1):
            fill(connection, range(first, first + size), state="pending", backfill=backfill)
            first += size
            connection.execute(text("ANALYZE jobs"))
            # What was written to fill it is not written meanwhile.
            connection.execute(text("CHECKPOINT"))
            took[size].append(cancel(backfill, size))
    cancelled = {size: statistics.median(seconds) for size, seconds in took.items()}
    smallest, largest = (cancelled[size] / size for size in (sizes[0], sizes[-1]))
    return {"cancelled": cancelled, "cancel_ratio": largest / smallest}


def cancel(backfill: int, jobs: int) -> float:
    """Cancel a backfill as its command does; returns the seconds that it took."""
    from common.catalog import backfills
    from common.database.sessions import session_scope

    began = time.perf_counter()
    with session_scope() as session:
        backfills.stop(session, backfill, by="benchmark")
    cancelled = 0
    while True:
        with session_scope() as session:
            some = backfills.cancel_some(session, backfill, by="benchmark")
        if not some:
            break
        cancelled += len(some)
    seconds = time.perf_counter() - began
    assert cancelled == jobs, f"{cancelled} of {jobs} jobs were cancelled"
    return seconds


def measure_room(jobs: int, passes: int, pause: float) -> dict:  # type: ignore[type-arg]
    """The room of `jobs` with its indexes when jobs are registered and when each pass ends, and how many autovacuums
    there were until then."""
    from common.cli.parts.deployment import deployment

    with deployment() as settings, autocommit() as connection:
        begin_backfills(settings, 1)
        fill(connection, range(jobs), state="pending", backfill=1)
        connection.execute(text("ANALYZE"))
        room = [float(connection.execute(text(ROOM)).scalar_one())]
        vacuums = [int(connection.execute(text(VACUUMS)).scalar_one())]
        for number in range(passes):
            if number:
                time.sleep(pause)
                rerun_all()
            done = do_all()
            assert done == jobs, f"{done} of {jobs} jobs were done"
            room.append(float(connection.execute(text(ROOM)).scalar_one()))
            vacuums.append(int(connection.execute(text(VACUUMS)).scalar_one()))
    return {"room_mib": room, "vacuums": vacuums, "room_ratio": room[-1] / room[1]}


def do_all() -> int:
    """pending → queued → running → succeeded, for all there are; returns how many."""
    from common import ledger
    from common.database.sessions import session_scope
    from common.domain import Lane

    done = 0
    while True:
        with session_scope() as session:
            feeds = ledger.feeds_with_work(session)[Lane.BACKFILL]
            to = ledger.Dispatch(Lane.BACKFILL, "e", message_size=16)
            # As many as an empty Redis gets at once.
            sent = ledger.take_pending(session, feeds, to, lane=Lane.BACKFILL, limit=1024)
        if not sent:
            return done
        for start in range(0, len(sent), CLAIMED_AT_ONCE):
            refs = [job.ref for job in sent[start : start + CLAIMED_AT_ONCE]]
            with session_scope() as session:
                claimed = ledger.claim(session, refs, worker="w/1", lease_seconds=60)
            with session_scope() as session:
                ledger.succeed_all(session, [(job, job.observed_at) for job in claimed if job.observed_at])
            done += len(claimed)


def rerun_all() -> None:
    """succeeded → pending, for all there are."""
    from common import ledger
    from common.database.sessions import session_scope

    with session_scope() as session:
        ids = session.execute(text("SELECT id FROM jobs WHERE state = 'succeeded' ORDER BY id")).scalars().all()
    for start in range(0, len(ids), RERUN_AT_ONCE):
        with session_scope() as session:
            ledger.rerun(session, ids[start : start + RERUN_AT_ONCE], by="benchmark")


if __name__ == "__main__":
    main()
