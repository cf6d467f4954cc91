"""The read side: figures for tables, plots and the report, from the analysts' views and the ledger.

Every function receives a session and changes nothing. docs/schema.md says what a rate means, and what it doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from common.catalog.places import get_location
from common.domain import ObservedAtSource
from common.timestamps import END, FIRST


class Period(StrEnum):
    """How long a row of a compliance table is: the location's own hours, days and ISO weeks (from Monday)."""

    HOUR = "hour"
    DAY = "day"
    WEEK = "week"


#: The instant at which a row's period begins. An hour that the clocks repeat is two rows.
_STARTS = {
    Period.HOUR: "hour",
    Period.DAY: "date_trunc('day', local_hour) AT TIME ZONE time_zone",
    Period.WEEK: "date_trunc('week', local_hour) AT TIME ZONE time_zone",
}

_SUMS = """
    sum(frames)::bigint AS frames, sum(seconds)::double precision AS seconds, sum(faces)::bigint AS faces,
    sum(with_mask)::bigint AS with_mask, sum(without_mask)::bigint AS without_mask, sum(uncertain)::bigint AS uncertain
"""

_RATES = """
    with_mask::double precision / nullif(with_mask + without_mask, 0) AS rate,
    compliance_bound(with_mask, with_mask + without_mask, -1) AS rate_low,
    compliance_bound(with_mask, with_mask + without_mask, 1) AS rate_high
"""


#: An earlier version believed every time in a file, also years that no calendar of Python reaches.
_SHOWN = "hour >= :first AND hour < :end"


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over some time of one location, by its promoted pipeline.

    `rate` = with_mask / (with_mask + without_mask), in [0, 1]; `rate_low` and `rate_high` are Wilson's 95 %
    interval. All three are None if no face was decided. `seconds`: length of the analysed video.
    """

    frames: int
    seconds: float
    faces: int
    with_mask: int
    without_mask: int
    uncertain: int
    rate: float | None
    rate_low: float | None
    rate_high: float | None

    @classmethod
    def of(cls, row: Row[Any]) -> Figures:
        return cls(*(getattr(row, name) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class ComplianceRow:
    """The figures of one period. `start`: aware, in the location's own time zone."""

    location: str
    start: datetime
    figures: Figures


@dataclass(frozen=True, slots=True)
class LocationTotals:
    """A location and its figures over all time; `first_hour` and `last_hour` (aware, local) are None if none."""

    name: str
    time_zone: str
    cameras: tuple[str, ...]
    #: Detector and classifier of the promoted pipeline; None before the first backfill.
    models: tuple[str, str] | None
    first_hour: datetime | None
    last_hour: datetime | None
    figures: Figures


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a location's media its promoted pipeline has analysed: jobs by state.

    `times` counts the analysed media objects by the source of their time (`domain.ObservedAtSource`).
    """

    analysed: int
    waiting: int
    quarantined: int
    times: dict[str, int]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A job that needs a person: its object, and why it was quarantined."""

    job_id: int
    location: str
    uri: str
    reason: str
    detail: str
    attempts: int
    finished_at: datetime | None


