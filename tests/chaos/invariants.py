"""What the ledger and the summaries promise, checked on the committed state after every commit and at the end.

`tests/chaos/actors.py` says here what its actors were told, and nothing else is believed of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from common.domain import ACTIVE_STATES, JobState, Reason
from tests.chaos.harness import RECOMPUTED
from tests.chaos.interleaver import Task

#: What the bytes with an ETag show. Faces of a picture; seconds of a video, by its header and by its frames: one frame
#: with one face each second.
FACES = {"e1": 1, "e2": 2, "e3": 0}
SECONDS = {"e1": (3.0, 3), "e2": (3.0, 5), "e3": (4.0, 4)}

ENDED = frozenset(set(JobState) - set(ACTIVE_STATES))
WITHDRAWN = frozenset({JobState.CANCELLED, JobState.SOURCE_CHANGED})


def _moves(*pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset((old, new) for pair in pairs for old, _, new in [pair.partition(" ")])


#: A newer version of a key, bytes that are back, or a pattern that fits at last may also do this; `_check_move` looks
#: when. With the last an object's jobs start over.
_REGISTER = _moves(
    "new pending", "new quarantined", *(f"{state} pending" for state in JobState),
    *(f"{state} cancelled" for state in JobState if state not in WITHDRAWN),
)  # fmt: skip

#: Tasks that register versions, and so withdraw others: also what an operator had cancelled, under a new reason.
WITHDRAWS = ("register", "source changed")

#: The table of DESIGN: which task may make which transition.
MOVES = {
    "register": _REGISTER,
    "dispatch": _moves("pending queued"),
    "wake": _moves("retry_wait pending"),
    "recall": _moves("queued pending"),
    "claim": _moves("queued running"),
    "renew": _moves(),
    "succeed": _moves("running succeeded"),
    "plan chunks": _moves("running succeeded", "new pending", "cancelled pending", "source_changed pending"),
    "retry later": _moves("running retry_wait", "running quarantined"),
    "refuse": _moves("running retry_wait", "running quarantined"),
    "quarantine": _moves("running quarantined"),
    "source changed": _moves("running source_changed") | _REGISTER,
    "release": _moves("running pending"),
    "expire": _moves("running pending", "running quarantined", "quarantined retry_wait"),
    "crash": _moves("running pending", "running quarantined"),
    "lost messages": _moves("queued pending"),
    "operator's retry": _moves("quarantined pending", "cancelled pending"),
    "operator's cancel": _moves(*(f"{state} cancelled" for state in ACTIVE_STATES)),
    "operator's rerun": _moves("succeeded pending"),
    "operator's erase": _moves(),
    "summarize": _moves(),
}


#: Invariants that are known not to hold yet, and why. The examples in which they break are counted.
OPEN: dict[str, str] = {}


class BrokenPromiseError(AssertionError):
    """Something that is promised does not hold. `promise`: which one; the story says how it came to it."""

    def __init__(self, promise: str, detail: str, story: Sequence[str]) -> None:
        super().__init__(f"{promise}: {detail}\n" + "\n".join(f"  {line}" for line in story))
        self.promise = promise


class Listed(NamedTuple):
    """A version of a key, as a listing shows it."""

    etag: str
    modified: datetime


class JobRow(NamedTuple):
    """A committed job, and whether its media object is the current version of its key."""

    id: int
    token: str
    state: str
    attempt: int
    kind: str
    pipeline: int
    start_ms: int
    end_ms: int
    reason: str | None
    leased: bool
    finished: bool
    media: int
    key: str
    revision: str
    current: bool
    attempts: int


#: All that is looked at after a commit, in one go.
_STATE = """
SELECT (SELECT coalesce(json_agg(json_build_array(j.id, j.token, j.state, j.attempt, j.kind, j.pipeline_id,
               j.range_start_ms, j.range_end_ms, j.reason, j.lease_until IS NOT NULL AND j.worker IS NOT NULL,
               j.finished_at IS NOT NULL, m.id, m.key, m.revision, m.superseded_at IS NULL,
               (SELECT count(*) FROM job_attempts a WHERE a.job_id = j.id)) ORDER BY j.id), '[]')
        FROM jobs j JOIN media_objects m ON m.id = j.media_object_id),
       (SELECT coalesce(json_agg(json_build_array(job_id, frames) ORDER BY id), '[]') FROM frame_counts),
       (SELECT coalesce(json_agg(json_build_array(job_id, offset_seconds, extract(epoch FROM observed_at))
               ORDER BY id), '[]') FROM faces),
       (SELECT coalesce(json_object_agg(key, revision), '{}') FROM media_objects WHERE superseded_at IS NULL),
       (SELECT count(*) FROM dirty_marks)
