"""Archives and cameras: a backfill whose parts are killed, and schedulers that are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from tests.chaos.harness import Experiment, Lab, Outcome, Scale
from tests.chaos.workers import counted, right
from tests.photos import jpeg, portrait
from tests.services import Bucket, kill_tree, locate, maskwatch, wait_until

# --- a backfill, killed three times ---

#: A lister that takes its time between batches, so that a kill comes in the middle.
SLOWLY = """
import functools, time
from producer import listing as discover, submit

def slowly(objects, rules, batch={batch}):
    for page in discover.plan_pages(objects, rules, batch={batch}):
        time.sleep(0.5)
        yield page

submit.plan_pages = slowly
"""

#: The same, which moves its cursor before it registers what it has listed.
CURSOR_FIRST = (
    SLOWLY
    + """
from common.catalog import backfills
from common.database.sessions import session_scope

registered = submit.Lister._register

def cursor_first(self, part, page, cursor, counts):
    with session_scope() as session:
        backfills.advance(session, part, cursor, counts)
    time.sleep(2)
    return registered(self, part, page, cursor, counts)

submit.Lister._register = cursor_first
"""
)


def archive(lab: Lab, scale: Scale) -> Outcome:
    """List, dispatch and analyse an archive, and kill each of the three in the middle of it."""
    objects, batch = (20_000, 2_000) if scale is Scale.FULL else (200, 40)
    os.environ["MASKWATCH_WORKER__GROUP_SIZE"] = "16"
    bucket = lab.bucket()
    lab.put(bucket, objects)
    locate()
    with ExitStack() as exits:
        exits.enter_context(lab.running("aggregator"))
        producer = exits.enter_context(lab.running("producer"))
        worker = exits.enter_context(lab.running("worker"))
        exits.enter_context(lab.running("worker"))
        kill_in_the_middle(lab, bucket, SLOWLY.format(batch=batch), batch)
        resumed = lister(lab, bucket, SLOWLY.format(batch=batch))
        for victim, command, share in ((producer, "producer", 0.2), (worker, "worker", 0.5)):
            wanted = int(objects * share)
            wait_until(lambda: lab.states().get("succeeded", 0) >= wanted, seconds=1200, what=f"{wanted} done")  # noqa: B023
            kill_tree(victim)
            exits.enter_context(lab.running(command))
        assert resumed.wait(300) == 0, "the listing that was taken up did not end"
        lab.wait_until_done(objects, seconds=2400)
    figures = {
        "objects": objects,
        "kills": 3,
        "backfills": lab.scalar("SELECT count(*) FROM backfills"),
        "listed twice": lab.scalar("SELECT coalesce(sum((counts ->> 'listed')::int), 0) FROM backfills") - objects,
        **counted(lab, objects),
    }
    lab.empty()
    control = {"not registered": cursor_first(lab, bucket, objects, batch)}
    held = right(figures) and figures["backfills"] == 1 and figures["listed twice"] == 0
    return Outcome(figures, control, held, control["not registered"] > 0)


def lister(lab: Lab, bucket: Bucket, fault: str) -> subprocess.Popen[bytes]:
    """`maskwatch backfill`, with this fault in it."""
    return subprocess.Popen(
        [sys.executable, "-m", "common.cli", "backfill", bucket.uri, "--location", "lobby", "--threads", "1"],
        env={**os.environ, **lab.injected(fault)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_in_the_middle(lab: Lab, bucket: Bucket, fault: str, batch: int) -> None:
    """Kill a listing when its first batch has been registered."""
    process = lister(lab, bucket, fault)
    try:
        wait_until(lambda: lab.scalar("SELECT count(*) FROM jobs") >= batch, seconds=180, what="the first batch")
        assert process.poll() is None, "the listing ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def cursor_first(lab: Lab, bucket: Bucket, objects: int, batch: int) -> int:
    """The same kill of a lister that moves its cursor first; how many objects nobody ever registers."""
    locate()
    fault = CURSOR_FIRST.format(batch=batch)
    process = lister(lab, bucket, fault)
    moved = "SELECT count(*) FROM backfill_parts WHERE cursor IS NOT NULL"
    try:
        wait_until(lambda: lab.scalar(moved), seconds=180, what="a cursor that moved")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lister(lab, bucket, fault).wait(600) == 0
    return objects - int(lab.scalar("SELECT count(*) FROM jobs"))


# --- slots, with two schedulers that are killed ---

#: A scheduler that remembers by itself when it ran, as a beat does.
BY_HEART = """
import time
from producer import cameras
from common.database.sessions import session_scope
from sqlalchemy import text

due = []

