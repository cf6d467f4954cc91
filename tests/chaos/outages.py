"""Services that go away, stop for a while, lie or stand in each other's way: Redis, Postgres, S3, and a second one of
everything that runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from typing import Any

import numpy as np
import psutil
from PIL import Image
from redis import Redis
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.messaging.queues import Queue, queue_length
from tests.aggregators import Batch, batch_without_the_lock, overtake
from tests.chaos.harness import Experiment, Lab, Outcome, Scale, percentile
from tests.faults import Fault, faulty_s3
from tests.photos import jpeg, portrait
from tests.services import Bucket, wait_until
from tests.videos import make_video
from workers.summaries.aggregation import summarize_batch

PROCESSES = ("producer", "aggregator", "worker")


# --- Redis ------------------------------------------------------------------------------------------------

#: Everything of the reconciler but this: jobs whose message was lost stay where they are.
NO_RECOVERY = """
from common import ledger
ledger.recover_queued = lambda session, **condition: 0
"""


#: The lab's own are quicker; how long it takes until work resumes is a figure of these.
AS_SHIPPED = {
    "MASKWATCH_DISPATCH__INTERVAL_SECONDS": "1",
    "MASKWATCH_DISPATCH__RECONCILE_SECONDS": "5",
    "MASKWATCH_LEDGER__OVERDUE_SECONDS": "30",
    "MASKWATCH_LEDGER__LEASE_SECONDS": "60",
    "MASKWATCH_BROKER__SOCKET_TIMEOUT_SECONDS": "10",
}


def redis(lab: Lab, scale: Scale) -> Outcome:
    """Kill, freeze and wipe Redis while jobs are under way."""
    full = scale is Scale.FULL
    count = 2000 if full else 120
    events = ["kill"] * (5 if full else 1) + ["wipe"] + ["freeze"] * full
    lab.random.shuffle(events)
    bucket = lab.bucket()
    lab.put(bucket, count)
    resumed = []
    with lab.processes(*PROCESSES, env=AS_SHIPPED if full else None):
        lab.backfill(bucket)
        for number, event in enumerate(events):
            until_succeeded(lab, count * (number + 1) // (len(events) + 2))
            back_at = REDIS_EVENTS[event](lab)
            # A frozen Redis keeps its messages, and what is sent later waits behind them.
            resumed.append(until_work_resumes(lab, back_at, "started_at" if event == "freeze" else "queued_at"))
        lab.wait_until_done(count, seconds=900)
    late = percentile(resumed, 0.95)
    figures = {
        "jobs": count,
        "kills": events.count("kill"),
        "freezes": events.count("freeze"),
        "wipes": events.count("wipe"),
        **counted(lab, count),
        "s until work resumed (95 %)": late,
        "s at most": max(resumed),
    }
    held = right(figures) and late < RESUME_SECONDS

    lab.empty()
    few = 80
    bucket = lab.bucket("few")
    lab.put(bucket, few)
    with lab.processes(*PROCESSES, env=lab.injected(NO_RECOVERY)):
        lab.backfill(bucket)
        until_succeeded(lab, few // 8)
        kill_redis(lab)
        stuck = wait_until(lambda: stuck_in_queue(lab), seconds=180, what="a standstill")
    return Outcome(figures, {"jobs queued for ever": stuck}, held, stuck > 0)


#: What is promised at most for the 95th percentile.
RESUME_SECONDS = 10.0


def until_succeeded(lab: Lab, count: int, *, seconds: float = 600) -> None:
    """Wait until at least this many jobs have succeeded."""
    wait_until(lambda: lab.states().get("succeeded", 0) >= count, seconds=seconds, what=f"success of {count} jobs")


def until_work_resumes(lab: Lab, back_at: Any, since: str) -> float:
    """Seconds from an instant of the database's clock until a job had succeeded that was also sent (`queued_at`) or
    taken from its queue (`started_at`) after it."""
    query = f"SELECT extract(epoch FROM min(finished_at) - :at) FROM jobs WHERE state = 'succeeded' AND {since} > :at"
    wait_until(lambda: lab.scalar(query, at=back_at) is not None, seconds=180, what="work after the outage")
    return float(lab.scalar(query, at=back_at))


def kill_redis(lab: Lab) -> Any:
    """Kill -9, and start it again after a while, empty. When it was back, by the database's clock."""
    os.kill(lab.pid_of("redis"), signal.SIGKILL)
    time.sleep(lab.random.uniform(0, 8))
    lab.stack.up()
    return lab.scalar("SELECT clock_timestamp()")