"""


class Invariants:
    """The check of one example. `story` is told with what breaks; `by_harm`: look only at what is counted and stuck."""

    def __init__(
        self,
        look: psycopg.Connection[Any],
        story: list[str],
        counts: Counter[str],
        broken: list[BrokenPromiseError],
        *,
        by_harm: bool,
    ) -> None:
        self.look, self.story, self.counts, self.broken, self.by_harm = look, story, counts, broken, by_harm
        #: As it was after the last commit.
        self.jobs: dict[int, JobRow] = {}
        self.marks = 0
        #: What actors were told.
        self.claims: Counter[int] = Counter()
        self.refunds: Counter[int] = Counter()
        self.newest: dict[str, Listed] = {}
        self.erased: set[str] = set()
        self._known: set[str] = set()
        self._tokens: dict[int, set[str]] = defaultdict(set)

    def registered(self, listed: dict[str, Listed]) -> None:
        """These versions were registered: from now on nothing older may be current."""
        for key, seen in listed.items():
            if key not in self.erased and (key not in self.newest or seen.modified >= self.newest[key].modified):
                self.newest[key] = seen

    def erase(self, key: str) -> None:
        """This key was erased."""
        self.erased.add(key)
        self.newest.pop(key, None)

    def breaks(self, promise: str, detail: str) -> None:
        """Raises `BrokenPromiseError`, unless that is known."""
        if promise in OPEN:
            self.counts[promise] += promise not in self._known
            self._known.add(promise)
            return
        self.broken.append(BrokenPromiseError(promise, detail, self.story))
        raise self.broken[-1]

    def check(self, task: Task) -> None:
        """The committed state after this task's commit."""
        self.story.append(f"({task.name} commits)")
        row = self.look.execute(_STATE).fetchone()
        assert row is not None
        all_jobs, counted, found, current, marks = row
        jobs = {each[0]: JobRow(*each) for each in all_jobs}
        self._check_moves(task, jobs)
        if not self.by_harm:
            self._check_attempts(jobs)
        self._check_rows(jobs, counted, found)
        if self.erased & {job.key for job in jobs.values()}:
            self.breaks("what was erased stays out", f"{sorted(self.erased)}: {list(jobs.values())}")
        for key, revision in current.items():
            if key in self.newest and revision != self.newest[key].etag:
                self.breaks("the newest version is current", f"{key} is {revision}, known {self.newest[key]}")
                self.newest[key] = self.newest[key]._replace(etag=revision)
        if task.name == "summarize" and not marks:
            self.check_summaries()
        self.jobs, self.marks = jobs, marks

    def _check_moves(self, task: Task, jobs: dict[int, JobRow]) -> None:
        for job in jobs.values():
            old = self.jobs.get(job.id)
            state = old.state if old else "new"
            if not self.by_harm:
                if (state, job.state) != (job.state, state):
                    self._check_move(task, old, job)
                elif (
                    old
                    and old.token != job.token
                    and not (task.name in WITHDRAWS and (job.reason != old.reason or job.state == "pending"))
                    # Sent anew, ahead of live footage or in turns with others.
                    and not (task.name == "dispatch" and job.state == "queued")
                ):
                    self.breaks("a token changes with a transition only", f"{task.name}: {job}")
            self._tokens[job.id].add(job.token)

    def _check_move(self, task: Task, old: JobRow | None, job: JobRow) -> None:
        state = old.state if old else "new"
        what = f"{task.name} made {state} → {job.state}: {job}"
        if (state, job.state) not in MOVES[task.name]:
            self.breaks("only the transitions of the table", what)
        if task.jobs is not None and job.id not in task.jobs:
            self.breaks("nobody moves another's job", what)
        if job.token in self._tokens[job.id]:
            self.breaks("every transition changes the token", what)
        replanned = job.kind == "chunk" and task.name in WITHDRAWS
        if job.state == "cancelled" and job.current and task.name != "operator's cancel" and not replanned:
            self.breaks("cancelled by a newer version or an operator only", what)
        came_back = old is not None and not old.current and job.current
        if old and old.state in WITHDRAWN and task.name in WITHDRAWS and not came_back:
            self.breaks("withdrawn until its bytes are back", what)
        if (job.state in ENDED) != job.finished or (job.state == "running") != job.leased:
            self.breaks("an ended job has its time, a running one its lease", what)

    def _check_attempts(self, jobs: dict[int, JobRow]) -> None:
        for job in jobs.values():
            if job.attempt != self.claims[job.id] - self.refunds[job.id]:
                self.breaks("an attempt for every claim, less the refunds", f"{job}: {self.claims[job.id]} claims")
            if job.attempts + (job.state == "running") != self.claims[job.id]:
                self.breaks("every attempt is told", f"{job}: {self.claims[job.id]} claims")

    def _check_rows(
        self, jobs: dict[int, JobRow], counted: list[tuple[int, int]], found: list[tuple[int, float, float]]
    ) -> None:
        frames: dict[int, list[int]] = defaultdict(list)
        for job_id, count in counted:
            frames[job_id].append(count)
        #: By job, the offset of each face's frame and when its video began.
        faces: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for job_id, offset, at in found:
            faces[job_id].append((offset, at - offset))
        for job_id in {*frames, *faces}:
            if job_id not in jobs:
                self.breaks("what was erased stays out", f"rows of job {job_id}")
            if jobs[job_id].state != "succeeded" or not jobs[job_id].current:
                self.breaks("rows of succeeded jobs of current versions only", f"{jobs[job_id]}")
        videos: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
        for job in jobs.values():
            if job.kind == "image" and job.state == "succeeded":
                if frames[job.id] != [1] or len(faces[job.id]) != FACES[job.revision]:
                    self.breaks("a picture counts once", f"{job}: {frames[job.id]} frames, {len(faces[job.id])} faces")
            elif job.kind == "chunk":
                videos[job.media, job.pipeline] += faces[job.id]
                if sum(frames[job.id]) != len(faces[job.id]):
                    self.breaks("a frame counts once", f"{job}: {frames[job.id]} frames, {len(faces[job.id])} faces")
        for video, seen in videos.items():
            if len({offset for offset, _ in seen}) != len(seen):
                self.breaks("a frame counts once", f"{video}: {sorted(offset for offset, _ in seen)}")
            if len({began for _, began in seen}) > 1:
                self.breaks("a recording begins once", f"{video}: {seen}")

    def check_summaries(self) -> None:
        """Once no mark is left."""
        found = self.look.execute(RECOMPUTED.encode()).fetchone()
        assert found is not None
        if different := found[0]:
            self.breaks("summaries equal a recompute", f"{different} rows differ")

    def check_end(self) -> None:
        """Once everything is worked off."""
        offsets: dict[tuple[int, int], set[int]] = defaultdict(set)
        for media, pipeline, offset in self.look.execute(
            "SELECT media_object_id, pipeline_id, offset_seconds::int FROM faces"
        ):
            offsets[media, pipeline].add(offset)
        current = [job for job in self.jobs.values() if job.current]
        for job in current:
            if job.state != "succeeded" and job.reason is None:
                self.breaks("what did not succeed has a reason", f"{job}")
            if job.state in WITHDRAWN and job.kind != "chunk" and job.reason != Reason.CANCELLED_BY_OPERATOR:
                self.breaks("a current version is not withdrawn", f"{job}")
            if job.kind == "probe" and job.state == "succeeded":
                self._check_video(job, [each for each in current if _chunk_of(each, job)], offsets)

    def _check_video(self, probe: JobRow, chunks: list[JobRow], offsets: dict[tuple[int, int], set[int]]) -> None:
        planned = [each for each in chunks if each.state not in WITHDRAWN or each.reason == "cancelled_by_operator"]
        expected = set(range(SECONDS[probe.revision][1]))
        complete = planned and all(chunk.state == "succeeded" for chunk in planned)
        if not planned or (complete and offsets[probe.media, probe.pipeline] != expected):
            self.breaks("every frame counts", f"{probe}: {sorted(offsets[probe.media, probe.pipeline])} of {planned}")


def _chunk_of(job: JobRow, probe: JobRow) -> bool:
    return job.kind == "chunk" and (job.media, job.pipeline) == (probe.media, probe.pipeline)
