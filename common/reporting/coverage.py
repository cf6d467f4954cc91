"""Coverage: how much of a camera's hours was analysed, and the holes in them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.tables import Camera
from common.settings import get_settings

DAY, WEEK = timedelta(days=1), timedelta(days=7)

#: Seconds that an hour may lack before it is a hole: cameras and containers round times.
TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class CoverageHour:
    """An hour of a camera, in seconds of footage; `hour` aware, `local_hour` naive. See `coverage_hourly`."""

    hour: datetime
    local_hour: datetime
    expected_seconds: float | None
    present_seconds: float
    analysed_seconds: float
    waiting_seconds: float
    failed_seconds: float
    missing_seconds: float | None
    #: The number of images and chunks, and how many of them failed, whatever their length.
    pieces: int
    failed_pieces: int
    coverage: float | None

    @property
    def is_hole(self) -> bool:
        """Whether footage that should have been analysed is missing, and no active job will analyse it."""
        done = self.analysed_seconds + self.waiting_seconds
        return self.failed_pieces > 0 or (
            self.expected_seconds is not None and self.expected_seconds - done > TOLERANCE
        )


def coverage(
    session: Session, camera: Camera, since: datetime | None = None, until: datetime | None = None
) -> list[CoverageHour]:
    """The hours of a camera in which there is footage, or should be; bounds as instants (aware) or on the location's
    clock (naive)."""
    # A naive bound is widened by a day here, more than any zone differs from UTC; `_within` compares the local hours.
    bounds = {name: _instant(bound, margin) for name, bound, margin in (("since", since, -DAY), ("until", until, DAY))}
    rows = session.execute(
        text(
            f"""
            SELECT {", ".join(CoverageHour.__slots__)}
            FROM camera_coverage(
                :camera,
                coalesce(CAST(:since AS timestamptz), '-infinity'),
                coalesce(CAST(:until AS timestamptz), 'infinity'),
                make_interval(secs => :longest)
            )
            ORDER BY hour
            """  # noqa: S608
        ),
        {"camera": camera.id, **bounds, "longest": max(WEEK.total_seconds(), get_settings().worker.max_video_seconds)},
    )
    return [row for row in (CoverageHour(*row) for row in rows) if _within(row, since, until)]


def _instant(bound: datetime | None, margin: timedelta) -> datetime | None:
    """The bound as an instant; a naive bound is moved by the margin, so that no hour is left out."""
    if bound is None or bound.tzinfo is not None:
        return bound
    try:
        return bound.replace(tzinfo=UTC) + margin
    except OverflowError:
        return None


def _within(row: CoverageHour, since: datetime | None, until: datetime | None) -> bool:
    def at(bound: datetime) -> datetime:
        return row.local_hour if bound.tzinfo is None else row.hour

    return (since is None or at(since) >= since) and (until is None or at(until) < until)


def failed_jobs(session: Session, camera: Camera, hours: list[datetime]) -> list[int]:
    """Quarantined jobs, of the pipeline that the location shows, whose footage begins in these hours of a camera."""
    rows = session.execute(
        text(
            """
            SELECT j.id
            FROM media_objects m
            JOIN locations l ON l.id = m.location_id
            JOIN jobs j ON j.media_object_id = m.id AND j.pipeline_id = l.promoted_pipeline_id
            WHERE m.camera_id = :camera
              AND m.superseded_at IS NULL
              AND j.state = 'quarantined'
              AND date_trunc(
                  'hour',
                  coalesce(m.observed_at, m.last_modified) + make_interval(secs => j.range_start_ms / 1000.0),
                  l.time_zone
              ) = ANY(:hours)
            ORDER BY j.id
            """
        ),
        {"camera": camera.id, "hours": hours},
    )
    return list(rows.scalars())