def freeze_redis(lab: Lab) -> Any:
    """Stop it for longer than anybody waits for its answers. When it went on, by the database's clock."""
    pid = lab.pid_of("redis")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(15)
    os.kill(pid, signal.SIGCONT)
    return lab.scalar("SELECT clock_timestamp()")


def wipe_redis(lab: Lab) -> Any:
    """FLUSHALL. When it was done, by the database's clock."""
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        client.flushall()
    return lab.scalar("SELECT clock_timestamp()")


REDIS_EVENTS: dict[str, Callable[[Lab], Any]] = {"kill": kill_redis, "freeze": freeze_redis, "wipe": wipe_redis}


def stuck_in_queue(lab: Lab) -> int:
    """How many jobs are queued although no message is left and nobody works on anything; 0 while something moves."""
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        if queue_length(client, Queue.MEDIA):
            return 0
    before = lab.states()
    # Longer than the reconciler takes for all that it recovers here.
    time.sleep(10)
    moving = {state for state in ("pending", "running", "retry_wait") if before.get(state)}
    return before.get("queued", 0) if not moving and lab.states() == before else 0


# --- Postgres ---------------------------------------------------------------------------------------------

#: Time passes between the writes of a job, with the control and without, so that outages find their way in between.
SLOW_WRITES = """
import time
from workers.jobs import recording

def late(session, frames, count=recording._count):
    time.sleep(0.2)
    return count(session, frames)

recording._count = late
"""

#: The same writes, each in a transaction of its own.
NO_TRANSACTION = (
    SLOW_WRITES
    + """
from common import ledger
from common.database.sessions import session_scope

def record_images(session, pictures):
    for picture in pictures:
        job, at = picture.job, picture.seen.instant
        with session_scope() as own:
            ledger.succeed(own, job, picture.seen)
        with session_scope() as own:
            recording._count(own, [(job, at, 0.0)])
        with session_scope() as own:
            recording._copy(own, [(job, at, 0.0, face, None) for face in picture.faces])

recording.record_images = record_images
"""
)

#: Pictures of one face that succeeded without their frame and their face, or left some without having succeeded.
HALF_WRITTEN = """
SELECT count(*) FROM (
    SELECT finished_at, (state = 'succeeded')::int AS wanted,
           (SELECT coalesce(sum(frames), 0) FROM frame_counts c WHERE c.job_id = j.id) AS frames,
           (SELECT count(*) FROM faces f WHERE f.job_id = j.id) AS faces
    FROM jobs j WHERE kind = 'image') AS each
WHERE (frames, faces) <> (wanted, wanted)
"""


