"""Files and messages of people who mean harm: nothing of theirs is run or opened, and the workers go on."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from redis import Redis
from sqlalchemy.orm import Session

from common.messaging.queues import Queue, encode_refs
from common.settings import get_settings
from tests import ROOT, hostile_media
from tests.chaos.harness import ENDED, Experiment, Lab, Outcome, Scale
from tests.faults import Fault, faulty_s3
from tests.forged_messages import forged, message, pickled
from tests.hostile_files import Canaries, open_freely, watch_canaries
from tests.ledger_rows import dispatch
from tests.services import Bucket, kill_tree, wait_until

#: What a worker's child may take at most with the limits as they are shipped: what to give each one.
MEMORY_CAP_MB = 3072
#: What one message may take, in place of the quarter of an hour that is shipped. A file that takes longer ends with
#: that as its reason; none may take as long as its worker is left alive.
SOFT_LIMIT_SECONDS, HARD_LIMIT_SECONDS = 120, 150

#: One job per message, so that an attempt's length is a file's own. Leases as shipped: a decoder that keeps Python's
#: lock to itself for seconds, as WebP's does, is not to look dead.
FILES = {
    "MASKWATCH_WORKER__GROUP_SIZE": "1",
    "MASKWATCH_WORKER__SOFT_TIME_LIMIT_SECONDS": str(SOFT_LIMIT_SECONDS),
    "MASKWATCH_WORKER__HARD_TIME_LIMIT_SECONDS": str(HARD_LIMIT_SECONDS),
    "MASKWATCH_LEDGER__LEASE_SECONDS": "60",
    "MASKWATCH_LEDGER__HEARTBEAT_SECONDS": "15",
}


@dataclass
class Watch:
    """What was seen of a worker's children: by process id, the most memory each has had, in MB."""

    peaks_mb: dict[int, int] = field(default_factory=dict)

    @property
    def peak_mb(self) -> int:
        return max(self.peaks_mb.values(), default=0)


@contextmanager
def watching(worker: Any) -> Iterator[Watch]:
    """Looks at a worker's children until the end of the block. (Linux keeps the peak of a process itself.)"""
    seen, stop = Watch(), threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            for pid in pids(worker):
                seen.peaks_mb[pid] = max(peak_mb(pid), seen.peaks_mb.get(pid, 0))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def pids(worker: Any) -> set[int]:
    """The children of a worker; none where it is ending just now."""
    try:
        return {child.pid for child in Lab.children(worker)}
    except psutil.Error:
        return set()


def peak_mb(pid: int) -> int:
    """The most memory that a process has had, in MB; 0 of one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


# --- hostile files ---


def files(lab: Lab, canaries: Canaries, scale: Scale) -> dict[str, bytes]:
    """Hostile files by their keys."""
    if scale is Scale.SHORT:
        damaged = lab.random.sample(list(hostile_media.damaged(lab.random, 1, 1)), 12)
        others = [*hostile_media.pointers(canaries).items(), *hostile_media.something_else(canaries).items()]
        picked = {**dict(damaged), **hostile_media.claiming_images(), **dict(lab.random.sample(others, 24))}
        # Always with those files whose canaries a lax reader opens: the control needs them.
        picked |= {key: content for key, content in others if key in ("ffconcat-file.mkv", "hls-address.mp4")}
        return picked | {"passes.jpg": hostile_media.scan_bomb(5_000)}
    return {
        **dict(hostile_media.damaged(lab.random, 1, 3)),
        **hostile_media.claiming_images(),
        **hostile_media.greedy_images(),
        **{f"within/{key}": content for key, content in hostile_media.bombs_within_limits().items()},
        "within/references.mkv": hostile_media.many_references(),
        **{f"videos/{key}": content for key, content in hostile_media.greedy_videos().items()},
        **hostile_media.pointers(canaries),
        **hostile_media.something_else(canaries),
    }


def hostile_files(lab: Lab, scale: Scale) -> Outcome:
    bucket = lab.bucket()
    with watch_canaries(lab.folder) as canaries:
        hostile = files(lab, canaries, scale)
        keys = hostile_media.KEYS if scale is Scale.FULL else hostile_media.KEYS[::4]
        harmless = {key: hostile_media.good(number) for number, key in enumerate(keys, 1)}
        harmless["good.mp4"] = hostile_media.video()
        for key, content in {**hostile, **harmless}.items():
            bucket.put(key, content)
        with (
            lab.processes("producer", "aggregator", env=FILES),
            lab.running("worker", env=FILES) as worker,
            watching(worker) as watch,
        ):
            lab.backfill(bucket)
            wait_until(lambda: settled(lab), seconds=1500, what="the end of all jobs")
            alive = worker.poll() is None
        hits = sum(canaries.hits.values())
        figures = counted_after(lab, hostile, harmless, watch) | {"canaries hit": hits}
        held = figures.pop("held") and alive and hits == 0 and not canaries.path.with_name("touched").exists()
        control = laxly_read(lab, canaries, hostile)
    control |= without_limits(lab)
    return Outcome(figures, control, held, control["canaries hit"] > 0 and control["files over the memory cap"] > 0)


def settled(lab: Lab) -> bool:
    """Whether every job has ended, and the summaries are done. A probe's chunks are there when it ends."""
    return set(lab.states()) <= set(ENDED) and not lab.scalar("SELECT count(*) FROM dirty_marks")


