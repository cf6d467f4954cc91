"""The read side against a real Postgres, compared with figures computed here in Python."""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.tables import DirtyMark
from common.domain import JobState, MaskwatchError
from common.reporting.queries import (
    Figures,
    Period,
    compliance,
    coverage,
    hours_to_summarize,
    quarantined,
    totals,
)
from tests.archive import Archive

BERLIN, KOLKATA = "Europe/Berlin", "Asia/Kolkata"
#: Before and after Berlin's clocks go forward (29 March 2026, 01:00 UTC) and back (25 October 2026, 01:00 UTC).
CHANGES = (datetime(2026, 3, 29, 1, tzinfo=UTC), datetime(2026, 10, 25, 1, tzinfo=UTC))


@pytest.fixture
def filled(archive: Archive) -> Archive:
    """Pictures every 41 minutes around both changes of Berlin's clocks, seen by two locations and two pipelines."""
    promoted, other = archive.pipeline("compact"), archive.pipeline("other")
    for name, zone in (("lobby", BERLIN), ("market-street", KOLKATA)):
        location = archive.location(name, zone, promoted)
        for change in CHANGES:
            for step in range(-40, 40):
                faces = (step % 4, step % 3, int(step % 7 == 0)) if step % 5 else (0, 0, 0)
                archive.image(location, change + timedelta(minutes=41 * step), faces, pipeline=promoted)
        # Faces of a pipeline that is not promoted must be in no figure.
        archive.image(location, CHANGES[0], (50, 0, 0), pipeline=other)
    archive.summarize()
    return archive


def start_of(period: Period, local: datetime) -> datetime:
    """Where a period begins, on the wall clock; an hour keeps its fold."""
    hour = local.replace(minute=0, second=0, microsecond=0)
    if period is Period.HOUR:
        return hour
    day = hour.replace(hour=0, fold=0)
    return day if period is Period.DAY else day - timedelta(days=day.weekday())


