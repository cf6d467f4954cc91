"""The cost model: how long work takes here, measured from the workers' attempts, or taken from the benchmark.

Read side: receives a session, changes nothing. Every figure names its origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import text
from sqlalchemy.orm import Session

#: How many of the newest attempts are read: some hours of a worker's work, read in milliseconds.
RECENT = 20_000

#: With fewer jobs of a kind, their times say little: the first ones load the models.
ENOUGH = 20


class Origin(StrEnum):
    """The origin of a figure."""

    #: Measured on the workers of this deployment, with this pipeline.
    MEASURED = "measured here"
    #: From docs/performance.md: a worker process on one core of a server, with the default pipeline.
    BENCHMARK = "the benchmark's"
    #: No job of the kind was done yet.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Rate:
    """A figure and its origin; `value` is None if it is unknown."""

    value: float | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class CostModel:
    """The times and counts per image or second of video, for one worker process."""

    seconds_per_image: Rate
    seconds_per_probe: Rate
    #: Per second of video.
    seconds_per_footage_second: Rate
    faces_per_image: Rate
    #: Of videos.
    faces_per_frame: Rate
    #: Of videos as they lie in the source.
    bytes_per_footage_second: Rate


#: 20 Nov. 2026, docs/performance.md: 78 to 106 ms per image of 960×540, end to end; 17 frames per second on two cores.
#: Per second of video: at one frame per second, which is the default.
_BENCHMARK = {"image": 0.12, "probe": 0.1, "chunk": 2 / 17}

#: A message's jobs begin together and end one by one, so a message takes the time from its claim to its last end.
#: Messages that took more than three times the median are left out: they loaded models, or waited for something.
_SPANS = """
WITH recent AS (
    SELECT a.worker, j.kind, a.job_id, a.started_at, a.ended_at
    FROM job_attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.id > (SELECT max(id) FROM job_attempts) - :recent AND a.outcome = 'succeeded' AND j.pipeline_id = :pipeline
), messages AS (
    SELECT kind, worker, count(*) AS jobs, extract(epoch FROM max(ended_at) - min(started_at))::float AS seconds,
           CASE kind WHEN 'chunk' THEN
               (SELECT sum(c.seconds) FROM frame_counts c WHERE c.job_id = ANY(array_agg(r.job_id)))
           ELSE count(*) END AS units
    FROM recent r GROUP BY kind, worker
), usual AS (
    SELECT kind, percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds / units) AS middle
    FROM messages WHERE units > 0 GROUP BY kind
)
SELECT kind, sum(jobs)::int AS jobs, sum(seconds) / sum(units) AS per_unit
FROM messages JOIN usual USING (kind) WHERE units > 0 AND seconds / units <= 3 * middle GROUP BY kind
"""

#: Faces per frame in the newest images, or chunks of videos.
_FACES = """
WITH recent AS MATERIALIZED (
    SELECT j.id FROM jobs j JOIN media_objects m ON m.id = j.media_object_id JOIN locations l ON l.id = m.location_id
    WHERE j.id > (SELECT max(id) FROM jobs) - 200000 AND j.pipeline_id = :pipeline AND j.state = 'succeeded'
      AND j.kind = :kind AND (CAST(:location AS text) IS NULL OR l.name = :location) ORDER BY j.id DESC LIMIT 1000
)
SELECT sum(faces)::float / nullif(sum(frames), 0) FROM recent
CROSS JOIN LATERAL (SELECT sum(frames) AS frames FROM frame_counts WHERE job_id = recent.id) AS looked
CROSS JOIN LATERAL (SELECT count(*) AS faces FROM faces WHERE job_id = recent.id) AS found
"""

_BITRATE = """
SELECT sum(size_bytes)::float / nullif(sum(duration_seconds), 0) FROM media_objects m
JOIN locations l ON l.id = m.location_id
WHERE m.id > (SELECT max(id) FROM media_objects) - 200000 AND m.kind = 'video' AND m.duration_seconds > 0
  AND (CAST(:location AS text) IS NULL OR l.name = :location)
"""


def measured(session: Session, pipeline_id: int | None, location: str) -> CostModel:
    """The figures for this pipeline. Those of faces and videos are the location's, or all locations' if it has none."""
    spans: dict[str, float] = {}
    if pipeline_id is not None:
        found = session.execute(text(_SPANS), {"recent": RECENT, "pipeline": pipeline_id})
        spans = {row.kind: row.per_unit for row in found if row.jobs >= ENOUGH or row.kind != "image"}

    def span(kind: str) -> Rate:
        return Rate(spans[kind], Origin.MEASURED) if kind in spans else Rate(_BENCHMARK[kind], Origin.BENCHMARK)

    def of_this_or_all(query: str, kind: str | None = None) -> Rate:
        for name in (location, None):
            value = session.scalar(text(query), {"pipeline": pipeline_id, "location": name, "kind": kind})
            if value is not None:
                return Rate(float(value), Origin.MEASURED)
        return Rate(None, Origin.UNKNOWN)

    return CostModel(
        span("image"),
        span("probe"),
        span("chunk"),
        of_this_or_all(_FACES, "image"),
        of_this_or_all(_FACES, "chunk"),
        of_this_or_all(_BITRATE),
    )