def compliance(
    session: Session,
    location: str | None,
    by: Period | str,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[ComplianceRow]:
    """Compliance of one location, or of all, by hour, day or week, in order of location and time.

    Counts the hours that begin in [since, until). An aware bound is an instant; a naive one is the wall clock
    of each location. Raises `MaskwatchError` for a location that nobody added.
    """
    if location is not None:
        get_location(session, location)
    conditions = ["(CAST(:location AS text) IS NULL OR location = :location)", _SHOWN]
    for bound, sign in ((since, ">="), (until, "<")):
        if bound is not None:
            column = "hour" if bound.tzinfo else "local_hour"
            conditions.append(f"{column} {sign} :{'since' if sign == '>=' else 'until'}")
    # Only constants of this module are put into the statement; values are parameters.
    statement = f"""
        SELECT v.*, {_RATES} FROM (
            SELECT location, time_zone, {_STARTS[Period(by)]} AS start, {_SUMS}
            FROM compliance_by_hour WHERE {" AND ".join(conditions)} GROUP BY 1, 2, 3
        ) AS v ORDER BY location, start
    """  # noqa: S608
    bounds = {"since": since, "until": until, "first": FIRST, "end": END}
    rows = session.execute(text(statement), {"location": location, **bounds})
    return [ComplianceRow(row.location, row.start.astimezone(ZoneInfo(row.time_zone)), Figures.of(row)) for row in rows]


def totals(session: Session) -> list[LocationTotals]:
    """Every location with its figures over all time, in order of name; zeros where nothing was analysed yet."""
    statement = f"""
        SELECT v.*, {_RATES} FROM (
            SELECT l.name, l.time_zone, p.detector, p.classifier, s.*,
                   ARRAY(SELECT c.name FROM cameras c WHERE c.location_id = l.id ORDER BY c.name) AS cameras
            FROM locations l
            LEFT JOIN pipelines p ON p.id = l.promoted_pipeline_id
            CROSS JOIN LATERAL (
                SELECT min(hour) AS first_hour, max(hour) AS last_hour, coalesce(sum(frames), 0)::bigint AS frames,
                       coalesce(sum(seconds), 0)::double precision AS seconds, coalesce(sum(faces), 0)::bigint AS faces,
                       coalesce(sum(with_mask), 0)::bigint AS with_mask,
                       coalesce(sum(without_mask), 0)::bigint AS without_mask,
                       coalesce(sum(uncertain), 0)::bigint AS uncertain
                FROM compliance_by_hour h WHERE h.location = l.name AND {_SHOWN}
            ) AS s
        ) AS v ORDER BY name
    """  # noqa: S608
    rows = session.execute(text(statement), {"first": FIRST, "end": END})
    return [_location_totals(row) for row in rows]


def _location_totals(row: Row[Any]) -> LocationTotals:
    zone = ZoneInfo(row.time_zone)
    return LocationTotals(
        name=row.name,
        time_zone=row.time_zone,
        cameras=tuple(row.cameras),
        models=(row.detector, row.classifier) if row.detector else None,
        first_hour=row.first_hour and row.first_hour.astimezone(zone),
        last_hour=row.last_hour and row.last_hour.astimezone(zone),
        figures=Figures.of(row),
    )


def coverage(session: Session) -> dict[str, Coverage]:
    """The coverage of every location with media, by its name, for its promoted pipeline."""
    statement = """
        SELECT l.name, count(*) FILTER (WHERE j.state = 'succeeded') AS analysed,
               count(*) FILTER (WHERE j.state IN ('pending', 'queued', 'running', 'retry_wait')) AS waiting,
               count(*) FILTER (WHERE j.state = 'quarantined') AS quarantined,
               count(DISTINCT m.id) FILTER (WHERE j.state = 'succeeded' AND m.observed_at_source = 'key_pattern')
                   AS key_pattern,
               count(DISTINCT m.id) FILTER (WHERE j.state = 'succeeded' AND m.observed_at_source = 'exif') AS exif,
               count(DISTINCT m.id) FILTER (WHERE j.state = 'succeeded' AND m.observed_at_source = 'creation_time')
                   AS creation_time,
               count(DISTINCT m.id) FILTER (WHERE j.state = 'succeeded' AND m.observed_at_source = 'last_modified')
                   AS last_modified
        FROM jobs j
        JOIN media_objects m ON m.id = j.media_object_id AND m.superseded_at IS NULL
        JOIN locations l ON l.id = m.location_id AND l.promoted_pipeline_id = j.pipeline_id
        WHERE j.kind <> 'probe' OR j.state <> 'succeeded'
        GROUP BY l.name
    """
    sources = tuple(source.value for source in ObservedAtSource)
    return {
        row.name: Coverage(
            row.analysed,
            row.waiting,
            row.quarantined,
            {source: getattr(row, source) for source in sources if getattr(row, source)},
        )
        for row in session.execute(text(statement))
    }


def hours_to_summarize(session: Session) -> int:
    """How many hours have new results that are not in the summaries yet."""
    marks = "SELECT count(*) FROM (SELECT DISTINCT location_id, pipeline_id, hour FROM dirty_marks) AS hours"
    return int(session.execute(text(marks)).scalar_one())


def quarantined(session: Session, limit: int, location: str | None = None) -> list[Quarantined]:
    """The newest quarantined jobs of one location, or of all, at most `limit`, in order of location and object."""
    statement = """
        SELECT * FROM (
            SELECT j.id AS job_id, l.name AS location, m.bucket || '/' || m.key AS uri,
                   coalesce(j.reason, '') AS reason, coalesce(j.detail, '') AS detail, j.attempt AS attempts,
                   j.finished_at
            FROM jobs j JOIN media_objects m ON m.id = j.media_object_id JOIN locations l ON l.id = m.location_id
            WHERE j.state = 'quarantined' AND (CAST(:location AS text) IS NULL OR l.name = :location)
            ORDER BY j.id DESC LIMIT :limit
        ) AS newest ORDER BY location, uri, job_id
    """
    rows = session.execute(text(statement), {"limit": limit, "location": location})
    return [Quarantined(*(getattr(row, name) for name in Quarantined.__slots__)) for row in rows]
