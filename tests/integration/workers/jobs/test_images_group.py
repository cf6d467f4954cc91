"""A group of image jobs in this process, with an analyser that does what each test needs: leases and their
heartbeat, limits and draining, failures, versions that change meanwhile, and reading ahead."""

from __future__ import annotations

import io
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.domain import (
    Face,
    JobKind,
    JobRef,
    Lane,
    MaskwatchError,
    MediaKind,
    ObservedAt,
    ObservedAtSource,
    PermanentJobError,
    Reason,
    TransientJobError,
)
from common.ledger import ClaimedJob
from common.models.pipeline import pipeline_spec
from common.planning import PlannedObject
from common.settings import Settings, get_settings
from common.storage.opening import open_bucket
from tests.ledger_rows import NOON, dispatch, face, register, rows, scalar
from tests.mutants import UNFENCED_SUCCESS, planted
from tests.services import Bucket, wait_until
from workers.jobs import images, models
from workers.jobs.attempts import UnfitWorkerError
from workers.jobs.images import prefetched
from workers.jobs.run import run_jobs


@dataclass
class FakeAnalyzer:
    """Finds one face in each picture, after doing what the test asks for that picture."""

    while_analyzing: dict[int, Callable[[], None]] = field(default_factory=dict)
    #: The numbers of the pictures that were analysed, in order.
    seen: list[int] = field(default_factory=list)

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        number = int(image_rgb[0, 0, 0])
        self.seen.append(number)
        self.while_analyzing.get(number, lambda: None)()
        return [face()]


@pytest.fixture
def analyzer(monkeypatch: pytest.MonkeyPatch) -> FakeAnalyzer:
    fake = FakeAnalyzer()
    monkeypatch.setattr(models, "analyzer", lambda spec, threads: fake)
    return fake


def image(number: int, revision: int = 0) -> bytes:
    """A picture that tells its number, lossless."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (number, revision, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def plan(session: Session, bucket: Bucket, number: int, revision: int = 0) -> None:
    """Put a picture into the bucket, or replace it, and register what lies there."""
    key = f"{number}.png"
    bucket.put(key, image(number, revision))
    found = open_bucket(bucket.uri).stat(key)
    register(session, PlannedObject(found, MediaKind.IMAGE, ObservedAt(NOON, ObservedAtSource.KEY_PATTERN)))


def plan_group(session: Session, bucket: Bucket, count: int) -> list[JobRef]:
    """Pictures 1 to `count`, on their way to a worker in one message."""
    for number in range(1, count + 1):
        plan(session, bucket, number)
    return dispatch(session)


def analyze(refs: Sequence[JobRef], **options: Any) -> int:
    return run_jobs(refs, worker="test/1", settings=get_settings(), **options)


#: Of each job in its order: key, state, attempt, reason, detail.
JOBS = (
    "SELECT m.key, j.state, j.attempt, j.reason, j.detail FROM jobs j"
    " JOIN media_objects m ON m.id = j.media_object_id ORDER BY j.id"
)
FACES = "SELECT m.key FROM faces f JOIN media_objects m ON m.id = f.media_object_id ORDER BY f.id"
ATTEMPTS = (
    "SELECT m.key, a.attempt, a.outcome FROM job_attempts a JOIN jobs j ON j.id = a.job_id"
    " JOIN media_objects m ON m.id = j.media_object_id ORDER BY a.id"
)


def succeeded(number: int, attempt: int = 1) -> tuple[object, ...]:
    return (f"{number}.png", "succeeded", attempt, None, None)


def pending(number: int, attempt: int = 0) -> tuple[object, ...]:
    return (f"{number}.png", "pending", attempt, None, None)


# --- leases -----------------------------------------------------------------------------------------------


def outlast_the_lease(session: Session) -> None:
    """A picture that takes longer than its first lease, by the database's clock, beside a busy reconciler."""
    until = scalar(session, "SELECT max(lease_until) + interval '1 second' FROM jobs")

    def over() -> bool:
        passed = bool(scalar(session, "SELECT clock_timestamp() > :until", until=until))
        ledger.recover_expired(session, max_lost_leases=10)
        session.commit()
        return passed

    wait_until(over, what="a whole lease")


