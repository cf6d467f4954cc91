"""Summaries always equal a full recompute, however the work was interleaved."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.versions import AGGREGATION_LOCK
from common.domain import MaskStatus
from tests.aggregators import (
    EIGHT,
    aggregate,
    batch_without_the_lock,
    commit_image,
    overtake,
    recomputed,
    waits_or_ends,
)
from tests.ledger_rows import claim, dispatch, face, planned, register, rows, scalar
from workers.jobs.recording import record_image
from workers.summaries.aggregation import summarize, summarize_batch

#: Summed by an analyst's GROUP BY over the faces, and by the aggregator.
DIRECT = """
SELECT date_trunc('hour', f.observed_at, l.time_zone) AS hour, count(*), count(*) FILTER (WHERE status = 'with_mask'),
       count(*) FILTER (WHERE status = 'without_mask'), count(*) FILTER (WHERE status = 'uncertain')
FROM faces f JOIN locations l ON l.id = f.location_id GROUP BY 1 ORDER BY 1
"""
SUMMARY = "SELECT hour, faces, with_mask, without_mask, uncertain FROM compliance_hourly WHERE faces > 0 ORDER BY hour"


def analyse(session: Session, at: list[datetime], zone: str = "UTC", seed: int = 1) -> None:
    """One picture per time, with up to three faces of any status."""
    draw = random.Random(seed)
    objects = [planned(f"{seed}-{n}.jpg", at=instant) for n, instant in enumerate(at)]
    register(session, *objects, zone=zone)
    for job in claim(session, dispatch(session, 1000)):
        assert job.observed_at is not None
        faces = [face(draw.choice(list(MaskStatus))) for _ in range(draw.randrange(4))]
        record_image(session, job, faces, job.observed_at)
        session.commit()


def test_summaries_equal_a_group_by(session: Session) -> None:
    start = datetime(2026, 3, 28, 20, tzinfo=UTC)  # over the night Berlin's clocks change
    analyse(session, [start + timedelta(minutes=11 * n) for n in range(60)], zone="Europe/Berlin")
    assert summarize() > 5
    assert rows(session, DIRECT) == rows(session, SUMMARY) != []
    assert scalar(session, "SELECT sum(frames) FROM compliance_hourly") == 60
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 0


def test_an_hour_of_a_half_hour_zone_and_of_a_half_hour_change(session: Session) -> None:
    # Lord Howe Island sets its clocks back by half an hour: on 5 April 2026 its hour from 01:00 lasts 90 minutes.
    start = datetime(2026, 4, 4, 12, tzinfo=UTC)
    analyse(session, [start + timedelta(minutes=7 * n) for n in range(50)], zone="Australia/Lord_Howe")
    summarize()
    assert rows(session, DIRECT) == rows(session, SUMMARY) != []


def test_late_footage_changes_only_its_own_hour(session: Session) -> None:
    base = datetime(2026, 3, 2, 8, tzinfo=UTC)
    analyse(session, [base, base + timedelta(hours=1)])
    summarize()
    before = rows(session, "SELECT hour, summarized_at FROM compliance_hourly ORDER BY hour")
    analyse(session, [base + timedelta(minutes=5)], seed=2)
    assert summarize() == 1
    after = rows(session, "SELECT hour, summarized_at FROM compliance_hourly ORDER BY hour")
    assert [row.hour for row in before] == [row.hour for row in after]
    assert before[0].summarized_at < after[0].summarized_at and before[1] == after[1]
    assert rows(session, DIRECT) == rows(session, SUMMARY)


def test_hours_with_images_and_no_faces_are_there(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    assert job.observed_at is not None
    record_image(session, job, [], job.observed_at)
    session.commit()
    summarize()
    assert rows(session, "SELECT frames, faces FROM compliance_hourly") == [(1, 0)]
    assert rows(session, "SELECT compliance_rate, rate_low FROM compliance_by_hour") == [(None, None)]


def test_an_hour_whose_rows_were_withdrawn_disappears(session: Session) -> None:
    analyse(session, [datetime(2026, 3, 2, 8, tzinfo=UTC)])
    summarize()
    late = datetime(2026, 3, 3, tzinfo=UTC)
    register(session, planned("1-0.jpg", etag="e2", modified=late, at=datetime(2026, 3, 2, 8, tzinfo=UTC)))
    summarize()
    assert scalar(session, "SELECT count(*) FROM compliance_hourly") == 0


def test_what_is_committed_while_an_aggregator_works_keeps_its_mark(session: Session) -> None:
    commit_image(session, "first.jpg", faces=1)
    with Session(session.bind) as aggregator, aggregator.begin():
        assert summarize_batch(aggregator, 100) == (1, 1)
        commit_image(session, "late.jpg", faces=2)
    assert scalar(session, FACES_SUMMARIZED) == 1
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 1
    assert summarize() == 1
    assert rows(session, DIRECT) == rows(session, SUMMARY) == [(EIGHT, 3, 3, 0, 0)]


def test_marks_taken_after_counting_would_lose_it(session: Session) -> None:
    commit_image(session, "first.jpg", faces=1)
    with Session(session.bind) as aggregator, aggregator.begin():
        recomputed(aggregator, aggregator.execute(text("SELECT location_id, pipeline_id, hour FROM dirty_marks")).all())
        commit_image(session, "late.jpg", faces=2)
        aggregator.execute(text("DELETE FROM dirty_marks"))
    assert summarize() == 0
    assert rows(session, DIRECT) == [(EIGHT, 3, 3, 0, 0)]
    assert scalar(session, FACES_SUMMARIZED) == 1


def test_a_second_aggregator_waits_until_the_first_has_committed(session: Session) -> None:
    commit_image(session, "first.jpg", faces=1)
    with ThreadPoolExecutor(1) as threads, Session(session.bind) as first, first.begin():
        assert summarize_batch(first, 100) == (1, 1)
        commit_image(session, "late.jpg", faces=2)
        second = threads.submit(aggregate, session, summarize_batch)
        assert waits_or_ends(session, second, AGGREGATION_LOCK) == "waits"
        first.commit()
        assert second.result(timeout=60) == (1, 1)
    assert rows(session, DIRECT) == rows(session, SUMMARY) == [(EIGHT, 3, 3, 0, 0)]


def test_of_two_aggregators_the_one_that_counted_last_writes_last(session: Session) -> None:
    assert overtake(session, summarize_batch) == "waits"
    assert scalar(session, "SELECT count(*) FROM dirty_marks") == 0
    assert rows(session, DIRECT) == rows(session, SUMMARY) == [(EIGHT, 3, 3, 0, 0)]


def test_without_the_lock_the_older_count_would_overwrite_the_newer(session: Session) -> None:
    assert overtake(session, batch_without_the_lock) == "ends"
    assert summarize() == 0  # no mark is left that would mend it
    assert rows(session, DIRECT) == [(EIGHT, 3, 3, 0, 0)]
    assert scalar(session, FACES_SUMMARIZED) == 1


FACES_SUMMARIZED = "SELECT sum(faces)::int FROM compliance_hourly"