def postgres(lab: Lab, scale: Scale) -> Outcome:
    """Stop Postgres hard, and freeze it, while jobs are under way."""
    full = scale is Scale.FULL
    count = 400 if full else 60
    events = ["stop"] * (3 if full else 1) + ["freeze"] * full
    lab.random.shuffle(events)
    bucket = lab.bucket()
    lab.put(bucket, count)
    resumed, half = [], 0
    with lab.processes(*PROCESSES, "worker", env=lab.injected(SLOW_WRITES)):
        lab.backfill(bucket)
        for number, event in enumerate(events):
            until_succeeded(lab, count * (number + 1) // (len(events) + 2))
            back_at = stop_postgres(lab, postgres_server(lab)) if event == "stop" else freeze_postgres(lab)
            half += lab.scalar(HALF_WRITTEN)
            # Its messages are still in Redis: perhaps none will be sent any more.
            resumed.append(until_work_resumes(lab, back_at, "started_at"))
        lab.wait_until_done(count, seconds=600)
    figures = {
        "jobs": count,
        "hard stops": events.count("stop"),
        "freezes of 20 s": events.count("freeze"),
        **counted(lab, count),
        "half-written": half + lab.scalar(HALF_WRITTEN),
        "s until work resumed at most": max(resumed),
    }

    lab.empty()
    with lab.processes(*PROCESSES, "worker", env=lab.injected(NO_TRANSACTION)):
        lab.backfill(bucket)
        stops = broken = 0
        while not broken and stops < 8:
            stops += 1
            server = postgres_server(lab)
            wait_until(lambda: lab.scalar(HALF_WRITTEN), what="a job between two of its transactions")
            stop_postgres(lab, server)
            time.sleep(5)
            broken = lab.scalar(f"{HALF_WRITTEN} AND finished_at < clock_timestamp() - interval '5 s'")
    return Outcome(
        figures,
        {"hard stops": stops, "half-written": broken},
        right(figures) and not figures["half-written"],
        broken > 0,
    )


def postgres_server(lab: Lab) -> psutil.Process:
    return psutil.Process(lab.pid_of("postgres"))


def stop_postgres(lab: Lab, server: psutil.Process) -> Any:
    """An immediate shutdown, or kill -9 of the server with all that belongs to it. When it was back, by its clock."""
    if lab.random.random() < 0.5:
        server.send_signal(signal.SIGQUIT)
    else:
        send_to_all(server, signal.SIGKILL)
    gone, _ = psutil.wait_procs([server], 30)
    assert gone, "Postgres did not stop"
    lab.stack.up()
    return lab.scalar("SELECT clock_timestamp()")


def freeze_postgres(lab: Lab) -> Any:
    """Stop all of it for longer than a lease lasts. When it went on, by its clock."""
    server = postgres_server(lab)
    send_to_all(server, signal.SIGSTOP)
    time.sleep(20)
    send_to_all(server, signal.SIGCONT)
    return lab.scalar("SELECT clock_timestamp()")


def send_to_all(server: psutil.Process, number: int) -> None:
    """A signal to the server first, so that it starts no more backends, then to its backends."""
    backends = []
    for process in (server, *server.children()):
        if process != server:
            backends.append(process)
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


# --- S3 ---------------------------------------------------------------------------------------------------

S3_SETTINGS = {
    # Videos of some hundred kB are many blocks then.
    "MASKWATCH_STORAGE__BLOCK_BYTES": "16384",
    "MASKWATCH_WORKER__CHUNK_SECONDS": "2",
    # Every fifth answer is an error, and every tenth body is cut: what we look for is what it does to the results.
    "MASKWATCH_LEDGER__MAX_ATTEMPTS": "30",
}

#: Analysed pictures and chunks: the ETag they count under, their frames, their faces.
ANALYSED = """
SELECT m.key, m.etag, sum(c.frames)::int AS frames,
       (SELECT count(*) FROM faces f WHERE f.job_id = j.id) AS faces
FROM jobs j JOIN media_objects m ON m.id = j.media_object_id JOIN frame_counts c ON c.job_id = j.id
WHERE j.state = 'succeeded' GROUP BY j.id, m.key, m.etag
"""

#: The current version of each key, how many of its jobs succeeded, how many ended with a reason, how many otherwise.
SETTLED = """
SELECT m.key, m.etag, count(*) FILTER (WHERE j.state = 'succeeded' AND j.kind <> 'probe') AS succeeded,
       count(*) FILTER (WHERE j.state = 'quarantined' AND j.reason IS NOT NULL) AS with_reason,
       count(*) FILTER (WHERE j.state NOT IN ('succeeded', 'quarantined')) AS open
FROM media_objects m JOIN jobs j ON j.media_object_id = m.id WHERE m.superseded_at IS NULL GROUP BY m.key, m.etag
"""


@dataclass
class Footage:
    """Keys whose content changes while they are read: each version shows one more face than the one before."""

    bucket: Bucket
    #: Versions of a key, the first to be listed first; a 0: deleted. Version n shows n faces.
    versions: dict[str, list[int]]
    #: How many times a key is read before the next version takes its place.
    patience: dict[str, int]
    lock: threading.Lock = field(default_factory=threading.Lock)
    faces_of: dict[tuple[str, str], int] = field(default_factory=dict)
    replaced: int = 0

    def put(self, key: str, version: int) -> None:
        if not version:
            self.bucket.client.delete_object(Bucket=self.bucket.name, Key=key)
            return
        answer = self.bucket.client.put_object(Bucket=self.bucket.name, Key=key, Body=content(key, version))
        self.faces_of[key, answer["ETag"].strip('"')] = version

    def read(self, key: str) -> None:
        """Called before a key is read: replace it if it is time."""
        with self.lock:
            self.patience[key] -= 1
            if self.patience[key] < 0 and len(self.versions[key]) > 1:
                self.versions[key].pop(0)
                self.put(key, self.versions[key][0])
                self.patience[key] = 1
                self.replaced += 1


@lru_cache
def crowd(faces: int) -> Image.Image:
    """A picture with this many faces, side by side."""
    image = Image.new("RGB", (128 * max(1, faces), 128), (90, 110, 130))
    for number in range(faces):
        image.paste(portrait(128), (128 * number, 0))
    return image


@cache
def content(key: str, faces: int) -> bytes:
    """A picture or a short video with this many faces; no two keys have the same bytes."""
    image = crowd(faces)
    if key.endswith(".jpg"):
        return jpeg(image, comment=key.encode())
    rgb = np.asarray(image)
    return make_video(
        frames=40, size=image.size, gop=1, image=lambda _: rgb, options={"crf": "30"}, metadata={"comment": key}
    )


def s3(lab: Lab, scale: Scale) -> Outcome:
    """Read through a server that replaces objects, cuts bodies, and refuses."""
    full = scale is Scale.FULL
    images, videos = (240, 8) if full else (30, 2)
    as_shipped = read_what_changes(lab, images, videos, unpinned=False)
    lab.empty()
    control = read_what_changes(lab, *((60, 4) if full else (16, 2)), unpinned=True)
    wrong = "results under a wrong ETag"
    return Outcome(
        as_shipped,
        control,
        not as_shipped[wrong] and not as_shipped["silent gaps"] and right(as_shipped),
        control[wrong] > 0,
    )


def read_what_changes(lab: Lab, images: int, videos: int, *, unpinned: bool) -> dict[str, int]:
    """Analyse footage that changes meanwhile, list it once more, and count what is wrong in the end."""
    draw = lab.random
    keys = [f"{number:05}.jpg" for number in range(images)] + [f"{number:05}.mp4" for number in range(videos)]
    # Half of them stay as they are; some come back to what they were, some are deleted. Every video is replaced.
    fates = [[1], [1], [1], [1, 2], [1, 2, 3], [1, 2, 1], [1, 0]]
    versions = {key: list(draw.choice(fates if key.endswith(".jpg") else fates[3:6])) for key in keys}
    reads = {key: 0 if key.endswith(".jpg") else draw.randrange(12) for key in keys}
    footage = Footage(lab.bucket(f"footage-{'un' * unpinned}pinned"), versions, reads)
    for key in keys:
        footage.put(key, 1)
    refused = cut = 0

    def behave(method: str, key: str) -> Fault:
        nonlocal refused, cut
        with footage.lock:
            chance = draw.random()
        if method == "GET":
            footage.read(key)
        if chance < 0.2:
            refused += 1
            return Fault(status=503)
        if method == "GET" and chance < 0.3:
            cut += 1
            return Fault(cut=True)
        return Fault(deaf=unpinned, lies=unpinned)

    with faulty_s3(lab.services.endpoints.s3_endpoint_url, behave) as url:
        env = {**S3_SETTINGS, "MASKWATCH_STORAGE__ENDPOINT_URL": url}
        with lab.processes(*PROCESSES, "worker", env=env):
            lab.backfill(footage.bucket)
            until_idle(lab)
            # Now already: the next listing withdraws the results of what was replaced, right or wrong.
            wrong = wrong_results(lab, footage)
            # What was replaced after it had been read is found by the next listing.
            footage.versions = {key: [0] for key in keys}
            lab.backfill(footage.bucket)
            until_idle(lab)
    return {
        "objects": len(keys),
        "replaced": footage.replaced,
        "answers 503": refused,
        "bodies cut": cut,
        "results under a wrong ETag": wrong + wrong_results(lab, footage),
        "silent gaps": silent_gaps(lab, footage),
        "quarantined": lab.states().get("quarantined", 0),
        "doubled": lab.doubled(),
        "summary difference": lab.summary_difference(),
    }


def wrong_results(lab: Lab, footage: Footage) -> int:
    """Pictures and chunks that show other faces than the version under whose ETag they count."""
    return sum(row.faces != row.frames * footage.faces_of[row.key, row.etag] for row in lab.rows(ANALYSED))


def silent_gaps(lab: Lab, footage: Footage) -> int:
    """Keys whose newest version was neither analysed nor ended with a reason."""
    settled = {row.key: row for row in lab.rows(SETTLED)}
    listed = footage.bucket.client.list_objects_v2(Bucket=footage.bucket.name)
    newest = {entry["Key"]: entry["ETag"].strip('"') for entry in listed["Contents"]}
    gaps = 0
    for key in footage.patience:
        row = settled.get(key)
        if row is None or row.open or not row.succeeded + row.with_reason:
            gaps += 1
        elif key in newest:
            gaps += row.etag != newest[key]
    return gaps


def until_idle(lab: Lab, *, seconds: float = 600) -> None:
    """Wait until no job has anything left to do and the summaries hold it all."""
    active = "SELECT count(*) FROM jobs WHERE state IN ('pending', 'queued', 'running', 'retry_wait')"
    wait_until(
        lambda: lab.scalar(f"SELECT ({active}) + (SELECT count(*) FROM dirty_marks)") == 0,
        seconds=seconds,
        what=f"the end of all jobs (states: {lab.states()})",
    )


# --- two of each ------------------------------------------------------------------------------------------

#: Summaries take their time to write what they have counted, so that two aggregators meet.
SLOW_SUMMARIES = """
CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END $$;
CREATE TRIGGER dawdle BEFORE INSERT ON compliance_hourly FOR EACH ROW EXECUTE FUNCTION dawdle()
"""

SUMMARIES = """
SELECT hour, frames, seconds, faces, with_mask, without_mask, uncertain FROM compliance_hourly ORDER BY hour
"""

HOURS = 40

OVERTAKEN = "summary difference after one aggregator overtook another"


def two_of_each(lab: Lab, scale: Scale) -> Outcome:
    """Analyse the same footage with one of each and with two, and let one aggregator overtake another."""
    count = 400 if scale is Scale.FULL else 60
    bucket = lab.bucket()
    start = datetime(2026, 3, 2, tzinfo=UTC)
    for number in range(count):
        # Neighbours lie in different hours, and all hours are written to until the end.
        at = start + timedelta(hours=number % HOURS, seconds=number)
        bucket.put(f"{at:%Y-%m-%d/%H-%M-%S}.jpg", jpeg(crowd(number % 3), comment=str(number).encode()))
    with lab.engine.begin() as connection:
        connection.execute(text(SLOW_SUMMARIES))
    summaries = []
    for commands in (PROCESSES, PROCESSES * 2):
        lab.empty()
        with lab.processes(*commands):
            lab.backfill(bucket, "--time-pattern", "%Y-%m-%d/%H-%M-%S.jpg")
            lab.wait_until_done(count, seconds=600)
        summaries.append(lab.rows(SUMMARIES))
    figures = {
        "jobs": count,
        "hours": len(summaries[1]),
        **counted(lab, count),
        "hours that differ from one of each": len(set(summaries[0]) ^ set(summaries[1])),
        OVERTAKEN: overtaken(lab, summarize_batch),
    }
    control = overtaken(lab, batch_without_the_lock)
    held = right(figures) and len(summaries[0]) == len(summaries[1]) == min(HOURS, count)
    held = held and summaries[0] == summaries[1] and not figures[OVERTAKEN]
    return Outcome(figures, {OVERTAKEN: control}, held, control > 0)


def overtaken(lab: Lab, batch: Batch) -> int:
    """The summary difference that stays for good when a second aggregator begins while the first one writes."""
    lab.empty()
    with Session(lab.engine, expire_on_commit=False) as session:
        overtake(session, batch)
    return lab.summary_difference()


# --- what all of them promise -----------------------------------------------------------------------------


def counted(lab: Lab, count: int) -> dict[str, int]:
    """What was lost or doubled of `count` pictures, and what the summaries and a full recompute don't share."""
    return {"lost": lab.lost(count), "doubled": lab.doubled(), "summary difference": lab.summary_difference()}


def right(figures: Mapping[str, Any]) -> bool:
    """Whether nothing was lost or doubled, and every hour is summarized right."""
    return not any(figures.get(name) for name in ("lost", "doubled", "summary difference"))


EXPERIMENTS: Sequence[Experiment] = (
    Experiment(
        "redis",
        "Redis killed, frozen and wiped under load loses and doubles nothing",
        "jobs whose message was lost are not recovered",
        redis,
    ),
    Experiment(
        "postgres",
        "Postgres stopped hard and frozen under load loses nothing and leaves no job half-written",
        "the writes of a job in a transaction each",
        postgres,
    ),
    Experiment(
        "s3",
        "S3 that replaces objects while they are read, cuts bodies and refuses every fifth request gives no result "
        "under a wrong ETag and no silent gap",
        "reads that are not pinned to the ETag",
        s3,
    ),
    Experiment(
        "two-of-each",
        "two producers, aggregators and workers give the figures of one of each",
        "aggregators without their lock",
        two_of_each,
    ),
)