def test_the_heartbeat_keeps_the_lease_of_an_image_that_takes_longer(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(ledger__lease_seconds=2, ledger__heartbeat_seconds=0.1)
    analyzer.while_analyzing[1] = lambda: outlast_the_lease(session)
    assert analyze(plan_group(session, bucket, 2)) == 2
    assert rows(session, JOBS) == [succeeded(1), succeeded(2)]
    assert scalar(session, "SELECT sum(lost_leases) FROM jobs") == 0
    assert scalar(session, "SELECT count(*) FROM faces") == 2


def test_without_a_heartbeat_in_time_the_lease_is_lost_and_the_commit_refused(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(ledger__lease_seconds=2, ledger__heartbeat_seconds=60)
    analyzer.while_analyzing[1] = lambda: outlast_the_lease(session)
    assert analyze(plan_group(session, bucket, 1)) == 0
    assert rows(session, "SELECT state, lost_leases FROM jobs") == [("pending", 1)]
    assert scalar(session, "SELECT count(*) FROM faces") == 0
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 0
    # Whoever gets it next does it once.
    del analyzer.while_analyzing[1]
    assert analyze(dispatch(session, isolated=True)) == 1
    assert rows(session, ATTEMPTS) == [("1.png", 1, "lease_expired"), ("1.png", 2, "succeeded")]
    assert scalar(session, "SELECT count(*) FROM faces") == 1


def test_without_progress_leases_run_out_and_with_it_they_are_renewed_again(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(ledger__lease_seconds=0.5, ledger__heartbeat_seconds=0.1, ledger__stall_seconds=1.5)
    held = "SELECT count(*) FROM jobs WHERE state = 'running' AND lease_until > clock_timestamp()"
    analyzer.while_analyzing = {
        1: lambda: wait_until(lambda: scalar(session, held) == 0, what="the end of the leases"),
        2: lambda: wait_until(lambda: scalar(session, held) == 1, what="a renewed lease"),
    }
    # Nobody looked for expired leases meanwhile, so the jobs are still ours.
    assert analyze(plan_group(session, bucket, 2)) == 2
    assert rows(session, JOBS) == [succeeded(1), succeeded(2)]


def test_a_job_that_was_lost_before_its_turn_is_not_begun(
    session: Session,
    bucket: Bucket,
    analyzer: FakeAnalyzer,
    configure: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(ledger__heartbeat_seconds=0.1)
    beats: list[int] = []
    renew = ledger.renew

    def counted(session: Session, refs: Sequence[JobRef], *, lease_seconds: float) -> set[int]:
        beats.append(len(refs))
        return renew(session, refs, lease_seconds=lease_seconds)

    monkeypatch.setattr(ledger, "renew", counted)

    def replace_the_second() -> None:
        plan(session, bucket, 2, revision=1)
        # The next beat sees that the job is lost, and has said so when the one after it begins.
        begun = len(beats)
        wait_until(lambda: len(beats) >= begun + 2, what="two heartbeats")

    analyzer.while_analyzing[1] = replace_the_second
    assert analyze(plan_group(session, bucket, 3)) == 2
    assert analyzer.seen == [1, 3]
    states = [(row.key, row.state) for row in rows(session, JOBS)]
    assert states == [("1.png", "succeeded"), ("2.png", "cancelled"), ("3.png", "succeeded"), ("2.png", "pending")]


# --- being asked to stop ----------------------------------------------------------------------------------


def assert_only_the_first_was_done(session: Session) -> None:
    assert rows(session, JOBS) == [succeeded(1), pending(2), pending(3)]
    assert sorted(rows(session, ATTEMPTS)) == [
        ("1.png", 1, "succeeded"),
        ("2.png", 1, "released"),
        ("3.png", 1, "released"),
    ]
    assert analyze(dispatch(session)) == 2
    assert rows(session, JOBS) == [succeeded(1), succeeded(2), succeeded(3)]


def test_out_of_time_what_is_not_begun_is_released(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(worker__soft_time_limit_seconds=2)
    analyzer.while_analyzing[1] = lambda: time.sleep(2)
    assert analyze(plan_group(session, bucket, 3)) == 1
    assert analyzer.seen == [1]
    assert_only_the_first_was_done(session)


def test_a_draining_worker_ends_its_image_and_releases_the_rest(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer
) -> None:
    draining = threading.Event()
    analyzer.while_analyzing[1] = draining.set
    assert analyze(plan_group(session, bucket, 3), draining=draining.is_set) == 1
    assert analyzer.seen == [1]
    assert_only_the_first_was_done(session)


def test_a_worker_that_drains_already_begins_nothing(session: Session, bucket: Bucket, analyzer: FakeAnalyzer) -> None:
    assert analyze(plan_group(session, bucket, 2), draining=lambda: True) == 0
    assert analyzer.seen == []
    assert rows(session, JOBS) == [pending(1), pending(2)]


def test_a_worker_that_cannot_load_the_models_gives_its_jobs_back(
    session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(spec: object, threads: int) -> None:
        raise MaskwatchError("no such weights here")

    monkeypatch.setattr(models, "analyzer", missing)
    with pytest.raises(UnfitWorkerError, match="no such weights here"):
        analyze(plan_group(session, bucket, 2))
    assert rows(session, JOBS) == [pending(1), pending(2)]


def test_leases_are_kept_while_models_are_loaded(
    session: Session,
    bucket: Bucket,
    analyzer: FakeAnalyzer,
    configure: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(ledger__lease_seconds=1, ledger__heartbeat_seconds=0.1)
    expired: list[int] = []

    def load_slowly(spec: object, runtime: object) -> FakeAnalyzer:
        if not expired:
            time.sleep(2.5)
            with Session(session.bind) as other:
                expired.append(ledger.recover_expired(other, max_lost_leases=10))
        return analyzer

    monkeypatch.setattr(models, "analyzer", load_slowly)
    assert analyze(plan_group(session, bucket, 2)) == 2
    assert expired == [0]


# --- failures ---------------------------------------------------------------------------------------------


def fail() -> None:
    raise ZeroDivisionError("nobody thought of this")


@pytest.mark.parametrize(("max_attempts", "state"), [(2, "retry_wait"), (1, "quarantined")])
def test_an_unexpected_error_concerns_its_own_image(
    session: Session,
    bucket: Bucket,
    analyzer: FakeAnalyzer,
    configure: Callable[..., Settings],
    max_attempts: int,
    state: str,
) -> None:
    configure(ledger__max_attempts=max_attempts)
    analyzer.while_analyzing[2] = fail
    assert analyze(plan_group(session, bucket, 3)) == 2
    first, second, third = rows(session, JOBS)
    assert (first, third) == (succeeded(1), succeeded(3))
    assert tuple(second)[:4] == ("2.png", state, 1, "unexpected_error")
    assert "ZeroDivisionError: nobody thought of this" in second.detail and f"{bucket.uri}/2.png" in second.detail
    assert scalar(session, "SELECT count(next_run_at) FROM jobs") == (state == "retry_wait")
    assert scalar(session, "SELECT count(*) FROM faces") == 2


@pytest.mark.parametrize("fence", [True, False])
def test_a_version_that_was_replaced_meanwhile_leaves_nothing(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, fence: bool
) -> None:
    # Without the fence it would: what keeps the old version out is nothing else.
    analyzer.while_analyzing[1] = lambda: plan(session, bucket, 1, revision=1)
    with nullcontext() if fence else planted(UNFENCED_SUCCESS):
        done = analyze(plan_group(session, bucket, 2))
    stored = [row.key for row in rows(session, FACES)]
    states = [(row.key, row.state) for row in rows(session, JOBS)]
    if fence:
        assert done == 1 and stored == ["2.png"]
        assert states == [("1.png", "cancelled"), ("2.png", "succeeded"), ("1.png", "pending")]
        assert scalar(session, "SELECT count(*) FROM frame_counts") == 1
    else:
        assert done == 2 and stored == ["1.png", "2.png"]
        assert states == [("1.png", "succeeded"), ("2.png", "succeeded"), ("1.png", "pending")]


# --- reading ahead ----------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What `prefetched` has asked its threads for, and what they read."""

    fails: dict[int, Exception] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def read(self, job: ClaimedJob, settings: Settings) -> bytes:
        if job.ref.id in self.fails:
            raise self.fails[job.ref.id]
        return image(job.ref.id)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    reading = Reading()

    class Pool(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
            reading.asked.append(args[0].ref.id)
            return super().submit(fn, *args, **options)

    monkeypatch.setattr(images, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(images, "_read", reading.read)
    return reading


def claimed(sizes: Sequence[int]) -> list[ClaimedJob]:
    """Jobs 1, 2, ... of objects of these sizes. Nothing of them is in the ledger."""
    spec = pipeline_spec(get_settings())
    return [
        ClaimedJob(
            ref=JobRef(number, uuid.uuid4()),
            kind=JobKind.IMAGE,
            attempt=1,
            media_object_id=number,
            source_id=1,
            bucket="s3://footage",
            key=f"{number}.png",
            etag="e",
            size_bytes=size,
            last_modified=NOON,
            observed_at=None,
            location_id=1,
            time_zone="UTC",
            camera_id=None,
            pipeline_id=1,
            backfill_id=None,
            lane=Lane.BACKFILL,
            stored_spec=spec.as_dict(),
        )
        for number, size in enumerate(sizes, start=1)
    ]


def ahead_at_each_turn(sizes: Sequence[int], reading: Reading, settings: Settings) -> list[list[int]]:
    """The sizes of what is fetched ahead while each object has its turn; checks their order on the way."""
    ahead = []
    for turn, (job, read) in enumerate(prefetched(claimed(sizes), settings), start=1):
        assert job.ref.id == turn and read() == image(turn)
        assert reading.asked == list(range(1, len(reading.asked) + 1))
        ahead.append([sizes[number - 1] for number in reading.asked[turn:]])
    assert len(ahead) == len(sizes) == len(reading.asked)
    return ahead


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_as_many_objects_as_allowed_are_fetched_ahead(
    reading: Reading, configure: Callable[..., Settings], allowed: int
) -> None:
    settings = configure(worker__prefetch_objects=allowed)
    ahead = ahead_at_each_turn([1000] * 10, reading, settings)
    assert [len(sizes) for sizes in ahead] == [min(allowed, 9 - turn) for turn in range(10)]


def test_no_more_bytes_than_allowed_are_fetched_ahead(reading: Reading, configure: Callable[..., Settings]) -> None:
    settings = configure(worker__prefetch_objects=4, worker__prefetch_bytes=100)
    ahead = ahead_at_each_turn([40, 40, 40, 500, 10, 10, 60, 100, 1], reading, settings)
    # What alone is larger than allowed is read when its turn comes, not before.
    assert ahead == [[40], [40], [], [], [10, 60], [60], [], [], []]
    assert all(sum(sizes) <= 100 for sizes in ahead)


def test_two_objects_are_read_at_once(
    reading: Reading, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=60)

    def read(job: ClaimedJob, settings: Settings) -> bytes:
        both.wait()  # breaks unless another read comes to meet this one
        return reading.read(job, settings)

    monkeypatch.setattr(images, "_read", read)
    ahead_at_each_turn([1000] * 4, reading, configure(worker__prefetch_objects=1))


def test_who_stops_early_leaves_the_rest_unread(
    reading: Reading, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    stopping = threading.Event()

    def read(job: ClaimedJob, settings: Settings) -> bytes:
        begun.append(job.ref.id)
        stopping.wait(60)
        return reading.read(job, settings)

    class Pool(images.ThreadPoolExecutor):
        def shutdown(self, *args: Any, **options: Any) -> None:
            stopping.set()
            super().shutdown(*args, **options)

    monkeypatch.setattr(images, "_read", read)
    monkeypatch.setattr(images, "ThreadPoolExecutor", Pool)
    jobs = prefetched(claimed([1000] * 10), configure(worker__prefetch_objects=4))
    next(jobs)
    wait_until(lambda: len(begun) == 2, what="two reads")
    jobs.close()
    assert reading.asked == [1, 2, 3, 4, 5] and sorted(begun) == [1, 2]


def test_an_error_in_reading_belongs_to_its_own_image(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, reading: Reading
) -> None:
    refs = plan_group(session, bucket, 5)
    reading.fails = {
        2: TransientJobError(Reason.STORAGE_UNAVAILABLE, "cut off"),
        4: PermanentJobError(Reason.OBJECT_GONE, "gone"),
    }
    assert analyze(refs) == 3
    assert analyzer.seen == [1, 3, 5]
    assert [(row.key, row.state, row.reason) for row in rows(session, JOBS)] == [
        ("1.png", "succeeded", None),
        ("2.png", "retry_wait", "storage_unavailable"),
        ("3.png", "succeeded", None),
        ("4.png", "quarantined", "object_gone"),
        ("5.png", "succeeded", None),
    ]


# --- recording together -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "transactions"), [(60, 1), (0, 4)])
def test_images_are_recorded_together(
    session: Session,
    bucket: Bucket,
    analyzer: FakeAnalyzer,
    configure: Callable[..., Settings],
    seconds: int,
    transactions: int,
) -> None:
    configure(worker__record_seconds=seconds)
    assert analyze(plan_group(session, bucket, 4)) == 4
    assert rows(session, JOBS) == [succeeded(number) for number in range(1, 5)]
    assert scalar(session, "SELECT count(DISTINCT xmin::text) FROM frame_counts") == transactions
    assert scalar(session, "SELECT count(*) FROM frame_counts") == scalar(session, "SELECT count(*) FROM faces") == 4
    assert [row.outcome for row in rows(session, ATTEMPTS)] == ["succeeded"] * 4


def test_one_that_was_lost_does_not_keep_the_others_out(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    # No heartbeat tells of it in time.
    configure(worker__record_seconds=60, ledger__heartbeat_seconds=600, ledger__lease_seconds=1800)
    analyzer.while_analyzing[2] = lambda: plan(session, bucket, 1, revision=1)
    assert analyze(plan_group(session, bucket, 3)) == 2
    assert [(row.key, row.state) for row in rows(session, JOBS)] == [
        ("1.png", "cancelled"),
        ("2.png", "succeeded"),
        ("3.png", "succeeded"),
        ("1.png", "pending"),
    ]
    assert [row.key for row in rows(session, FACES)] == ["2.png", "3.png"]
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 2


def test_what_can_not_be_recorded_is_told_of_each(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(worker__record_seconds=60)

    def purge() -> None:
        session.execute(
            text(
                "WITH done AS (INSERT INTO operator_actions (action, \"by\") VALUES ('purge', 'test') RETURNING id)"
                " INSERT INTO purges (before, action_id) SELECT now(), id FROM done"
            )
        )
        session.commit()

    analyzer.while_analyzing[2] = purge
    assert analyze(plan_group(session, bucket, 2)) == 0
    found = rows(session, JOBS)
    assert [(row.key, row.state, row.reason) for row in found] == [
        ("1.png", "quarantined", "purged"),
        ("2.png", "quarantined", "purged"),
    ]
    assert scalar(session, "SELECT count(*) FROM faces") == scalar(session, "SELECT count(*) FROM frame_counts") == 0


def test_what_is_analysed_is_recorded_before_the_rest_is_given_back(
    session: Session, bucket: Bucket, analyzer: FakeAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(worker__record_seconds=60)
    assert analyze(plan_group(session, bucket, 3), draining=lambda: len(analyzer.seen) == 2) == 2
    assert rows(session, JOBS) == [succeeded(1), succeeded(2), pending(3)]