def wilson(successes: int, trials: int) -> tuple[float | None, float | None]:
    """Wilson's interval by solving |p̂ - p| = z·sqrt(p(1-p)/n) for p: independent of the SQL's closed form."""
    if trials == 0:
        return None, None
    z2, share = 1.959963984540054**2, successes / trials
    a, b, c = 1 + z2 / trials, -(2 * share + z2 / trials), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def expected(archive: Archive, period: Period) -> list[tuple[str, datetime, list[int]]]:
    sums: dict[tuple[str, datetime], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for name, instant, faces in archive.seen:
        start = start_of(period, instant.astimezone(ZoneInfo(archive.locations[name].time_zone)))
        row = sums[name, start.astimezone(UTC)]
        row[0] += 1
        for index, count in enumerate(faces):
            row[index + 1] += count
    return [(name, start, sums[name, start]) for name, start in sorted(sums)]


def counts(figures: Figures) -> list[int]:
    return [figures.frames, figures.with_mask, figures.without_mask, figures.uncertain]


@pytest.mark.parametrize("period", Period)
def test_rows_equal_a_computation_of_its_own(filled: Archive, period: Period) -> None:
    rows = compliance(filled.session, None, period)
    assert [(row.location, row.start.astimezone(UTC), counts(row.figures)) for row in rows] == expected(filled, period)
    for row in rows:
        figures = row.figures
        decided = figures.with_mask + figures.without_mask
        assert figures.faces == decided + figures.uncertain
        low, high = wilson(figures.with_mask, decided)
        assert figures.rate == (figures.with_mask / decided if decided else None)
        assert figures.rate_low == (low if low is None else pytest.approx(low, abs=1e-9))
        assert figures.rate_high == (high if high is None else pytest.approx(high, abs=1e-9))


def test_days_agree_with_the_view(filled: Archive) -> None:
    view = filled.session.execute(
        text("SELECT location, day, faces, compliance_rate, rate_low FROM compliance_by_day ORDER BY 1, 2")
    ).all()
    rows = compliance(filled.session, None, Period.DAY)
    assert [
        (row.location, row.start.date(), row.figures.faces, row.figures.rate, row.figures.rate_low) for row in rows
    ] == [tuple(row) for row in view]


def test_repeated_hour_is_two_rows_and_skipped_hour_is_none(filled: Archive) -> None:
    rows = compliance(filled.session, "lobby", "hour")
    back = [row.start.utcoffset() for row in rows if row.start.replace(tzinfo=None) == datetime(2026, 10, 25, 2)]
    assert back == [timedelta(hours=2), timedelta(hours=1)]
    assert not [row for row in rows if row.start.replace(tzinfo=None) == datetime(2026, 3, 29, 2)]


def test_hours_of_a_half_hour_zone_begin_at_half_past_in_utc(filled: Archive) -> None:
    starts = [row.start for row in compliance(filled.session, "market-street", Period.HOUR)]
    assert {start.minute for start in starts} == {0}
    assert {start.astimezone(UTC).minute for start in starts} == {30}


def test_hour_without_faces_has_no_rate(archive: Archive) -> None:
    pipeline = archive.pipeline()
    lobby = archive.location("lobby", BERLIN, pipeline)
    archive.image(lobby, CHANGES[0], (0, 0, 0), pipeline=pipeline)
    archive.image(lobby, CHANGES[0] + timedelta(hours=1), (0, 0, 2), pipeline=pipeline)
    archive.summarize()
    empty, undecided = compliance(archive.session, None, Period.HOUR)
    assert (empty.figures.frames, empty.figures.faces, empty.figures.rate) == (1, 0, None)
    assert (undecided.figures.faces, undecided.figures.rate, undecided.figures.rate_low) == (2, None, None)


def test_bounds_are_half_open_and_naive_ones_are_the_wall_clock(filled: Archive) -> None:
    def within(since: datetime, until: datetime) -> list[tuple[str, int]]:
        rows = compliance(filled.session, None, Period.HOUR, since, until)
        return [(row.location, row.start.hour) for row in rows]

    wall = datetime(2026, 3, 29, 8), datetime(2026, 3, 29, 10)
    assert within(*wall) == [("lobby", 8), ("lobby", 9), ("market-street", 8), ("market-street", 9)]
    instants = datetime(2026, 3, 29, 6, tzinfo=UTC), datetime(2026, 3, 29, 7, tzinfo=UTC)
    assert within(*instants) == [("lobby", 8), ("market-street", 12)]


def test_unknown_location_names_the_known_ones_and_the_command(filled: Archive) -> None:
    with pytest.raises(MaskwatchError, match=r"'loby' \(known: lobby, market-street\).*maskwatch locations add"):
        compliance(filled.session, "loby", Period.DAY)


def test_totals_are_the_sum_of_the_days(filled: Archive) -> None:
    filled.location("attic", BERLIN, None)
    by_name = {location.name: location for location in totals(filled.session)}
    days = compliance(filled.session, "lobby", Period.DAY)
    assert list(by_name) == ["attic", "lobby", "market-street"]
    assert by_name["lobby"].figures.faces == sum(day.figures.faces for day in days)
    assert by_name["lobby"].models == ("centerface", "compact")
    first = by_name["market-street"].first_hour
    assert first is not None
    assert first == compliance(filled.session, "market-street", Period.HOUR)[0].start
    assert (by_name["attic"].first_hour, by_name["attic"].models, by_name["attic"].figures.faces) == (None, None, 0)


def test_jobs_coverage_and_quarantine(archive: Archive) -> None:
    promoted, other = archive.pipeline("compact"), archive.pipeline("other")
    lobby = archive.location("lobby", BERLIN, promoted)
    archive.image(lobby, CHANGES[0], (1, 0, 0), pipeline=promoted)
    archive.job(archive.media(lobby, "waiting.jpg"), promoted, JobState.PENDING)
    archive.job(archive.media(lobby, "of-another.jpg"), other, JobState.SUCCEEDED)
    for number in range(3):
        media = archive.media(lobby, f"bad{number}.jpg")
        archive.job(media, promoted, JobState.QUARANTINED, reason="empty_file", detail="0 bytes", attempt=1)
    covered = coverage(archive.session)["lobby"]
    assert (covered.analysed, covered.waiting, covered.quarantined) == (1, 1, 3)
    assert covered.times == {"key_pattern": 1}
    assert quarantined(archive.session, 9, "elsewhere") == []
    newest = quarantined(archive.session, 2, "lobby")
    assert [job.uri for job in newest] == ["s3://footage/bad1.jpg", "s3://footage/bad2.jpg"]
    assert {(job.reason, job.detail, job.location) for job in newest} == {("empty_file", "0 bytes", "lobby")}


def test_hours_to_summarize_are_counted_once(archive: Archive) -> None:
    pipeline = archive.pipeline()
    lobby = archive.location("lobby", BERLIN, pipeline)
    for hour in (0, 0, 1):
        mark = DirtyMark(location_id=lobby.id, pipeline_id=pipeline.id, hour=CHANGES[0] + timedelta(hours=hour))
        archive.session.add(mark)
    archive.session.flush()
    assert hours_to_summarize(archive.session) == 2


def test_empty_database(session: Session) -> None:
    assert compliance(session, None, Period.WEEK) == []
    assert totals(session) == []
    assert coverage(session) == {}
    with pytest.raises(MaskwatchError, match="known: none yet"):
        compliance(session, "lobby", Period.DAY)


# --- what the views read ---


def reads(session: Session, query: str) -> str:
    session.rollback()
    return "\n".join(row[0] for row in session.execute(text(f"EXPLAIN {query}")))


@pytest.mark.parametrize("view", ["compliance_by_hour", "compliance_by_day"])
def test_footage_counts_are_read_where_coverage_is_asked_for(filled: Archive, view: str) -> None:
    columns = "location, frames, faces, compliance_rate, rate_low, rate_high"
    assert "frame_counts" not in reads(filled.session, f"SELECT {columns} FROM {view} WHERE location = 'lobby'")


def test_the_same_check_sees_them_where_it_is(filled: Archive) -> None:
    assert "frame_counts" in reads(filled.session, "SELECT coverage FROM compliance_by_hour WHERE location = 'lobby'")


def test_a_bound_stays_within_0_and_1(filled: Archive) -> None:
    query = (
        "SELECT min(compliance_bound(s, n, sign)), max(compliance_bound(s, n, sign))"
        " FROM generate_series(1, 400) AS n CROSS JOIN LATERAL generate_series(0, n) AS s,"
        " unnest(ARRAY[-1, 1]) AS sign WHERE s IN (0, 1, n - 1, n)"
    )
    lowest, highest = filled.session.execute(text(query)).one()
    assert 0 <= lowest < 0.001 and 0.999 < highest <= 1
