"""The plan of a video in the ledger: made once by its probe, gone with its version, made anew when that is back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

import producer.dispatch
from common import ledger
from common.catalog import places
from common.cli.parts.waiting import in_words
from common.domain import (
    FrameFaces,
    JobKind,
    Lane,
    MediaKind,
    ObjectInfo,
    ObservedAt,
    ObservedAtSource,
    Reason,
    VideoInfo,
)
from common.ledger import ClaimedJob, Progress, StaleJobError
from common.messaging.queues import Queue, list_of, queue_length, redis_client
from common.models.pipeline import pipeline_spec
from common.planning import PlannedObject, chunk_ranges
from common.settings import get_settings
from tests.ledger_rows import NOON, claim, dispatch, face, planned, register, register_many, rows, scalar, states
from tests.mutants import UNFENCED_SUCCESS, planted
from tests.pipelines import default_spec
from tests.services import forget_settings
from workers.jobs.recording import record_chunk, record_probe

BEGAN = ObservedAt(NOON, ObservedAtSource.CREATION_TIME)
INFO = VideoInfo("mp4", "h264", 640, 480, 25.0, 0, 150.0, NOON)


def plan_video(session: Session, etag: str = "e1", *, sample_fps: float = 1.0, key: str = "gate.mp4") -> None:
    """Register a video, as a backfill with this sampling does."""
    location = places.add_location(session, "lobby", "UTC")
    pipeline = places.ensure_pipeline(session, default_spec(sample_fps=sample_fps))
    location.promoted_pipeline_id = pipeline.id
    info = ObjectInfo("s3://footage", key, etag, 1000, NOON + timedelta(seconds=len(etag)))
    video = PlannedObject(info, MediaKind.VIDEO, None)
    ledger.register(session, [video], location=location, camera=None, pipeline=pipeline, lane=Lane.BACKFILL)
    session.commit()


def next_job(session: Session) -> ClaimedJob:
    (job,) = claim(session, dispatch(session, limit=1))
    return job


def end_probe(session: Session, job: ClaimedJob, chunk_seconds: float = 60) -> None:
    record_probe(session, job, INFO, BEGAN, chunk_ranges(INFO.duration_seconds, chunk_seconds))
    session.commit()


def end_chunk(session: Session, job: ClaimedJob) -> None:
    """With a face in each of two frames."""
    start = job.range_start_ms / 1000
    frames = [FrameFaces(start + at, 1.0, (face(),), (1,)) for at in (0.0, 1.0)]
    record_chunk(session, job, frames, None)
    session.commit()


CHUNKS = "SELECT state, range_start_ms, range_end_ms FROM jobs WHERE kind = 'chunk' ORDER BY range_start_ms, id"


def test_a_probe_plans_the_chunks_in_the_transaction_that_ends_it(session: Session) -> None:
    plan_video(session)
    job = next_job(session)
    assert (job.kind, job.observed_at, job.last) == (JobKind.PROBE, None, False)
    record_probe(session, job, INFO, BEGAN, chunk_ranges(150, 60))
    session.rollback()
    assert rows(session, CHUNKS) == []
    end_probe(session, job)
    assert rows(session, CHUNKS) == [
        ("pending", 0, 60_000),
        ("pending", 60_000, 120_000),
        ("pending", 120_000, 180_000),
    ]
    kept = (
        "SELECT container, codec, width, height, frame_rate, rotation, duration_seconds, observed_at FROM media_objects"
    )
    assert rows(session, kept) == [("mp4", "h264", 640, 480, 25.0, 0, 150.0, NOON)]
    chunks = claim(session, dispatch(session))
    assert [chunk.last for chunk in chunks] == [False, False, True]
    assert {chunk.observed_at for chunk in chunks} == {BEGAN}
    # Not the key's: a newer version of the object would not be planned with it.
    assert {chunk.key_time for chunk in chunks} == {None}


def test_a_probe_that_was_lost_plans_nothing(session: Session) -> None:
    plan_video(session)
    job = next_job(session)
    ledger.report_crash(session, "w/1", max_crashes=3)
    session.commit()
    with pytest.raises(StaleJobError):
        end_probe(session, job)
    session.rollback()
    assert rows(session, CHUNKS) == []


def test_a_video_is_planned_once_per_pipeline_whatever_the_chunk_length_is_later(session: Session) -> None:
    plan_video(session)
    end_probe(session, next_job(session), chunk_seconds=60)
    plan_video(session)
    assert len(rows(session, CHUNKS)) == 3
    # Another sampling is another pipeline, with a plan of its own.
    plan_video(session, sample_fps=2)
    probe = next(job for job in claim(session, dispatch(session)) if job.kind is JobKind.PROBE)
    assert probe.spec.sample_fps == 2
    end_probe(session, probe, chunk_seconds=150)
    per_pipeline = "SELECT count(*) FROM jobs WHERE kind = 'chunk' GROUP BY pipeline_id ORDER BY pipeline_id"
    assert rows(session, per_pipeline) == [(3,), (1,)]


def test_a_second_plan_is_not_laid_over_the_first(session: Session) -> None:
    """Should a probe ever run again while its chunks live, their plan stays: two would count frames twice."""
    plan_video(session)
    probe = next_job(session)
    end_probe(session, probe, chunk_seconds=60)
    assert ledger.plan_chunks(session, probe, INFO, chunk_ranges(150, 50)) == 0
    session.commit()
    assert len(rows(session, CHUNKS)) == 3


def test_redis_holds_a_bounded_number_of_messages_of_videos_too(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWATCH_DISPATCH__QUEUE_CAP", "5")
    forget_settings()
    plan_video(session)
    end_probe(session, next_job(session), chunk_seconds=2)  # 75 chunks
    register_many(session, 40)
    producer.dispatch.reconcile(get_settings())
    sent = []
    for _ in range(3):
        producer.dispatch.dispatch(get_settings())
        with redis_client() as client:
            sent.append(queue_length(client, Queue.MEDIA))
    assert sent == [5, 5, 5]
    assert states(session)["queued"] == 5
    # Pictures still share their messages, behind the chunks.
    with redis_client() as client:
        client.delete(*(list_of(Queue.MEDIA, lane) for lane in Lane))
    session.execute(text("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE kind = 'chunk'"))
    session.commit()
    assert producer.dispatch.dispatch(get_settings()) == 40


def test_a_newer_version_takes_chunks_and_rows_away_and_is_probed(session: Session) -> None:
    plan_video(session, "e1")
    end_probe(session, next_job(session))
    first, second, _ = claim(session, dispatch(session))
    end_chunk(session, first)
    plan_video(session, "e22")
    assert states(session) == {"cancelled": 4, "pending": 1}
    assert scalar(session, "SELECT count(*) FROM faces") == 0
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 0
    assert scalar(session, "SELECT count(DISTINCT hour) FROM dirty_marks") == 1
    # The worker that lives on with a chunk of the old version can't commit.
    with pytest.raises(StaleJobError):
        end_chunk(session, second)
    session.rollback()
    assert scalar(session, "SELECT count(*) FROM faces") == 0


def test_a_version_that_comes_back_is_probed_again_and_may_get_other_chunks(session: Session) -> None:
    plan_video(session, "e1")
    end_probe(session, next_job(session), chunk_seconds=60)
    plan_video(session, "e22")
    ledger.register(
        session,
        [
            PlannedObject(
                ObjectInfo("s3://footage", "gate.mp4", "e1", 1000, NOON + timedelta(hours=1)), MediaKind.VIDEO, None
            )
        ],
        location=places.get_location(session, "lobby"),
        camera=None,
        pipeline=places.ensure_pipeline(session, pipeline_spec(get_settings())),
        lane=Lane.BACKFILL,
    )
    session.commit()
    probe = next_job(session)
    assert (probe.kind, probe.etag) == (JobKind.PROBE, "e1")
    end_probe(session, probe, chunk_seconds=120)
    live = "SELECT range_start_ms, range_end_ms FROM jobs WHERE kind = 'chunk' AND state = 'pending' ORDER BY 1"
    assert rows(session, live) == [(0, 120_000), (120_000, 240_000)]
    # The cancelled chunks of the earlier plan don't keep the new one from having its last.
    assert [chunk.last for chunk in claim(session, dispatch(session))] == [False, True]


def withdraw_one(session: Session, chunk: ClaimedJob) -> None:
    """As a newer version of its object would."""
    session.execute(
        text(
            "UPDATE jobs SET state = 'cancelled', token = gen_random_uuid(), reason = 'superseded',"
            " finished_at = clock_timestamp(), lease_until = NULL, worker = NULL WHERE id = :id"
        ),
        {"id": chunk.ref.id},
    )


def test_a_plan_of_the_same_length_takes_up_the_chunks_that_were_cancelled(session: Session) -> None:
    plan_video(session, "e1")
    probe = next_job(session)
    end_probe(session, probe)
    for chunk in claim(session, dispatch(session)):
        withdraw_one(session, chunk)
    assert ledger.plan_chunks(session, probe, INFO, chunk_ranges(150, 60)) == 3
    session.commit()
    assert states(session) == {"succeeded": 1, "pending": 3}


@pytest.mark.parametrize("fence", [True, False])
def test_a_chunk_that_is_recorded_twice_counts_once_because_of_the_fence(session: Session, fence: bool) -> None:
    plan_video(session)
    end_probe(session, next_job(session), chunk_seconds=150)
    (chunk,) = claim(session, dispatch(session))
    end_chunk(session, chunk)
    try:
        with nullcontext() if fence else planted(UNFENCED_SUCCESS):
            end_chunk(session, chunk)
    except StaleJobError:
        session.rollback()
    faces, frames = (
        scalar(session, "SELECT count(*) FROM faces"),
        scalar(session, "SELECT sum(frames) FROM frame_counts"),
    )
    assert (faces, frames) == ((2, 2) if fence else (4, 4))


def test_frames_count_in_the_hours_they_were_shown_in(session: Session) -> None:
    plan_video(session)
    probe = next_job(session)
    began = ObservedAt(NOON - timedelta(seconds=90), ObservedAtSource.CREATION_TIME)
    record_probe(session, probe, INFO, began, [(0, 180_000)])
    session.commit()
    frames = [
        FrameFaces(at, 1.0, (face(),) if at == 89.5 else (), (7,) if at == 89.5 else ()) for at in (0.0, 89.5, 90.0)
    ]
    record_chunk(session, next_job(session), frames, None)
    session.commit()
    hours = rows(session, "SELECT hour, frames, seconds FROM frame_counts ORDER BY hour")
    assert hours == [(NOON - timedelta(hours=1), 2, 2.0), (NOON, 1, 1.0)]
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 2
    found = "SELECT observed_at, offset_seconds, track_id FROM face_results"
    assert rows(session, found) == [(NOON - timedelta(seconds=0.5), 89.5, 7)]


def test_a_recording_begins_once_whatever_another_pipeline_reads_later(session: Session) -> None:
    """The same bytes are put again between the probes of two pipelines, and nothing but LastModified tells the time."""
    plan_video(session)
    end_probe(session, next_job(session))
    end_chunk(session, next_job(session))
    session.execute(text("UPDATE media_objects SET last_modified = last_modified + interval '2 hours'"))
    plan_video(session, sample_fps=2.0)
    later = next(job for job in claim(session, dispatch(session)) if job.kind is JobKind.PROBE)
    seen = ObservedAt(NOON + timedelta(hours=2), ObservedAtSource.LAST_MODIFIED)
    record_probe(session, later, INFO, seen, chunk_ranges(150, 60))
    session.commit()
    for job in claim(session, dispatch(session)):
        assert job.observed_at == BEGAN
        end_chunk(session, job)
    begun = "SELECT DISTINCT observed_at - offset_seconds * interval '1 second' FROM faces"
    assert rows(session, begun) == [(NOON,)]


def test_how_far_the_work_is_in_objects_and_hours_of_video(session: Session) -> None:
    register(session, planned("a.jpg"), planned("b.jpg"))
    plan_video(session)
    assert ledger.progress(session, "lobby") == Progress(3, 0, 3, 0, 0, 0)
    image, _, probe = claim(session, dispatch(session))
    ledger.quarantine(session, image, Reason.EMPTY_FILE, "planted")
    end_probe(session, probe)
    # 150 s, in chunks of a minute; the video is done when its last chunk is.
    assert ledger.progress(session, "lobby") == Progress(3, 1, 4, 2, 150, 0)
    last = claim(session, dispatch(session))[-1]
    end_chunk(session, last)
    assert ledger.progress(session, "lobby") == Progress(3, 1, 3, 3, 150, 30)
    assert ledger.progress(session, "elsewhere") == Progress(0, 0, 0, 0, 0, 0)
    so_far = ledger.progress(session)
    assert in_words(so_far, 0, 9.0) == "objects, 0.0 of 0.0 hours of video"
    assert in_words(replace(so_far, footage_seconds=36000, footage_ended_seconds=5400), 30, 12.0) == (
        "objects, 2.5 per second, 1.5 of 10.0 hours of video"
    )
    assert in_words(replace(so_far, footage_seconds=0), 3, 12.0) == "objects, 15.0 per minute"