def counted_after(lab: Lab, hostile: dict[str, bytes], harmless: dict[str, bytes], watch: Watch) -> dict[str, Any]:
    """What became of the files; `held`: all of it as promised but for the canaries."""
    lost = lab.scalar("SELECT count(*) FROM job_attempts WHERE outcome IN ('crashed', 'lease_expired')")
    again = lab.scalar("SELECT coalesce(max(failures), 0) FROM jobs")
    unexplained = lab.rows(
        "SELECT m.key, j.reason, j.detail FROM jobs j JOIN media_objects m ON m.id = j.media_object_id"
        " WHERE j.state NOT IN ('succeeded', 'quarantined') OR j.reason = 'unexpected_error'"
        " OR (j.state = 'quarantined' AND (j.reason IS NULL OR j.detail LIKE '%given up after%'))"
    )
    ended = lab.scalar("SELECT count(DISTINCT media_object_id) FROM jobs")
    analysed = lab.scalar(
        "SELECT count(*) FROM media_objects m WHERE m.key = ANY(:keys) AND NOT EXISTS (SELECT FROM jobs j"
        " WHERE j.media_object_id = m.id AND (j.state <> 'succeeded' OR j.reason IS NOT NULL))",
        keys=list(harmless),
    )
    seconds = lab.rows("SELECT extract(epoch FROM ended_at - started_at) AS s FROM job_attempts ORDER BY s")
    for row in unexplained:
        print(f"  {row.key!r}: {row.reason} {row.detail}", file=sys.stderr)
    in_quarantine = lab.scalar("SELECT count(DISTINCT media_object_id) FROM jobs WHERE state = 'quarantined'")
    return {
        "hostile files": len(hostile),
        "quarantined with a reason": in_quarantine,
        "without an end or a reason": len(hostile) + len(harmless) - ended + len(unexplained),
        "good ones not analysed": len(harmless) - analysed,
        "workers lost": lost,
        "tries more for one at most": again,
        "MB at most": watch.peak_mb,
        "s for a file at most": float(seconds[-1].s),
        "held": (lost, len(unexplained), ended) == (0, 0, len(hostile) + len(harmless))
        and again <= 1
        and analysed == len(harmless)
        and 0 < watch.peak_mb < MEMORY_CAP_MB
        and seconds[-1].s < HARD_LIMIT_SECONDS
        and lab.summary_difference() == 0,
    }


