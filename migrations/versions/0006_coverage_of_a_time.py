"""A camera's coverage of some time, without reading all of its history."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

# What `coverage_hourly` says of a camera in the hours that begin in [since, until). `longest` bounds the length of its
# videos: one that began earlier than that before `since` is not looked for. Where a clock is changed by half an hour,
# the hours behind the change begin by the new clock, if those before it are not asked for.
CAMERA_COVERAGE = """
CREATE FUNCTION camera_coverage(
    of_camera integer, since timestamptz, until timestamptz, longest interval DEFAULT '7 days'
) RETURNS TABLE (
    hour timestamptz, local_hour timestamp, expected_seconds double precision, present_seconds double precision,
    analysed_seconds double precision, waiting_seconds double precision, failed_seconds double precision,
    missing_seconds double precision, pieces bigint, failed_pieces bigint, coverage double precision
) LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
WITH camera AS (
    SELECT c.id, c.expected_seconds, c.expected_since, c.expected_until,
           coalesce(c.picture_seconds, 0) AS picture_seconds, l.time_zone, l.promoted_pipeline_id
    FROM cameras c JOIN locations l ON l.id = c.location_id WHERE c.id = of_camera
), media AS (
    SELECT m.id, coalesce(m.observed_at, m.last_modified) AS began, m.kind, m.duration_seconds
    FROM media_objects m
    WHERE m.camera_id = of_camera AND m.superseded_at IS NULL
      AND (m.observed_at >= since - longest AND m.observed_at < until + interval '1 hour'
           OR m.observed_at IS NULL AND m.last_modified >= since - longest
              AND m.last_modified < until + interval '1 hour')
), looked_for AS (
    -- Pictures from before need no look at their jobs: there may be a hundred thousand a day.
    SELECT media.* FROM media CROSS JOIN camera
    WHERE media.kind <> 'image' OR media.began + make_interval(secs => camera.picture_seconds) >= since
), found AS (
    -- Pictures and chunks of current versions, by the pipeline that the location shows; of a video that nobody could
    -- read the header of, all of it, as long as that is known.
    SELECT camera.time_zone, j.state, m.began + make_interval(secs => j.range_start_ms / 1000.0) AS began,
           CASE j.kind
               WHEN 'image' THEN camera.picture_seconds
               WHEN 'probe' THEN coalesce(m.duration_seconds, 0)
               ELSE greatest(0, least(j.range_end_ms / 1000.0, coalesce(m.duration_seconds, j.range_end_ms / 1000.0))
                                - j.range_start_ms / 1000.0)
           END AS seconds
    FROM looked_for m
    CROSS JOIN camera
    JOIN jobs j ON j.media_object_id = m.id AND j.pipeline_id = camera.promoted_pipeline_id
    WHERE j.state <> 'source_changed' AND (j.kind <> 'probe' OR j.state IN ('quarantined', 'cancelled'))
), placed AS (
    SELECT at.hour, p.state,
           greatest(0, extract(epoch FROM least(p.began + make_interval(secs => p.seconds), at.hour + interval '1 hour')
                                          - greatest(p.began, at.hour)))::double precision AS seconds
    FROM found p
    CROSS JOIN LATERAL generate_series(
        date_trunc('hour', p.began, p.time_zone), p.began + make_interval(secs => p.seconds), interval '1 hour'
    ) AS at (hour)
    WHERE (p.seconds = 0 OR at.hour < p.began + make_interval(secs => p.seconds))
      AND at.hour >= since AND at.hour < until
), known AS (
    SELECT placed.hour, count(*) AS pieces, sum(seconds) AS present,
           count(*) FILTER (WHERE state IN ('quarantined', 'cancelled')) AS failed_pieces,
           coalesce(sum(seconds) FILTER (WHERE state IN ('pending', 'queued', 'running', 'retry_wait')), 0) AS waiting,
           coalesce(sum(seconds) FILTER (WHERE state IN ('quarantined', 'cancelled')), 0) AS failed
    FROM placed GROUP BY placed.hour
), analysed AS (
    -- Wherever they are: counts of purged hours stay at the location that the camera has left.
    SELECT f.hour, sum(CASE WHEN f.seconds > 0 THEN f.seconds ELSE f.frames * camera.picture_seconds END) AS seconds
    FROM camera
    JOIN frame_counts f ON f.camera_id = camera.id AND f.hour >= since AND f.hour < until
    JOIN locations l ON l.id = f.location_id AND l.promoted_pipeline_id = f.pipeline_id
    GROUP BY f.hour
), due AS (
    SELECT at.hour, camera.expected_seconds
    FROM camera
    CROSS JOIN LATERAL generate_series(
        date_trunc('hour', greatest(camera.expected_since, since), camera.time_zone),
        least(coalesce(camera.expected_until, statement_timestamp()) - interval '1 hour', until), interval '1 hour'
    ) AS at (hour)
    WHERE camera.expected_seconds IS NOT NULL AND camera.expected_since IS NOT NULL
      AND at.hour >= since AND at.hour < until
)
SELECT hours.hour, hours.hour AT TIME ZONE camera.time_zone,
       hours.expected_seconds, coalesce(hours.present, 0), coalesce(a.seconds, 0), coalesce(hours.waiting, 0),
       coalesce(hours.failed, 0),
       -- greatest() and least() leave out what is NULL.
       CASE WHEN hours.expected_seconds IS NOT NULL
            THEN greatest(0, hours.expected_seconds - coalesce(hours.present, 0)) END,
       coalesce(hours.pieces, 0), coalesce(hours.failed_pieces, 0),
       CASE WHEN hours.expected_seconds > 0 THEN least(1, coalesce(a.seconds, 0) / hours.expected_seconds) END
FROM (known FULL JOIN due USING (hour)) AS hours
CROSS JOIN camera
LEFT JOIN analysed a ON a.hour = hours.hour;
END
"""


def upgrade() -> None:
    op.create_index(
        "ix_frame_counts_camera_id",
        "frame_counts",
        ["camera_id", "hour"],
        postgresql_where=sa.text("camera_id IS NOT NULL"),
    )
    op.execute(CAMERA_COVERAGE)
