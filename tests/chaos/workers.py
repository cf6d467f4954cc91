"""Workers that are killed, paused, poisoned and told to stop: each picture is counted once, and soon.

Controls run right behind what they are the control of, in the same database where that changes nothing: what a control
counts is what came in addition.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import psutil
from redis import Redis
from sqlalchemy import text

from common.messaging.queues import ensure_epoch, redis_client
from tests.chaos import stock
from tests.chaos.harness import ENDED, Experiment, Lab, Outcome, Scale, percentile
from tests.mutants import UNFENCED, planted_in_processes
from tests.photos import jpeg, portrait
from tests.services import Bucket, wait_until

#: Workers that hold jobs, by name.
HOLDERS = "SELECT DISTINCT split_part(worker, '@', 1) FROM jobs WHERE state = 'running'"

#: What a worker holds.
HELD = "SELECT id, attempt FROM jobs WHERE state = 'running' AND worker LIKE :name || '@%' ORDER BY id"

#: How an attempt ended, and how long after an instant; no row while it goes on.
ENDING = """
SELECT outcome, extract(epoch FROM ended_at - CAST(:since AS timestamptz))::float AS seconds FROM job_attempts
WHERE job_id = :id AND attempt = :attempt ORDER BY job_attempts.id LIMIT 1
"""

#: Jobs that were charged with anything.
CHARGED = "SELECT count(*) FROM jobs WHERE id > :after AND (attempt > 1 OR failures + crashes + lost_leases > 0)"


def enlarged(pixels: int) -> dict[str, str]:
    """Settings that make a picture take longer: 400 pixels about 0.05 s, 800 about 0.15 s. Then a worker under load
    nearly always has one in hand."""
    return {"MASKWATCH_PIPELINE__ENLARGE_BELOW_PX": str(pixels), "MASKWATCH_PIPELINE__ENLARGE_LIMIT": "8"}


#: So that a machine which starts workers all the time lets no lease run out of a worker that lives.
PATIENT = {"MASKWATCH_LEDGER__LEASE_SECONDS": "15"}


@dataclass
class Fleet:
    """Workers by name, until `exits` is closed. For each that is taken out another one starts at once, if `lasting`.

    `start` starts one of that name, `at_work` selects the names of those that can be hit at work.
    """

    lab: Lab
    exits: ExitStack
    size: int
    lasting: bool
    start: Callable[[str], AbstractContextManager[subprocess.Popen[bytes]]]
    at_work: str = HOLDERS
    children: Callable[[Any], list[psutil.Process]] = Lab.children
    members: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _exit_of: dict[str, ExitStack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _ in range(self.size):
            self.hire()

    def hire(self) -> None:
        name = f"w{next(_numbers)}"
        # Each has an exit of its own: a pid is not to be killed long after its process has ended.
        self._exit_of[name] = self.exits.enter_context(ExitStack())
        self.members[name] = self._exit_of[name].enter_context(self.start(name))

    def busy(self) -> str:
        """Waits for workers that are at work, and chooses one of them."""

        def found() -> list[str]:
            return sorted(name for (name,) in self.lab.rows(self.at_work) if name in self.members)

        return self.lab.random.choice(wait_until(found, seconds=180, what="a worker at work"))

    def kill(self, name: str) -> None:
        """Kill -9 with all its children."""
        del self.members[name]
        self._exit_of.pop(name).close()
        if self.lasting:
            self.hire()

    def kill_child(self, name: str) -> None:
        """Kill -9 a process that does the work; its worker starts another one."""
        children = self.children(self.members[name])
        if children:
            self.lab.random.choice(children).kill()

    def kill_either(self, name: str) -> None:
        """One time in four only the child."""
        (self.kill_child if self.lab.random.random() < 0.25 else self.kill)(name)

    def stop(self, name: str) -> float:
        """SIGTERM; seconds until it had left."""
        process = self.members.pop(name)
        began = time.monotonic()
        process.terminate()
        if self.lasting:
            self.hire()
        code = process.wait(180)
        seconds = time.monotonic() - began
        assert code == 0, f"{name} left with {code}"
        self._exit_of.pop(name).close()
        return seconds


#: No two workers of a run have the same name.
_numbers = itertools.count(1)


def our_fleet(
    lab: Lab, exits: ExitStack, scale: Scale, env: Mapping[str, str] | None = None, *, size: int = 3
) -> Fleet:
    """Workers of Maskwatch. Starting them is what takes time: in the short version nobody is replaced."""
    return Fleet(lab, exits, size, scale is Scale.FULL, lambda name: lab.running("worker", "--name", name, env=env))


@dataclass
class Supply:
    """Pictures that don't run out. `count` is how many there have been."""

    lab: Lab
    bucket: Bucket
    count: int = 0

    def add(self, count: int) -> None:
        self.lab.put(self.bucket, count, first=self.count)
        self.count += count
        self.lab.backfill(self.bucket)

    def keep(self, at_least: int) -> None:
        """Add pictures when fewer than this many are still to be done."""
        if self.left() < at_least:
            self.add(2 * at_least)

    def left(self) -> int:
        """How many are still to be done."""
        states = self.lab.states()
        return self.count - sum(states.get(state, 0) for state in ENDED)


