"""Probes and chunks in this process, from an object in a bucket to rows, with an analyser that reads the frames'
numbers: chunk lengths, draining, limits, and what a worker that died in mid-chunk leaves behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import places
from common.domain import Face, JobRef, Lane, MaskStatus, MediaKind, ObservedAt, ObservedAtSource
from common.models.pipeline import pipeline_spec
from common.observability import metrics
from common.planning import PlannedObject
from common.settings import Settings, get_settings
from common.storage.opening import open_bucket
from tests.ledger_rows import dispatch, rows, scalar, states
from tests.mutants import UNFENCED, planted
from tests.services import Bucket, Services
from tests.videos import make_video, number_of
from workers.jobs import models
from workers.jobs.run import run_jobs

#: Nine seconds before an hour begins.
BEGAN = datetime(2026, 3, 2, 11, 59, 51, tzinfo=UTC)


@dataclass
class ReadingAnalyzer:
    """Finds a face in each frame but every third, at a place that tells the frame's number."""

    numbers: list[int] = field(default_factory=list)
    sizes: set[tuple[int, ...]] = field(default_factory=set)
    #: Called with the number of each frame before it is analysed.
    before: Callable[[int], None] = lambda number: None

    def analyze(self, image_rgb: NDArray[np.uint8]) -> list[Face]:
        height, width = image_rgb.shape[:2]
        # The numbers are written across: of a turned video they are read with the head on the side.
        number = number_of(image_rgb if width > height else np.rot90(image_rgb, -1))
        self.before(number)
        self.numbers.append(number)
        self.sizes.add(image_rgb.shape)
        if number % 3 == 2:
            return []
        return [Face(number, 1, number + 8, 9, 0.9, 0.8, 0.2, MaskStatus.WITH_MASK)]

    def analyze_batch(self, frames_rgb: Sequence[NDArray[np.uint8]]) -> list[list[Face]]:
        return [self.analyze(frame) for frame in frames_rgb]


@pytest.fixture
def analyzer(monkeypatch: pytest.MonkeyPatch) -> ReadingAnalyzer:
    fake = ReadingAnalyzer()
    monkeypatch.setattr(models, "analyzer", lambda spec, runtime: fake)
    return fake


def plan(session: Session, bucket: Bucket, key: str, content: bytes) -> None:
    """Put a video into the bucket and register what lies there, in a zone whose hours begin at half past in UTC."""
    bucket.put(key, content)
    location = places.add_location(session, "lobby", "UTC")
    pipeline = places.ensure_pipeline(session, pipeline_spec(get_settings()))
    location.promoted_pipeline_id = pipeline.id
    found = PlannedObject(
        open_bucket(bucket.uri).stat(key), MediaKind.VIDEO, ObservedAt(BEGAN, ObservedAtSource.KEY_PATTERN)
    )
    ledger.register(session, [found], location=location, camera=None, pipeline=pipeline, lane=Lane.BACKFILL)
    session.commit()


def run(refs: Sequence[JobRef], **options: Any) -> int:
    return run_jobs(refs, worker="test/1", settings=get_settings(), **options)


def run_all(session: Session) -> int:
    """Do what is to be done until nothing is; returns how many jobs succeeded."""
    done = 0
    while refs := dispatch(session):
        done += sum(run([ref]) for ref in refs)
    return done


FACES = "SELECT observed_at, offset_seconds, x1 FROM faces ORDER BY observed_at, x1"
FRAMES = "SELECT hour, sum(frames), round(sum(seconds)::numeric, 6) FROM frame_counts GROUP BY hour ORDER BY hour"

#: Over the hour, with B-frames; at a variable rate from an odd start; turned by a quarter.
VIDEOS: dict[str, bytes] = {}


def video(name: str) -> bytes:
    """One of the generated videos, made once."""
    if name not in VIDEOS:
        steps = [Fraction(step) for step in ("0.04", "0.3", "1.7", "0.1", "0.52")] * 9
        times = [sum(steps[:n], Fraction(0)) for n in range(len(steps))]
        VIDEOS[name] = {
            "steady.mp4": lambda: make_video("mp4", frames=120, bframes=2, gop=30),
            "long-gop.ts": lambda: make_video("mpegts", frames=120, bframes=3, gop=500, start=5),
            "variable.mkv": lambda: make_video("matroska", frames=45, times=times, start=Fraction("3.3")),
            "turned.mov": lambda: make_video("mov", frames=120, rotation=90),
        }[name]()
    return VIDEOS[name]