def tick(settings):
    now = time.time()
    due[:] = due or [int(now) + 1]
    with session_scope() as session:
        while due[0] <= now:
            session.execute(text("INSERT INTO ticks (slot) VALUES (:slot)"), {"slot": due[0]})
            due[0] += 1
    return []

cameras.tick = tick
"""


def schedule(lab: Lab, scale: Scale) -> Outcome:
    """Two schedulers poll a camera every second, and one of them is killed again and again."""
    slots, control_slots = (200, 20) if scale is Scale.FULL else (15, 6)
    os.environ["MASKWATCH_DISPATCH__POLL_SECONDS"] = "0.3"
    os.environ["MASKWATCH_DISPATCH__POLL_LEASE_SECONDS"] = "3"
    bucket = lab.bucket()
    locate()
    added = maskwatch(
        "cameras", "add", "cam", "--location", "lobby", "--source", f"{bucket.uri}/cam/", "--every", "1s",
        "--time-pattern", "cam/%Y-%m-%dT%H%M%S*", "--look-back", "10m", "--full-scan", "5s",
    )  # fmt: skip
    assert added.returncode == 0, added.stderr
    now = datetime.now(UTC)
    put = late = 0
    with ExitStack() as exits:
        producers = [exits.enter_context(lab.running("producer")) for _ in range(2)]
        begin = lab.scalar("SELECT scheduled_since FROM cameras")
        kills = 0
        while lab.scalar("SELECT count(*) FROM camera_slots") < slots:
            # Each of its own time; one in three comes a day late.
            seen = now - timedelta(seconds=put, days=put % 3 == 2)
            bucket.put(f"{seen:cam/%Y-%m-%dT%H%M%S}-{put}.jpg", jpeg(portrait(64), comment=str(put).encode()))
            put, late = put + 1, late + (put % 3 == 2)
            time.sleep(lab.random.uniform(0.5, 2))
            if lab.random.random() < 0.3:
                victim = lab.random.randrange(2)
                kill_tree(producers[victim])
                producers[victim] = exits.enter_context(lab.running("producer"))
                kills += 1
        # Leases of polls that were killed run out, and a full scan finds what came late.
        end = lab.scalar("SELECT clock_timestamp()")
        known = "SELECT count(*) FROM media_objects"
        # Noted down up to then, and ended.
        ended = "SELECT max(slot) > :end AND NOT bool_or(finished_at IS NULL AND slot <= :end) FROM camera_slots"
        wait_until(lambda: lab.scalar(known) == put and lab.scalar(ended, end=end), seconds=400, what="every slot")
    figures: dict[str, Any] = {
        "slots": lab.scalar("SELECT count(*) FROM camera_slots WHERE slot <= :end", end=end),
        "kills of a scheduler": kills,
        "missed": lab.scalar(
            "SELECT count(*) FROM generate_series(CAST(:begin AS timestamptz), CAST(:end AS timestamptz), '1 second')"
            " AS due WHERE NOT EXISTS (SELECT FROM camera_slots WHERE slot = due AND finished_at IS NOT NULL)",
            begin=begin,
            end=end,
        ),
        "doubled": lab.scalar("SELECT count(*) FROM camera_slots WHERE looks > 1"),
        "objects": put,
        "of them a day late": late,
        "not found": put - lab.scalar(known),
    }
    control = by_heart(lab, control_slots)
    held = figures["missed"] == figures["doubled"] == figures["not found"] == 0 and kills > 0
    return Outcome(figures, control, held, control["doubled"] > 0)


def by_heart(lab: Lab, slots: int) -> dict[str, int]:
    """Two schedulers that remember by heart."""
    with lab.engine.begin() as connection:
        connection.execute(text("CREATE TABLE ticks (slot bigint)"))
    env = lab.injected(BY_HEART)
    with lab.running("producer", env=env), lab.running("producer", env=env):
        wait_until(lambda: lab.scalar("SELECT count(DISTINCT slot) FROM ticks") >= slots, seconds=180, what="ticks")
    doubled = "SELECT count(*) FROM (SELECT slot FROM ticks GROUP BY slot HAVING count(*) > 1) AS each"
    return {"slots": slots, "doubled": lab.scalar(doubled)}


EXPERIMENTS = (
    Experiment(
        "archive",
        "a backfill whose lister, dispatcher and worker are killed is done once, all of it",
        "a lister that moves its cursor before it registers",
        archive,
    ),
    Experiment(
        "schedule",
        "two schedulers, killed again and again, poll a camera once for every slot, and find what is late",
        "schedulers that remember by themselves",
        schedule,
    ),
)
