"""Every kind of process that writes to the ledger and the summaries, interleaved by Hypothesis on a real Postgres.

Producers, dispatchers, workers, reconcilers, operators and aggregators call the product's own functions, each in a
transaction that others may interrupt (`tests/chaos/interleaver.py`). S3, Redis and time are modelled: what lies in the
bucket, which messages are on their way, and what has run out. After every commit the committed state is compared with
what is promised; at the end of an example everything is worked off, and nothing may be missing, double or stuck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from common import ledger
from common.database.tables import Location, Pipeline
from common.database.versions import Part, check_part
from common.domain import (
    ACTIVE_STATES,
    Face,
    FrameFaces,
    JobKind,
    JobRef,
    JobState,
    Lane,
    MaskStatus,
    MediaKind,
    ObjectInfo,
    ObservedAt,
    ObservedAtSource,
    PausePolicy,
    Reason,
    VideoInfo,
)
from common.ledger import ClaimedJob, Dispatch, DispatchedJob, Registered, StaleJobError
from common.planning import PlannedObject, chunk_ranges
from common.timestamps import observed_from_file, recording_start, zone
from producer.dispatch import group
from tests.chaos.interleaver import DeadlockError, Hand, Hands, Task
from tests.chaos.invariants import FACES, SECONDS, BrokenPromiseError, Invariants, Listed
from tests.ledger_rows import face
from tests.mutants import Rewrite
from workers.jobs.recording import record_chunk, record_image, record_probe
from workers.summaries import aggregation

ZONE = "Asia/Kolkata"
BUCKET = "s3://footage"
#: Far enough away that it never comes by itself.
LONG = 1e6
PAUSES = PausePolicy(after_refusals=2, seconds=LONG, cap_seconds=LONG)

#: Half an hour past the hour, where an hour of Kolkata begins: the videos lie across it.
BORDER = datetime(2026, 3, 2, 12, 30, tzinfo=UTC)
KEYS = {
    "a.jpg": BORDER - timedelta(seconds=5),
    "b.jpg": BORDER + timedelta(seconds=5),
    "c.mp4": BORDER - timedelta(seconds=2),
    "d.mp4": BORDER - timedelta(seconds=1),
}

#: What runs out as time passes.
TIMES = ("lease_until", "next_run_at", "queued_at", "next_trial_at")


@dataclass(frozen=True)
class Mutant:
    """How the machine is run. As shipped by default; with a fault planted otherwise."""

    name: str = "as shipped"
    rewrites: tuple[Rewrite, ...] = ()
    #: Statements for the tables of the fault.
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    summarize: Callable[[Session, int], tuple[int, int]] | None = None
    published_early: bool = False
    #: The reconciler's rule for overdue messages; without it, the machine loses none.
    overdue: bool = True
    #: Look at what is counted only, not at the ledger's own table of transitions: a fault must be seen by its harm.
    by_harm: bool = False


#: Truncated, though deleting so little is faster: rows lie in the order they came again, so that turns can be repeated.
RESET = (
    "TRUNCATE job_attempts, frame_counts, faces, dirty_marks, compliance_hourly, operator_action_jobs, erased_objects,"
    " operator_actions, purges, jobs, media_objects, backfill_parts, backfills, sources RESTART IDENTITY"
)

#: So that an aggregator's statement can be slow: it waits for a lock of its own after its snapshot was taken.
SLOW = Rewrite(
    of="INSERT INTO compliance_hourly",
    pattern=r"JOIN locations l ON l\.id = h\.location_id",
    by=r"\g<0> CROSS JOIN (SELECT FROM pg_advisory_xact_lock_shared(pg_backend_pid())) AS gate",
)


@dataclass
class Stage:
    """What all examples of one run share."""

    hands: Hands
    location: Location
    pipelines: tuple[Pipeline, Pipeline]
    mutant: Mutant
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[BrokenPromiseError] = field(default_factory=list)


@dataclass
class Held:
    """A job that a worker believes to hold. `busy`: it is just being ended."""

    job: ClaimedJob
    worker: str
    busy: bool = False


SPREAD = 2**16

_some = st.integers(0, 11)
_ids_drawn = st.lists(_some, min_size=1, max_size=2)
#: Before which statement a transaction stops; mostly it doesn't.
_stop = st.one_of(st.none(), st.integers(0, 8))


_registration: dict[str, st.SearchStrategy[Any]] = {
    "age": st.integers(0, 2),
    "only": st.sets(_some, max_size=2),
    "pipeline": _some,
    "lane": st.sampled_from(Lane),
    "placing": st.sampled_from(["key", "key", "none", "mismatch"]),
    "stop": _stop,
}


class Turn(NamedTuple):
    """Something that somebody may do next."""

    weight: int
    when: Callable[[LedgerMachine], object]
    name: str
    arguments: st.SearchStrategy[dict[str, Any]]


TURNS: list[Turn] = []

F = TypeVar("F", bound=Callable[..., None])


def turn(
    weight: int, when: Callable[[LedgerMachine], object] = lambda machine: True, **arguments: st.SearchStrategy[Any]
) -> Callable[[F], F]:
    """A method that is a turn: how often compared with others, when it is possible, and what is drawn for it."""

    def keep(method: F) -> F:
        TURNS.append(Turn(weight, when, method.__name__, st.fixed_dictionaries(arguments)))
        return method

    return keep


def _can_begin(machine: LedgerMachine) -> bool:
    return machine.hands.idle() is not None


def _can_end(machine: LedgerMachine) -> bool:
    return _can_begin(machine) and any(not held.busy for held in machine.held)


def _is_news(machine: LedgerMachine) -> bool:
    """The bucket holds what nobody has registered."""
    return _can_begin(machine) and any(
        machine.checks.newest.get(key) != seen
        for key, seen in machine.bucket.items()
        if key not in machine.checks.erased
    )


def _some_job(*states: str) -> Callable[[LedgerMachine], bool]:
    """There is a job in one of these states, and a hand: so that few turns are spent on nothing."""
    return lambda machine: _can_begin(machine) and any(job.state in states for job in machine.checks.jobs.values())


class LedgerMachine(RuleBasedStateMachine):
    """See the module. Whatever is drawn is an index into what there is, so that the draws don't depend on it."""

    stage: ClassVar[Stage]

    def __init__(self) -> None:
        super().__init__()
        self.hands, self.mutant = self.stage.hands, self.stage.mutant
        self.stage.counts["examples"] += 1
        self.hands.look.execute(RESET)
        self.story: list[str] = []
        self.checks = Invariants(
            self.hands.look, self.story, self.stage.counts, self.stage.broken, by_harm=self.mutant.by_harm
        )
        self.over = False
        self.hands.committed = self.checks.check
        # The world.
        self.now = datetime(2026, 3, 3, tzinfo=UTC)
        self.bucket: dict[str, Listed] = {}
        self.listings: list[dict[str, Listed]] = []
        self.redis: list[tuple[JobRef, ...]] = []
        self.epoch: str | None = None
        self.epochs = 0
        self.held: list[Held] = []
        self.processes = 0
        self.slow: set[int] = set()
        self.put(0, 0)
        self.put(2, 0)
        self._reconcile_messages(None)

    @rule(data=st.data())
    def take_a_turn(self, data: st.DataObject) -> None:
        """One rule for all: Hypothesis leaves out half of the rules of an example, among them those that end it."""
        if self.over:
            return
        turns = sorted((each for each in TURNS if each.when(self)), key=lambda each: -each.weight)
        possible = [each for each in turns for _ in range(each.weight)]
        # Spread, because Hypothesis likes small numbers and numbers that it has drawn before.
        chosen = possible[data.draw(st.integers(0, SPREAD - 1)) * 40503 % SPREAD * len(possible) // SPREAD]
        self.stage.counts["steps"] += 1
        self.stage.counts[f"turn: {chosen.name}"] += 1
        getattr(self, chosen.name)(**data.draw(chosen.arguments))

    # --- the bucket and its producers ---

    @turn(4, key=_some, etag=_some)
    def put(self, key: int, etag: int) -> None:
        """A camera writes new bytes, or bytes that were there before."""
        self.now += timedelta(seconds=1)
        self.bucket[_pick(list(KEYS), key)] = Listed(_pick(list(FACES), etag), self.now)
        self.listings = [*self.listings[-2:], dict(self.bucket)]

    @turn(12, _is_news, **_registration)
    @turn(3, _can_begin, **_registration)
    def register(self, age: int, only: set[int], pipeline: int, lane: Lane, placing: str, stop: int | None) -> None:
        """A producer registers what a listing shows, perhaps an old one."""
        listing = self.listings[-1 - min(age, len(self.listings) - 1)]
        keys = sorted({_pick(sorted(listing), index) for index in only} if only else listing)
        listed = {key: listing[key] for key in keys}
        planned = [_planned(key, seen, placing) for key, seen in listed.items()]

        def work(session: Session) -> Registered:
            return self._register(session, planned, self.stage.pipelines[pipeline % 2], lane, newest=False)

        self._act(Task("register", work, done=lambda _: self.checks.registered(listed)), stop, f"{listed} {placing}")

    def _register(
        self, session: Session, planned: Sequence[PlannedObject], pipeline: Pipeline, lane: Lane, *, newest: bool
    ) -> Registered:
        return ledger.register(
            session, planned, location=self.stage.location, camera=None, pipeline=pipeline, lane=lane, newest=newest
        )

    # --- dispatchers, and the messages on their way ---

    @turn(
        14,
        lambda self: self.epoch and _some_job("pending", "queued")(self),
        limit=st.sampled_from([6, 3, 2]),
        published=st.integers(0, 9).map(lambda drawn: 9 - drawn),
        stop=_stop,
    )
    def dispatch(self, limit: int, published: int, stop: int | None) -> None:
        """Pending jobs are sent, unless the dispatcher dies between its commit and the publishing."""
        epoch = self.epoch
        assert epoch is not None

        def work(session: Session) -> list[tuple[JobRef, ...]]:
            isolated, others = (self._take(session, limit, epoch, isolated=isolated) for isolated in (True, False))
            isolated += ledger.take_trials(session, epoch=epoch, policy=PAUSES)
            messages = [(job.ref,) for job in isolated] + [tuple(refs) for refs in group(others, 2)]
            if self.mutant.published_early:
                self.redis += messages
            return messages

        def publish(messages: list[tuple[JobRef, ...]]) -> None:
            if not self.mutant.published_early and (published or not self.mutant.overdue):
                self.redis += messages

        self._act(Task("dispatch", work, done=publish), stop)

    @turn(4, _some_job("retry_wait"), limit=st.sampled_from([6, 3, 2]), stop=_stop)
    def wake(self, limit: int, stop: int | None) -> None:
        """Due retries are pending again."""
        self._act(Task("wake", lambda session: ledger.wake_retries(session, limit=limit)), stop)

    @turn(2, lambda self: self.epoch and _some_job("queued")(self), lane=st.sampled_from(Lane), stop=_stop)
    def recall(self, lane: Lane, stop: int | None) -> None:
        """What waits in a lane's list is taken back, to be sent in another order."""
        epoch = self.epoch
        assert epoch is not None
        self._act(Task("recall", lambda session: ledger.recall(session, lane=lane, epoch=epoch)), stop)

    def _take(self, session: Session, limit: int, epoch: str, *, isolated: bool) -> list[DispatchedJob]:
        """pending → queued, live first. Backfills' messages that wait in Redis are sent anew, as a tick does that lets
        others have their turn."""
        jobs: list[DispatchedJob] = []
        for lane, feeds in ledger.feeds_with_work(session, isolated=isolated).items():
            to = Dispatch(Lane.LIVE if isolated else lane, epoch, message_size=1 if isolated else 2)
            again = Lane.BACKFILL if lane is Lane.BACKFILL and not isolated else None
            jobs += ledger.take_pending(
                session, feeds, to, lane=lane, limit=limit - len(jobs), isolated=isolated, from_list=again
            )
        return jobs

    @turn(24, lambda self: self.hands.idle() and self.redis, message=_some, again=st.booleans(), stop=_stop)
    def deliver(self, message: int, again: bool, stop: int | None) -> None:
        """A worker takes a message and claims its jobs; sometimes the message is delivered to another, too."""
        refs = _pick(self.redis, message)
        if not again:
            self.redis.remove(refs)
        self.processes += 1
        worker = f"w{self.processes}"

        def claim(session: Session) -> list[ClaimedJob]:
            return ledger.claim(session, refs, worker=worker, lease_seconds=LONG)

        def done(jobs: list[ClaimedJob]) -> None:
            self.checks.claims.update(job.ref.id for job in jobs)
            self.held += [Held(job, worker) for job in jobs]
            self.stage.counts["jobs of outdated messages dropped"] += len(refs) - len(jobs)

        def undone() -> None:
            if not self.mutant.overdue and not again:
                self.redis.append(refs)

        self._act(Task("claim", claim, done=done, undone=undone, jobs=_ids(refs)), stop, f"{_ids(refs)} by {worker}")

    @turn(1, lambda self: self.redis and self.mutant.overdue, message=_some)
    def lose(self, message: int) -> None:
        """A message is lost."""
        self.redis.remove(_pick(self.redis, message))

    @turn(1, lambda self: self.epoch)
    def wipe_redis(self) -> None:
        """Redis is restarted without its data."""
        self.redis.clear()
        self.epoch = None

    # --- workers ---

    @turn(24, _can_end, which=_some, chunk_seconds=st.sampled_from([1.0, 2.0, 5.0]), stop=_stop)
    def succeed(self, which: int, chunk_seconds: float, stop: int | None) -> None:
        """A worker ends a job with its rows; how long ago it was paused, it doesn't know."""
        self._succeed(_pick([held for held in self.held if not held.busy], which), chunk_seconds, stop)

    def _succeed(self, held: Held, chunk_seconds: float, stop: int | None) -> None:
        job = held.job
        if job.kind is JobKind.IMAGE:
            seen = observed_from_file(job.observed_at, None, job.last_modified, zone(job.time_zone))
            faces = [face(MaskStatus.WITHOUT_MASK) for _ in range(FACES[job.etag])]
            self._end("succeed", held, lambda session: record_image(session, job, faces, seen), stop)
        elif job.kind is JobKind.PROBE:
            header = SECONDS[job.etag][0]
            info = VideoInfo("mp4", "h264", 640, 480, 1.0, 0, header, None)
            began = recording_start(job.key_time, None, job.last_modified, header)
            ranges = chunk_ranges(header, chunk_seconds)

            def plan(session: Session) -> None:
                try:
                    record_probe(session, job, info, began, ranges)
                except IntegrityError as error:
                    # Its video was erased. `settle` tries to put the job off, and is refused then.
                    raise StaleJobError from error

            self._end("plan chunks", held, plan, stop, others=True)
        elif frames := _frames(job):
            self._end("succeed", held, lambda session: record_chunk(session, job, frames, None), stop)
        else:
            self._quarantine(held, Reason.EMPTY_VIDEO, stop)

    @turn(
        14,
        _can_end,
        which=_some,
        how=st.sampled_from(["changed", "later", "refused", "quarantine", "release"]),
        stop=_stop,
    )
    def fail(self, which: int, how: str, stop: int | None) -> None:
        """A worker can't do a job, or is asked to stop, or finds other bytes than those that were planned."""
        held = _pick([held for held in self.held if not held.busy], which)
        if how == "changed" and self.bucket[held.job.key].etag == held.job.etag:
            self.put(list(KEYS).index(held.job.key), which)
        there = self.bucket[held.job.key]
        if how == "quarantine":
            self._quarantine(held, Reason.UNREADABLE_IMAGE, stop)
        elif how == "release":
            self._end("release", held, lambda session: ledger.release(session, held.job), stop)
        elif how == "refused":
            self._refuse(held, stop)
        elif how == "later" or there.etag == held.job.etag:
            self._retry_later(held, stop)
        else:
            self._source_changed(held, there, stop)

    def _quarantine(self, held: Held, reason: Reason, stop: int | None) -> None:
        self._end("quarantine", held, lambda session: ledger.quarantine(session, held.job, reason, "planted"), stop)

    def _retry_later(self, held: Held, stop: int | None) -> None:
        def work(session: Session) -> None:
            reason = Reason.UNEXPECTED_ERROR
            ledger.retry_later(session, held.job, reason, "planted", max_attempts=3, base=LONG, cap=LONG)

        self._end("retry later", held, work, stop)

    def _refuse(self, held: Held, stop: int | None) -> None:
        def work(session: Session) -> None:
            again = {"policy": PAUSES, "max_attempts": 3, "base": LONG, "cap": LONG}
            ledger.refuse(session, held.job, Reason.ACCESS_DENIED, "planted", **again)

        self._end("refuse", held, work, stop)

    def _source_changed(self, held: Held, there: Listed, stop: int | None) -> None:
        job = held.job
        found = _planned(job.key, there, "none")

        def work(session: Session) -> None:
            pipeline = next(each for each in self.stage.pipelines if each.id == job.pipeline_id)
            ledger.source_changed(session, job, "planted")
            self._register(session, [replace(found, observed_at=job.key_time)], pipeline, job.lane, newest=True)

        self._end(
            "source changed", held, work, stop, others=True, done=lambda: self.checks.registered({job.key: there})
        )

    def _end(
        self,
        name: str,
        held: Held,
        work: Callable[[Session], Any],
        stop: int | None,
        *,
        others: bool = False,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """End a job one way or another. Its worker drops it then, also when it was refused."""
        held.busy = True
        job = held.job.ref.id

        def drop() -> None:
            self.held.remove(held)

        def committed(_: Any) -> None:
            drop()
            if name == "release":
                self.checks.refunds[job] += 1
            done()

        jobs = None if others else frozenset({job})
        self._act(Task(name, work, committed, drop, drop, jobs), stop, f"job {job} by {held.worker}")

    @turn(2, lambda self: self.hands.idle() and self.held, which=_some, stop=_stop)
    def renew(self, which: int, stop: int | None) -> None:
        """A worker's heartbeat."""
        worker = _pick(self.held, which).worker
        refs = [held.job.ref for held in self.held if held.worker == worker]
        self._act(Task("renew", lambda session: ledger.renew(session, refs, lease_seconds=LONG)), stop)

    @turn(4, _can_end, which=_some, seen=st.booleans(), stop=_stop)
    def die(self, which: int, seen: bool, stop: int | None) -> None:
        """A worker's process dies; its parent reports it, or dies with it."""
        worker = _pick([held for held in self.held if not held.busy], which).worker
        self.held = [held for held in self.held if held.worker != worker or held.busy]
        if seen and not any(held.worker == worker for held in self.held):
            self._act(Task("crash", lambda s: ledger.report_crash(s, worker, max_crashes=3)), stop, worker)

    # --- time, and the reconciler ---

    @turn(6, _some_job("running", "queued", "retry_wait"), what=st.sampled_from(TIMES))
    def pass_time(self, what: str) -> None:
        """Leases run out, retries are due, messages overdue; where an open transaction writes just now, they don't."""
        self._pass_time(what)

    def _pass_time(self, what: str) -> None:
        table = "sources" if what == "next_trial_at" else "jobs"
        self.hands.look.execute(
            f"UPDATE {table} SET {what} = clock_timestamp() - interval '1 day' WHERE id IN"
            f" (SELECT id FROM {table} WHERE {what} > clock_timestamp() - interval '1 hour' FOR UPDATE SKIP LOCKED)"
        )

    @turn(6, _some_job("running", "quarantined"), stop=_stop)
    def reconcile_leases(self, stop: int | None) -> None:
        def work(session: Session) -> None:
            ledger.recover_expired(session, max_lost_leases=4)
            ledger.recover_refused(session, policy=PAUSES, max_attempts=3)

        self._act(Task("expire", work), stop)

    @turn(5, lambda self: (not self.epoch and _can_begin(self)) or _some_job("queued")(self), stop=_stop)
    def reconcile_messages(self, stop: int | None) -> None:
        self._reconcile_messages(stop)

    def _reconcile_messages(self, stop: int | None) -> None:
        """Only the reconciler begins an epoch."""
        if self.epoch is None:
            self.epochs += 1
            self.epoch = f"epoch {self.epochs}"
        epoch, empty = self.epoch, list(Lane) if not self.redis and self.mutant.overdue else []

        def work(session: Session) -> int:
            return ledger.recover_queued(
                session,
                epoch=epoch,
                overdue_seconds=3600,
                empty_lanes=empty,
                # The same rule for a queue that is not empty: taken away with the other.
                lost_seconds=7200 if self.mutant.overdue else 1e9,
            )

        self._act(Task("lost messages", work), stop)

    # --- operators ---

    @turn(4, _some_job("quarantined", "cancelled"), which=st.none() | _ids_drawn, stop=_stop)
    def retry(self, which: list[int] | None, stop: int | None) -> None:
        ids = self._choose(which)
        self._act(
            Task("operator's retry", lambda session: ledger.retry(session, ids, by="me")), stop, f"{ids or 'all'}"
        )

    def _choose(self, which: Iterable[int] | None) -> list[int] | None:
        return None if which is None else sorted({_pick(sorted(self.checks.jobs), index) for index in which})

    @turn(4, _some_job(*ACTIVE_STATES), which=_ids_drawn, stop=_stop)
    def cancel(self, which: list[int], stop: int | None) -> None:
        ids = self._choose(which)
        self._act(Task("operator's cancel", lambda session: ledger.cancel(session, ids, by="me")), stop, f"{ids}")

    @turn(5, _some_job("succeeded"), which=_ids_drawn, stop=_stop)
    def rerun(self, which: list[int], stop: int | None) -> None:
        ids = self._choose(which) or []
        self._act(Task("operator's rerun", lambda session: ledger.rerun(session, ids, by="me")), stop, f"{ids}")

    @turn(1, _some_job(*JobState), key=_some, stop=_stop)
    def erase(self, key: int, stop: int | None) -> None:
        """An object is erased, in all its versions; it may not come back."""
        name = _pick(list(KEYS), key)

        def work(session: Session) -> int:
            return ledger.erase(session, BUCKET, name, by="me")

        self._act(Task("operator's erase", work, lambda _: self.checks.erase(name)), stop, name)

    # --- aggregators ---

    @turn(10, lambda self: self.checks.marks and _can_begin(self), limit=st.sampled_from([1, 2, 50]), stop=_stop)
    def summarize(self, limit: int, stop: int | None) -> None:
        self._act(Task("summarize", lambda session: self._summarize_batch(session, limit)), stop)

    def _summarize_batch(self, session: Session, limit: int) -> tuple[int, int]:
        return (self.mutant.summarize or aggregation.summarize_batch)(session, limit)

    @turn(2, lambda self: self.checks.marks and _can_begin(self), stop=_stop)
    def summarize_outdated(self, stop: int | None) -> None:
        """An aggregator of a version that may not go on. It knows nothing of faces without a mask."""

        def work(session: Session) -> None:
            session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": aggregation.AGGREGATION_LOCK})
            check_part(session, Part.AGGREGATOR, version="0.1.0")
            aggregation.summarize_batch(session, 50)
            session.execute(text("UPDATE compliance_hourly SET faces = faces - without_mask, without_mask = 0"))

        self._act(Task("summarize", work), stop, "by an outdated version")

    @turn(5, lambda self: self.checks.marks and _can_begin(self), limit=st.sampled_from([1, 2, 50]))
    def summarize_slowly(self, limit: int) -> None:
        """An aggregator whose recompute takes long after it has seen what to count."""
        hand = self.hands.idle()
        assert hand is not None
        if hand.pid not in self.slow:
            self.hands.look.execute("SELECT pg_advisory_lock(%s)", (hand.pid,))
            self.slow.add(hand.pid)
        self.summarize(limit, None)

    @turn(6, lambda self: self.slow)
    def hurry(self) -> None:
        """The slow statements come to their end."""
        for pid in sorted(self.slow):
            self.hands.look.execute("SELECT pg_advisory_unlock(%s)", (pid,))
            self.slow.discard(pid)
            self._settle()

    # --- open transactions ---

    @turn(20, lambda self: self.hands.stopped(), which=_some, stop=_stop)
    def go_on(self, which: int, stop: int | None) -> None:
        """A transaction that has stopped goes on."""
        hand = _pick(self.hands.stopped(), which)
        self._tell(hand, "goes on")
        hand.go_on(stop)
        self._settle()

    @turn(3, lambda self: self.hands.stopped(), which=_some)
    def kill(self, which: int) -> None:
        """A process dies in mid-transaction."""
        hand = _pick(self.hands.stopped(), which)
        self._tell(hand, "is killed")
        self._guarded(lambda: self.hands.kill(hand))

    def _act(self, task: Task, stop: int | None, detail: str = "") -> None:
        self.story.append(f"{task.name} {detail}" + ("" if stop is None else f", stops after {stop}"))
        self._guarded(lambda: self.hands.act(task, stop))

    def _settle(self) -> None:
        self._guarded(self.hands.settle)

    def _tell(self, hand: Hand, what: str) -> None:
        assert hand.task is not None
        self.story.append(f"({hand.task.name} {what})")

    def _guarded(self, act: Callable[[], None]) -> None:
        """Whatever goes wrong is told with the story of the example."""
        try:
            act()
        except BrokenPromiseError:
            self.over = True
            raise
        except Exception as error:
            self.over = True
            if self.mutant != Mutant():
                # Not what was planted, or planted in a way that does not run: a fault must be found by what it does.
                self.stage.counts["examples that ended in an error"] += 1
            elif isinstance(error, DeadlockError):
                self.checks.breaks("nobody waits in a circle", str(error))
            else:
                self.checks.breaks("no error but a refusal", f"{type(error).__name__}: {error}")

    # --- the end of an example ---

    def teardown(self) -> None:
        try:
            if not self.over:
                self._work_off()
        finally:
            self.hands.look.execute("SELECT pg_advisory_unlock_all()")
            self.hands.abandon()

    def _work_off(self) -> None:
        """Let everything that is open end, deliver or recover every message, and summarize."""
        self.story.append("(everything is worked off)")
        while self.slow:
            self.hurry()
        while not self.over and self.hands.stopped():
            self.go_on(0, None)
        if self.over:
            return
        for _ in range(30):
            self._one_round()
            if not any(job.state in ACTIVE_STATES for job in self.checks.jobs.values()):
                break
        else:
            stuck = [job for job in self.checks.jobs.values() if job.state in ACTIVE_STATES]
            self.checks.breaks("no job is stuck", f"{stuck}")
        while self.checks.marks:
            self.summarize(50, None)
        self.checks.check_summaries()
        self.checks.check_end()

    def _one_round(self) -> None:
        while self.held:
            self._succeed(self.held[0], 1.0, None)
        for what in TIMES:
            self._pass_time(what)
        self.reconcile_leases(None)
        self._reconcile_messages(None)
        self.wake(6, None)
        self.dispatch(6, 1, None)
        while self.redis:
            self.deliver(0, False, None)


# --- small parts ---


def _pick(choices: Sequence[Any], index: int) -> Any:
    return choices[index % len(choices)]


def _ids(refs: Iterable[JobRef]) -> frozenset[int]:
    return frozenset(ref.id for ref in refs)


def _planned(key: str, seen: Listed, placing: str) -> PlannedObject:
    """As `plan_object` would: placed in time by the key's pattern, without a pattern, or by one that doesn't fit."""
    info = ObjectInfo(BUCKET, key, seen.etag, 1000, seen.modified)
    kind = MediaKind.IMAGE if key.endswith(".jpg") else MediaKind.VIDEO
    if placing == "mismatch":
        return PlannedObject(info, kind, None, Reason.TIME_PATTERN_MISMATCH, "planted")
    at = ObservedAt(KEYS[key], ObservedAtSource.KEY_PATTERN) if placing == "key" else None
    return PlannedObject(info, kind, at)


def _frames(job: ClaimedJob) -> list[FrameFaces]:
    """The frames of a chunk, at whole seconds, one face in each."""
    one: tuple[Face, ...] = (face(),)
    return [
        FrameFaces(float(second), 1.0, one, (1,))
        for second in range(SECONDS[job.etag][1])
        if job.range_start_ms <= second * 1000 and (job.last or second * 1000 < job.range_end_ms)
    ]