@pytest.mark.parametrize("name", ["steady.mp4", "long-gop.ts", "variable.mkv", "turned.mov"])
def test_every_chunk_length_gives_the_rows_of_one_chunk(
    services: Services,
    session: Session,
    bucket: Bucket,
    analyzer: ReadingAnalyzer,
    configure: Callable[..., Settings],
    name: str,
) -> None:
    seen = []
    for chunk_seconds in (3600, 1, 2.5, 7):
        configure(worker__chunk_seconds=chunk_seconds, pipeline__sample_fps=2, storage__block_bytes=4096)
        session.rollback()
        services.empty()
        analyzer.numbers.clear()
        plan(session, bucket, name, video(name))
        run_all(session)
        assert set(states(session)) == {"succeeded"}
        seen.append((sorted(analyzer.numbers), rows(session, FACES), rows(session, FRAMES)))
        chunks = scalar(session, "SELECT count(*) FROM jobs WHERE kind = 'chunk'")
        assert (chunks == 1) == (chunk_seconds == 3600)
    assert seen[1:] == seen[:1] * 3
    numbers, faces, frames = seen[0]
    assert len(numbers) == len(set(numbers)) == sum(count for _, count, _ in frames) and len(frames) == 2
    assert [row.x1 for row in faces] == [number for number in numbers if number % 3 != 2]
    assert all(row.observed_at == BEGAN + timedelta(seconds=row.offset_seconds) for row in faces)
    if name == "steady.mp4":
        # What the rule says of ten frames a second: each fifth; and no second is counted twice.
        assert numbers == list(range(0, 120, 5))
        assert [(row[1], float(row[2])) for row in frames] == [(18, 9.0), (6, 3.0)]
    if name == "turned.mov":
        assert analyzer.sizes == {(64, 48, 3)}