def laxly_read(lab: Lab, canaries: Canaries, hostile: dict[str, bytes]) -> dict[str, Any]:
    """The same files, read by one that believes what they are and where they point."""
    folder = lab.folder / "lax"
    folder.mkdir()
    hits = 0
    for number, content in enumerate(hostile.values()):
        # A playlist is only read as one under such a name.
        path = folder / f"{number}.{'m3u8' if content.startswith(b'#EXTM3U') else 'bin'}"
        if str(canaries.path).encode() in content or canaries.url.encode() in content:
            path.write_bytes(content)
            hits += sum(open_freely(canaries, str(path)).values())
    return {"canaries hit": hits}


#: Decodes a file with as many pixels as are said, and prints what came of it.
_DECODED = """
import sys
from pathlib import Path
from workers.media.images import decode_image
try:
    decode_image(Path(sys.argv[1]).read_bytes(), max_pixels=int(sys.argv[2]))
except Exception as error:
    print(type(error).__name__)
"""


def without_limits(lab: Lab) -> dict[str, Any]:
    """A picture of a few megabytes and more pixels than allowed, decoded all the same, in a process that may have no
    more memory than the cap. (With the limit it is refused, and takes none.)"""
    path = lab.folder / "large.png"
    rows = hostile_media.inflating(30_000 * 36_000 * 3 // 2**20 + 1)
    path.write_bytes(hostile_media.png(30_000, 36_000, packed=rows))
    limit = get_settings().worker.max_image_pixels
    assert decoded(path, limit) == "PermanentJobError"
    return {"files over the memory cap": int(decoded(path, 10**12) == "MemoryError")}


def decoded(path: Path, max_pixels: int) -> str:
    """The name of the error that decoding this picture ends with, if it does."""
    most = MEMORY_CAP_MB * 2**20
    done = subprocess.run(
        [sys.executable, "-c", _DECODED, str(path), str(max_pixels)], capture_output=True, text=True, check=True,
        timeout=300, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
    )  # fmt: skip
    return done.stdout.strip()


# --- forged messages ---


#: What no message of somebody else may change.
_LEDGER = ("jobs", "job_attempts", "media_objects", "faces", "frame_counts", "compliance_hourly", "operator_actions")


def forged_messages(lab: Lab, scale: Scale) -> Outcome:
    bucket = lab.bucket()
    lab.put(bucket, 4)
    bucket.put("bad.jpg", b"no picture")
    canary = lab.folder / "run"
    read: list[str] = []
    with (
        faulty_s3(lab.services.endpoints.s3_endpoint_url, _noting(read)) as url,
        lab.processes("producer", "aggregator", "worker", env={"MASKWATCH_STORAGE__ENDPOINT_URL": url}) as processes,
    ):
        lab.backfill(bucket)
        lab.wait_until_done(5)
        before, children = ledger_of(lab), pids(processes[-1])
        read.clear()
        count = 1000 if scale is Scale.FULL else 250
        megabytes = send_forged(lab, count, canary)
        wait_until(lambda: waiting(lab) == 0, seconds=600, what="the end of the queues")
        # What was taken last is worked off, too. The producer's own ticks go on meanwhile, and change nothing.
        time.sleep(2)
        changed = sum(now != then for now, then in zip(ledger_of(lab), before, strict=True))
        lost = len(children - pids(processes[-1])) + sum(process.poll() is not None for process in processes)
        lab.put(bucket, 1, first=4)
        lab.backfill(bucket)
        lab.wait_until_done(6)
    unplanned = sum("00004.jpg" not in each for each in read)
    works = lab.lost(6) == 1 and lab.summary_difference() == 0  # all but the one that is no picture
    figures = {
        "forged messages": count,
        "MB of them": megabytes,
        "dropped at the door": lab.logged("dropped a message that Maskwatch did not send"),
        "code run": int(canary.exists()),
        "objects read": unplanned,
        "tables changed": changed,
        "processes ended": lost,
        "pictures analysed afterwards": int(works),
    }
    held = works and (canary.exists(), unplanned, changed, lost) == (False, 0, 0, 0)
    control = believed(lab, bucket, canary)
    return Outcome(figures, control, held, all(control.values()))


def _noting(read: list[str]) -> Callable[[str, str], Fault]:
    """For a server in between that does nothing but note what is read."""

    def note(method: str, key: str) -> Fault:
        read.append(f"{method} {key}")
        return Fault()

    return note


def ledger_of(lab: Lab) -> list[str | None]:
    """A digest of all rows of each table."""
    digest = "SELECT md5(string_agg(each::text, '|' ORDER BY each::text)) FROM {} AS each"
    return [lab.scalar(digest.format(table)) for table in _LEDGER]


def send_forged(lab: Lab, count: int, canary: Path) -> float:
    """Put forged messages into the queues' lists; returns how many MB they have together."""
    ids = [row.id for row in lab.rows("SELECT id FROM jobs")]
    messages = forged(lab.random, ids, [hostile_media.pickle_that_touches(str(canary))])
    size = 0
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        for queue, item in islice(messages, count):
            # Kombu keeps messages of a higher priority in a list of their own, and reads that, too.
            client.lpush(queue if lab.random.random() < 0.9 else f"{queue}\x06\x163", item)
            size += len(item)
    return size / 2**20


def waiting(lab: Lab) -> int:
    """How many messages the queues hold."""
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        return sum(client.llen(f"{queue.value}{suffix}") for queue in Queue for suffix in ("", "\x06\x163"))


def believed(lab: Lab, bucket: Bucket, canary: Path) -> dict[str, int]:
    """What the same messages do where they are believed."""
    return {
        "pickles run by a worker that takes them": unpickled(lab, canary),
        "workers ended by a brace where nothing is checked": ended_by_nonsense(lab),
        "jobs run by a token that is right": run_by_its_token(lab, bucket),
    }


_LAX_WORKER = """
import os
from celery import Celery
app = Celery(broker=os.environ["MASKWATCH_BROKER__URL"])
app.conf.accept_content = ["json", "pickle"]
@app.task(name="workers.analyze")
def analyze(message): pass
quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
app.worker_main(["worker", "-P", "solo", "-Q", "lax", "-n", "lax@%h", *quiet])
"""


def unpickled(lab: Lab, canary: Path) -> int:
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        client.lpush("lax", pickled(hostile_media.pickle_that_touches(str(canary))))
    with (lab.folder / "lax.log").open("wb") as log:
        # Celery itself says no to pickles where it may do everything, unless it is told to.
        environment = {**os.environ, "C_FORCE_ROOT": "1"}
        worker = subprocess.Popen([sys.executable, "-c", _LAX_WORKER], env=environment, stdout=log, stderr=log)
        try:
            wait_until(canary.exists, seconds=120, what="the pickle's code")
        finally:
            kill_tree(worker)
    return int(canary.exists())


def ended_by_nonsense(lab: Lab) -> int:
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        client.lpush(Queue.MEDIA.value, b"{")
    open_door = lab.injected("import common.messaging.message_filter\ncommon.inbox.guard = lambda: None")
    with lab.running("worker", env=open_door) as worker:
        wait_until(lambda: worker.poll() is not None, seconds=120, what="the end of a worker that checks nothing")
    return 1


def run_by_its_token(lab: Lab, bucket: Bucket) -> int:
    lab.put(bucket, 1, first=5)
    lab.backfill(bucket)
    with Session(lab.engine) as session:
        refs = dispatch(session)
    with Redis.from_url(lab.services.endpoints.redis_url) as client:
        client.lpush(Queue.MEDIA.value, message("workers.analyze", [encode_refs(refs)]))
    ended = lab.states()["succeeded"]
    with lab.running("worker"):
        wait_until(lambda: lab.states()["succeeded"] > ended, seconds=120, what="the job of a right token")
    return lab.states()["succeeded"] - ended


EXPERIMENTS = (
    Experiment(
        "hostile-files",
        "damaged files, bombs and pointers to elsewhere end with a reason: nothing opened, no worker lost, "
        "memory and time within their caps",
        "a reader that believes a file, and one without limits",
        hostile_files,
    ),
    Experiment(
        "forged-messages",
        "forged, oversized and pickled messages: no code run, no object read, no row changed, and all work on",
        "workers that believe a message, and a token that is right",
        forged_messages,
    ),
)