def last_job(lab: Lab) -> int:
    """The newest job's id; what is newer belongs to the control."""
    return int(lab.scalar("SELECT coalesce(max(id), 0) FROM jobs"))


# --- kill -9 ----------------------------------------------------------------------------------------------


def kill_9(lab: Lab, scale: Scale) -> Outcome:
    """Kill workers, or only their children, all through a backfill."""
    # In the short version nobody is replaced, so the pictures must last until the last kill, on a fast machine, too.
    jobs, kills, pixels = (500, 20, 400) if scale is Scale.FULL else (90, 2, 800)
    os.environ.update(enlarged(pixels))
    bucket = lab.bucket()
    lab.put(bucket, jobs)
    struck = []
    with lab.processes("producer", "aggregator"), ExitStack() as exits:
        fleet = our_fleet(lab, exits, scale)
        lab.backfill(bucket)
        for number in range(kills):
            succeeded_of(lab, jobs * number // (kills + 2))
            time.sleep(lab.random.uniform(0, 0.2))  # so that it strikes anywhere between claim and commit
            victim = fleet.busy()
            struck.append(lab.rows(HELD, name=victim))
            fleet.kill_either(victim)
        lab.wait_until_done(jobs, seconds=600)
    hits = sum(any(ending(lab, *each) in ("crashed", "lease_expired") for each in held) for held in struck)
    figures = {"jobs": jobs, "kills": kills, "kills that took jobs along": hits, **counted(lab, jobs)}
    lab.empty()
    control = stock_kills(lab, scale, jobs, kills)
    return Outcome(figures, control, right(figures) and hits > 0, control["lost"] > 0)


def succeeded_of(lab: Lab, count: int) -> None:
    wait_until(lambda: lab.states().get("succeeded", 0) >= count, seconds=300, what=f"success of {count} jobs")


def ending(lab: Lab, job: int, attempt: int) -> Any:
    """The outcome of an attempt; None while it goes on."""
    found = lab.rows(ENDING, id=job, attempt=attempt, since=None)
    return found[0].outcome if found else None


def counted(lab: Lab, jobs: int) -> dict[str, int]:
    """What every experiment promises."""
    return {
        "lost": lab.lost(jobs),
        "rows doubled": lab.doubled(),
        "summary difference": lab.summary_difference(),
    }


def right(figures: dict[str, Any]) -> bool:
    """Whether what `counted` counted is what is promised."""
    return figures["lost"] == figures["rows doubled"] == figures["summary difference"] == 0


def stock_kills(lab: Lab, scale: Scale, jobs: int, kills: int) -> dict[str, int]:
    """The same number of kills of stock Celery workers. What is neither recorded nor anywhere in Redis is lost."""
    with lab.engine.begin() as connection:
        connection.execute(text(stock.TABLE))
    stock.send(jobs)
    recorded = "SELECT count(DISTINCT picture) FROM stock_rows"
    logs = lab.folder / "logs"
    with ExitStack() as exits, Redis.from_url(lab.services.endpoints.redis_url) as redis:
        fleet = Fleet(
            lab,
            exits,
            3,
            scale is Scale.FULL,
            lambda name: stock.worker(name, logs / f"stock-{name}.log"),
            "SELECT DISTINCT split_part(worker, '@', 1) FROM stock_rows",
            lambda process: psutil.Process(process.pid).children(),
        )
        for number in range(kills):
            # By what is left, because what is lost is never recorded.
            wait_until_left(redis, jobs - jobs * number // (kills + 2))
            fleet.kill_either(fleet.busy())
        wait_until_left(redis, 0)
        wait_until_still(lambda: (lab.scalar(recorded), redis.hlen("unacked")))
        waiting = redis.hlen("unacked")
    return {
        "kills": kills,
        "lost": jobs - int(lab.scalar(recorded)) - waiting,
        "stuck until the visibility timeout of an hour": waiting,
    }


def wait_until_left(redis: Redis, count: int) -> None:
    """Wait until no more than this many messages of stock tasks are in their queue."""
    wait_until(lambda: redis.llen("celery") <= count, seconds=300, what=f"a queue of {count} messages")


def wait_until_still(look: Callable[[], object], *, seconds: float = 5) -> None:
    """Wait until a figure has not changed for a while."""
    seen, since = look(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.2)
        if (now := look()) != seen:
            seen, since = now, time.monotonic()


# --- a worker that is paused ------------------------------------------------------------------------------


def paused_worker(lab: Lab, scale: Scale) -> Outcome:
    """Pause workers past their lease while they hold a job, let another one do it, and wake them."""
    pauses, control_pauses = (20, 5) if scale is Scale.FULL else (1, 1)
    # Few messages wait, so that a job which was taken over is soon at the head of the queue.
    os.environ.update({**enlarged(800), "MASKWATCH_DISPATCH__QUEUE_CAP": "3"})
    supply = Supply(lab, lab.bucket())
    with lab.processes("producer", "aggregator"):
        with ExitStack() as exits:
            fleet = our_fleet(lab, exits, scale, size=2)
            paused, taken_over = pause_often(lab, fleet, supply, pauses, lambda: lab.logged(REFUSED) > 0)
            lab.wait_until_done(supply.count)
        figures = {
            "pauses": paused,
            "jobs done by another worker meanwhile": taken_over,
            **counted(lab, supply.count),
            "stale commits refused": lab.logged(REFUSED),
        }
        held = right(figures) and figures["stale commits refused"] > 0
        with ExitStack() as exits:
            env = exits.enter_context(planted_in_processes(lab.folder / "unfenced", *UNFENCED))
            fleet = our_fleet(lab, exits, scale, env, size=2)
            unfenced, _ = pause_often(lab, fleet, supply, control_pauses, lambda: lab.doubled() > 0)
            lab.wait_until_done(supply.count)
        control = {"pauses": unfenced, "rows doubled": lab.doubled()}
    return Outcome(figures, control, held, control["rows doubled"] > 0)


#: What a worker logs when the fence held.
REFUSED = "stale commit refused"


def pause_often(lab: Lab, fleet: Fleet, supply: Supply, pauses: int, seen: Callable[[], bool]) -> tuple[int, int]:
    """Pause so often, and up to three times more while nothing is `seen` of it: how many pauses, and how many jobs
    others did meanwhile."""
    done = taken_over = 0
    while done < pauses or (done < pauses + 3 and not in_time(seen)):
        supply.keep(24)
        jobs = pause(lab, fleet, supply)
        # Otherwise the worker had just ended what it held, and was not past anything.
        done += jobs > 0
        taken_over += jobs
    return done, taken_over


def in_time(seen: Callable[[], bool], *, seconds: float = 20) -> bool:
    """Whether it is seen soon: the last worker to wake may still be at the picture it held."""
    deadline = time.monotonic() + seconds
    while not seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def pause(lab: Lab, fleet: Fleet, supply: Supply) -> int:
    """Stop a worker's process between claim and commit, wait until another worker has done its jobs, and wake it;
    returns how many jobs were done by others, 0 if the pause came at another moment."""
    time.sleep(lab.random.uniform(0, 0.2))
    victim = fleet.busy()
    (child,) = lab.children(fleet.members[victim])
    child.suspend()
    try:
        # Rows that are locked are in the middle of a transaction of the worker's: it had begun to commit or to renew.
        held = lab.rows(f"{HELD} FOR UPDATE SKIP LOCKED", name=victim)
        if not held:
            return 0
        ids = [job for job, _ in held]
        wait_until(
            lambda: lab.scalar("SELECT bool_and(state = 'succeeded') FROM jobs WHERE id = ANY(:ids)", ids=ids),
            seconds=240,
            what=f"jobs {ids}, in another worker's hands",
        )
        taken_over = sum(ending(lab, job, attempt) == "lease_expired" for job, attempt in held)
    finally:
        child.resume()
    # It goes on with what it believes to be its own, and then takes something new, if there is anything.
    wait_until(lambda: (victim,) in lab.rows(HOLDERS) or not supply.left(), seconds=180, what="the woken worker's next")
    return taken_over


# --- a picture that kills its worker ----------------------------------------------------------------------

#: Pictures that hold these bytes kill the process that decodes them.
MARKER = b"poison"

DEADLY = f"""
import os, signal
from workers.jobs import images

decode = images.decode_image

def deadly(data, **limits):
    if {MARKER!r} in data:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, **limits)

images.decode_image = deadly
"""

#: A trigger that stops the ledger from isolating a job that crashed once.
NEVER_ISOLATED = """
CREATE FUNCTION never_isolated() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.alone := false; RETURN NEW; END';
CREATE TRIGGER never_isolated BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION never_isolated();
"""

#: Jobs by whether they are poison, with what they cost. Groups of four may hold both.
COSTS = """
SELECT m.key = ANY(:poison) AS poison, j.state, j.reason, j.attempt, j.crashes
FROM jobs j JOIN media_objects m ON m.id = j.media_object_id WHERE j.id > :after
"""


EXTRA = "extra attempts of an innocent job at most"


def poison(lab: Lab, scale: Scale) -> Outcome:
    """Pictures that kill the process that decodes them, among harmless ones."""
    jobs, deadly = (60, 2) if scale is Scale.FULL else (16, 1)
    crashes = 8 if scale is Scale.FULL else 2
    os.environ.update(PATIENT)
    supply = Supply(lab, lab.bucket())
    with lab.processes("producer", "aggregator"), ExitStack() as exits:
        our_fleet(lab, exits, scale, lab.injected(DEADLY), size=2 if scale is Scale.FULL else 1)
        keys = put_poison(lab, supply, jobs, deadly)
        lab.wait_until_done(jobs)
        bad, good = costs(lab, keys, after=0)
        figures = {
            "jobs": jobs,
            "poison": deadly,
            "poison quarantined": sum(job.state == "quarantined" and job.reason == "crashed" for job in bad),
            "crashes while isolated until then": max(job.crashes for job in bad),
            **counted(lab, jobs - deadly),
            EXTRA: max(job.attempt for job in good) - 1,
        }
        held = (
            right(figures)
            and {job.crashes for job in bad} == {3}
            and {job.attempt for job in bad} <= {3, 4}  # the fourth: it crashed in company first
            and figures["poison quarantined"] == deadly
            and figures[EXTRA] <= 1
        )
        control = never_isolated(lab, supply, crashes)
    return Outcome(figures, control, held, control["poison quarantined"] == 0 and control[EXTRA] > 1)


def put_poison(lab: Lab, supply: Supply, count: int, deadly: int) -> list[str]:
    """Add pictures of which some are poison; returns their keys. Never the last of its group of four: in company."""
    places = [number for number in range(supply.count, supply.count + count) if number % 4 != 3]
    keys = [f"{number:05}.jpg" for number in sorted(lab.random.sample(places, deadly))]
    lab.put(supply.bucket, count, first=supply.count)
    for key in keys:
        supply.bucket.put(key, jpeg(portrait(128), comment=MARKER + key.encode()))
    supply.count += count
    lab.backfill(supply.bucket)
    return keys


def costs(lab: Lab, keys: Collection[str], *, after: int) -> tuple[list[Any], list[Any]]:
    """What poison and innocent jobs cost."""
    found = lab.rows(COSTS, poison=list(keys), after=after)
    return [job for job in found if job.poison], [job for job in found if not job.poison]


def never_isolated(lab: Lab, supply: Supply, crashes: int) -> dict[str, int]:
    """Poison again, and no job is isolated: observed until it has crashed more than often enough."""
    after = last_job(lab)
    with lab.engine.begin() as connection:
        connection.execute(text(NEVER_ISOLATED))
    keys = put_poison(lab, supply, 8, 1)
    count = "SELECT count(*) FROM job_attempts WHERE outcome = 'crashed' AND job_id > :after"
    wait_until(lambda: costs(lab, keys, after=after)[0], what="the poison job")
    wait_until(
        lambda: (
            max(job.attempt for job in costs(lab, keys, after=after)[0]) > crashes
            or not lab.scalar("SELECT count(*) FROM jobs WHERE state IN ('pending', 'queued', 'running')")
        ),
        seconds=300,
        what="crash after crash",
    )
    bad, good = costs(lab, keys, after=after)
    return {
        "crashes": int(lab.scalar(count, after=after)),
        "poison quarantined": sum(job.state == "quarantined" for job in bad),
        EXTRA: max(job.attempt for job in good) - 1,
    }


# --- how soon ---------------------------------------------------------------------------------------------

#: What a tick may come late, and its statement take, on a machine that starts workers all the time.
TOLERANCE_SECONDS = 1.0


def recovery(lab: Lab, scale: Scale) -> Outcome:
    """Kill workers that hold jobs, and see when the jobs are free again, by the database's clock."""
    kills, control_kills = (50, 5) if scale is Scale.FULL else (2, 1)
    os.environ.update(enlarged(800))
    lease = float(os.environ["MASKWATCH_LEDGER__LEASE_SECONDS"])
    limit = lease + float(os.environ["MASKWATCH_DISPATCH__RECONCILE_SECONDS"])
    supply = Supply(lab, lab.bucket())
    with ExitStack() as exits, lab.processes("aggregator"):
        with lab.processes("producer"):
            fleet = our_fleet(lab, exits, scale)
            taken = [kill_holder(lab, fleet, supply) for _ in range(kills)]
            lab.wait_until_done(supply.count)
        waits = [wait for since, held in taken for wait in waited(lab, since, held)]
        figures = {
            "kills": kills,
            "jobs taken along": len(waits),
            "s lease + interval": limit,
            "s p50": percentile(waits, 0.5),
            "s p95": percentile(waits, 0.95),
            "s max": max(waits),
            **counted(lab, supply.count),
        }
        held = right(figures) and max(waits) <= limit + TOLERANCE_SECONDS
        control = without_reconciler(lab, fleet, supply, control_kills, limit)
    return Outcome(figures, control, held, control["recovered in lease + interval"] == 0)


def kill_holder(lab: Lab, fleet: Fleet, supply: Supply) -> tuple[Any, list[Any]]:
    """Kill a worker that holds jobs: when, by the database's clock, and which attempts it left behind."""
    while True:
        supply.keep(24)
        time.sleep(lab.random.uniform(0, 0.2))
        victim = fleet.busy()
        since = lab.scalar("SELECT clock_timestamp()")
        fleet.kill(victim)
        # A commit that was on its way may still arrive.
        time.sleep(0.2)
        if held := lab.rows(HELD, name=victim):
            return since, held
        if not fleet.lasting:
            fleet.hire()  # this one died for nothing


def waited(lab: Lab, since: Any, held: Collection[Any]) -> list[float]:
    """Seconds until each of these jobs was free again; endless for one that never was."""
    waits = []
    for job, attempt in held:
        found = lab.rows(ENDING, id=job, attempt=attempt, since=since)
        if not found:
            waits.append(float("inf"))
        elif found[0].outcome != "succeeded":  # else its commit outlived it
            waits.append(found[0].seconds)
    return waits


def without_reconciler(lab: Lab, fleet: Fleet, supply: Supply, kills: int, limit: float) -> dict[str, int]:
    """The same with a producer that never reconciles."""
    with redis_client() as client:
        ensure_epoch(client)
    with lab.processes("producer", env={"MASKWATCH_DISPATCH__RECONCILE_SECONDS": "86400"}):
        taken = [kill_holder(lab, fleet, supply) for _ in range(kills)]
        time.sleep(limit + TOLERANCE_SECONDS)
    left = [(job, attempt) for _, held in taken for job, attempt in held]
    return {
        "kills": kills,
        "jobs taken along": len(left),
        "recovered in lease + interval": sum(ending(lab, job, attempt) is not None for job, attempt in left),
    }


# --- SIGTERM ----------------------------------------------------------------------------------------------

#: How long a worker may take to leave.
GRACE_SECONDS = 30.0


def sigterm(lab: Lab, scale: Scale) -> Outcome:
    """Ask workers under load to stop."""
    stops, control_kills = (20, 5) if scale is Scale.FULL else (1, 1)
    os.environ.update({**PATIENT, **enlarged(800)})
    supply = Supply(lab, lab.bucket())
    with lab.processes("producer", "aggregator"), ExitStack() as exits:
        fleet = our_fleet(lab, exits, scale)
        seconds = [stop(lab, fleet, supply) for _ in range(stops)]
        lab.wait_until_done(supply.count)
        outcomes = {row.outcome: row.count for row in lab.rows(OUTCOMES, after=0)}
        figures = {
            "stops": stops,
            "s until exit (95 %)": percentile(seconds, 0.95),
            "s at most": max(seconds),
            **counted(lab, supply.count),
            "jobs given back": outcomes.get("released", 0),
            "jobs charged": int(lab.scalar(CHARGED, after=0)),
        }
        held = (
            right(figures)
            and max(seconds) <= GRACE_SECONDS
            and figures["jobs charged"] == 0
            and set(outcomes) <= {"succeeded", "released"}
        )
        after = last_job(lab)
        for _ in range(control_kills):
            kill_holder(lab, fleet, supply)
        lab.wait_until_done(supply.count)
        control = {"kills": control_kills, "jobs charged": int(lab.scalar(CHARGED, after=after))}
    return Outcome(figures, control, held, control["jobs charged"] > 0)


OUTCOMES = "SELECT outcome, count(*) AS count FROM job_attempts WHERE job_id > :after GROUP BY 1"


def stop(lab: Lab, fleet: Fleet, supply: Supply) -> float:
    """SIGTERM to a worker that holds jobs; seconds until it had left."""
    supply.keep(24)
    time.sleep(lab.random.uniform(0, 0.2))
    victim = fleet.busy()
    return fleet.stop(victim)


EXPERIMENTS = (
    Experiment(
        "kill-9",
        "workers killed with -9 in a backfill: nothing lost, nothing counted twice",
        "stock Celery settings, no ledger",
        kill_9,
    ),
    Experiment(
        "paused-worker",
        "workers paused past their lease and woken: nothing counted twice",
        "no fence",
        paused_worker,
    ),
    Experiment(
        "poison",
        "a picture that kills its process: quarantined at its third isolated crash; others lose one attempt at most",
        "jobs that crashed are not isolated",
        poison,
    ),
    Experiment(
        "recovery",
        "jobs of a killed worker are free again within the lease + the reconciler's interval",
        "no reconciler",
        recovery,
    ),
    Experiment(
        "sigterm",
        "workers told to stop leave within 30 s: nothing lost, no job charged",
        "SIGKILL instead",
        sigterm,
    ),
)