def test_frames_without_a_face_count_and_nothing_is_stored_of_them(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(pipeline__sample_fps=10)
    plan(session, bucket, "short.mp4", make_video("mp4", frames=6))
    run_all(session)
    assert (scalar(session, "SELECT sum(frames) FROM frame_counts"), scalar(session, "SELECT count(*) FROM faces")) == (
        6,
        4,
    )


def test_damage_in_the_middle_is_told_and_the_rest_analysed(
    session: Session,
    bucket: Bucket,
    analyzer: ReadingAnalyzer,
    configure: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A decoder makes up for a frame or two at the edges of the damage, and what they show is nothing to read.
    monkeypatch.setattr(analyzer, "analyze", lambda image_rgb: analyzer.numbers.append(0) or [])
    configure(pipeline__sample_fps=1)
    whole = make_video("mp4", frames=200, gop=10, size=(160, 120), muxer={"movflags": "faststart"})
    payload = whole.find(b"mdat") + 8
    first, last = (payload + (len(whole) - payload) * part // 4 for part in (1, 2))
    plan(session, bucket, "scratched.mp4", whole[:first] + bytes(last - first) + whole[last:])
    assert run_all(session) == 2
    (row,) = rows(session, "SELECT state, reason, detail FROM jobs WHERE kind = 'chunk'")
    assert (row.state, row.reason) == ("succeeded", "damaged_video")
    lost = 20 - len(analyzer.numbers)
    assert 2 <= lost <= 8 and f"{lost} of the frames" in row.detail
    assert scalar(session, "SELECT sum(frames) FROM frame_counts") == 20 - lost


def test_work_without_a_wanted_frame_is_noticed_as_progress_and_can_be_stopped(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, configure: Callable[..., Settings]
) -> None:
    """A chunk that has to come from far away looks up on its way, and not only when it has arrived."""
    configure(pipeline__sample_fps=0.01)  # the second frame would be wanted after 100 s
    plan(session, bucket, "a.mp4", video("steady.mp4"))
    run(dispatch(session))
    asked = iter([False, False])
    assert run(dispatch(session), draining=lambda: next(asked, True)) == 0
    assert rows(session, "SELECT state FROM jobs WHERE kind = 'chunk'") == [("pending",)]


def test_a_drained_worker_gives_its_chunk_back(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(worker__batch_frames=1)
    plan(session, bucket, "a.mp4", video("steady.mp4"))
    run(dispatch(session))
    asked: list[bool] = []
    analyzer.before = lambda number: asked.append(True) if number == 50 else None
    refs = dispatch(session)
    assert run(refs, draining=lambda: bool(asked)) == 0
    assert rows(session, "SELECT state, attempt FROM jobs WHERE kind = 'chunk'") == [("pending", 0)]
    assert scalar(session, "SELECT count(*) FROM faces") == 0
    assert max(analyzer.numbers) == 50
    assert run_all(session) == 1
    assert scalar(session, "SELECT sum(frames) FROM frame_counts") == 12


def test_a_chunk_that_takes_too_long_is_tried_once_more_and_says_so(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(
        worker__batch_frames=1,
        worker__soft_time_limit_seconds=1,
        ledger__retry_base_seconds=0.01,
    )
    plan(session, bucket, "a.mp4", video("steady.mp4"))
    run(dispatch(session))
    analyzer.before = lambda number: time.sleep(0.6)
    run(dispatch(session))
    assert rows(session, "SELECT state, reason FROM jobs WHERE kind = 'chunk'") == [("retry_wait", "time_limit")]
    time.sleep(0.05)
    ledger.wake_retries(session, limit=100)
    run(dispatch(session))
    (row,) = rows(session, "SELECT state, reason, detail FROM jobs WHERE kind = 'chunk'")
    assert (row.state, row.reason) == ("quarantined", "time_limit") and "CHUNK_SECONDS" in row.detail


def test_a_chunk_that_was_lost_meanwhile_is_left(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, configure: Callable[..., Settings]
) -> None:
    configure(worker__batch_frames=1, ledger__heartbeat_seconds=0.05)
    plan(session, bucket, "a.mp4", video("steady.mp4"))
    run(dispatch(session))

    def lose(number: int) -> None:
        if number == 20:
            ledger.report_crash(session, "test/1", max_crashes=3)
            session.commit()
        if number >= 20:
            time.sleep(0.2)  # a few heartbeats, which notice

    analyzer.before = lose
    assert run(dispatch(session)) == 0
    assert max(analyzer.numbers) <= 40
    assert rows(session, "SELECT state FROM jobs WHERE kind = 'chunk'") == [("pending",)]
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 0


@pytest.mark.parametrize("fence", [True, False])
def test_a_message_that_comes_twice_changes_nothing_because_of_the_fence(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, fence: bool
) -> None:
    plan(session, bucket, "a.mp4", video("steady.mp4"))
    run(dispatch(session))
    refs = dispatch(session)
    assert run(refs) == 1
    with nullcontext() if fence else planted(*UNFENCED):
        assert run(refs) == (0 if fence else 1)
    assert scalar(session, "SELECT sum(frames) FROM frame_counts") == (12 if fence else 24)


def test_probes_and_chunks_need_no_message_of_their_own(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, configure: Callable[..., Settings]
) -> None:
    """A message names ids and tokens, and the ledger says what they are."""
    plan(session, bucket, "a.mp4", video("steady.mp4"))
    plan(session, bucket, "b.ts", video("long-gop.ts"))
    assert run(dispatch(session)) == 2
    assert run(dispatch(session)) == 2
    assert states(session) == {"succeeded": 4}
    found = rows(session, "SELECT key, container, observed_at_source FROM media_objects ORDER BY key")
    assert found == [("a.mp4", "mp4", "key_pattern"), ("b.ts", "mpegts", "key_pattern")]


class Counted:
    """What was counted and timed, in place of Prometheus's library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sums: Counter[tuple[str, str]] = Counter()
        monkeypatch.setattr(metrics, "_on", True)
        monkeypatch.setattr(metrics, "count", lambda metric, n=1, **labels: self._add(metric, n, labels))
        monkeypatch.setattr(metrics, "observe", lambda metric, seconds, **labels: self._add(metric, 1, labels))

    def _add(self, metric: metrics.Metric, amount: float, labels: dict[str, str]) -> None:
        assert all(value in metric.labels[name] for name, value in labels.items())
        self.sums[metric.name, "/".join(labels.values())] += int(amount)


def test_what_is_counted_of_a_video(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    plan(session, bucket, "v.mp4", video("steady.mp4"))
    assert run_all(session) == 2
    frames = scalar(session, "SELECT sum(frames) FROM frame_counts")
    sums = counted.sums
    assert sums["maskwatch_frames", "chunk"] == frames > 0
    assert sums["maskwatch_faces", "with_mask"] == scalar(session, "SELECT count(*) FROM faces") > 0
    assert sums["maskwatch_attempts", "probe/succeeded"] == sums["maskwatch_attempts", "chunk/succeeded"] == 1
    assert sums["maskwatch_attempt_seconds", "chunk"] == 1 and sums["maskwatch_queue_seconds", "backfill"] == 2
    # The look that finds no further frame is timed, too: it may read on to the end of the chunk.
    assert sums["maskwatch_stage_seconds", "decode"] == frames + 1
    assert sums["maskwatch_stage_seconds", "write"] == 2 and sums["maskwatch_stage_seconds", "read"] >= 2


def test_what_is_counted_of_a_chunk_that_is_given_back_or_lost(
    session: Session, bucket: Bucket, analyzer: ReadingAnalyzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(session, bucket, "v.mp4", video("steady.mp4"))
    run(dispatch(session))  # the probe
    counted = Counted(monkeypatch)
    run(dispatch(session), draining=lambda: True)
    assert counted.sums["maskwatch_attempts", "chunk/released"] == 1

    def cancel(number: int) -> None:
        ledger.cancel(session, [2], by="a test")
        session.commit()
        analyzer.before = lambda number: None

    analyzer.before = cancel
    assert run(dispatch(session)) == 0
    assert counted.sums["maskwatch_lease_losses", "refused"] == 1
    assert counted.sums["maskwatch_frames", "chunk"] == 0
