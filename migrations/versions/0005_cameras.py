"""Cameras on a schedule, and what they should have delivered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

# What there is of a camera and what became of it, hour by hour. Half an hour of a zone's clock change belongs to the
# hour before it.
COVERAGE_HOURLY = """
CREATE VIEW coverage_hourly AS
WITH pieces AS (
    -- Pictures and chunks of current versions, by the pipeline that the location shows; of a video that nobody could
    -- read the header of, all of it, as long as that is known.
    SELECT c.id AS camera_id, l.time_zone, j.state,
           coalesce(m.observed_at, m.last_modified)
               + make_interval(secs => j.range_start_ms / 1000.0) AS began,
           CASE j.kind
               WHEN 'image' THEN coalesce(c.picture_seconds, 0)
               WHEN 'probe' THEN coalesce(m.duration_seconds, 0)
               ELSE greatest(0, least(j.range_end_ms / 1000.0, coalesce(m.duration_seconds, j.range_end_ms / 1000.0))
                                - j.range_start_ms / 1000.0)
           END AS seconds
    FROM cameras c
    JOIN locations l ON l.id = c.location_id
    JOIN media_objects m ON m.camera_id = c.id AND m.superseded_at IS NULL
    JOIN jobs j ON j.media_object_id = m.id AND j.pipeline_id = l.promoted_pipeline_id
    WHERE j.state <> 'source_changed' AND (j.kind <> 'probe' OR j.state IN ('quarantined', 'cancelled'))
), placed AS (
    SELECT p.camera_id, at.hour, p.state, p.seconds = 0 AND p.began >= at.hour AS whole,
           greatest(0, extract(epoch FROM least(p.began + make_interval(secs => p.seconds), at.hour + interval '1 hour')
                                          - greatest(p.began, at.hour)))::double precision AS seconds
    FROM pieces p
    CROSS JOIN LATERAL generate_series(
        date_trunc('hour', p.began, p.time_zone), p.began + make_interval(secs => p.seconds), interval '1 hour'
    ) AS at (hour)
    WHERE p.seconds = 0 OR at.hour < p.began + make_interval(secs => p.seconds)
), known AS (
    SELECT camera_id, hour, count(*) AS pieces, sum(seconds) AS present,
           count(*) FILTER (WHERE state IN ('quarantined', 'cancelled')) AS failed_pieces,
           coalesce(sum(seconds) FILTER (WHERE state IN ('pending', 'queued', 'running', 'retry_wait')), 0) AS waiting,
           coalesce(sum(seconds) FILTER (WHERE state IN ('quarantined', 'cancelled')), 0) AS failed
    FROM placed GROUP BY camera_id, hour
), analysed AS (
    SELECT f.camera_id, f.hour,
           sum(CASE WHEN f.seconds > 0 THEN f.seconds ELSE f.frames * coalesce(c.picture_seconds, 0) END) AS seconds
    FROM frame_counts f
    JOIN cameras c ON c.id = f.camera_id
    JOIN locations l ON l.id = f.location_id AND l.promoted_pipeline_id = f.pipeline_id
    GROUP BY f.camera_id, f.hour
), due AS (
    SELECT c.id AS camera_id, at.hour, c.expected_seconds
    FROM cameras c
    JOIN locations l ON l.id = c.location_id
    CROSS JOIN LATERAL generate_series(
        date_trunc('hour', c.expected_since, l.time_zone),
        coalesce(c.expected_until, clock_timestamp()) - interval '1 hour', interval '1 hour'
    ) AS at (hour)
    WHERE c.expected_seconds IS NOT NULL AND c.expected_since IS NOT NULL
)
SELECT l.name AS location, c.name AS camera, hours.hour, hours.hour AT TIME ZONE l.time_zone AS local_hour,
       hours.expected_seconds, coalesce(hours.present, 0) AS present_seconds,
       coalesce(a.seconds, 0) AS analysed_seconds, coalesce(hours.waiting, 0) AS waiting_seconds,
       coalesce(hours.failed, 0) AS failed_seconds,
       -- greatest() and least() leave out what is NULL.
       CASE WHEN hours.expected_seconds IS NOT NULL
            THEN greatest(0, hours.expected_seconds - coalesce(hours.present, 0)) END AS missing_seconds,
       coalesce(hours.pieces, 0) AS pieces, coalesce(hours.failed_pieces, 0) AS failed_pieces,
       CASE WHEN hours.expected_seconds > 0
            THEN least(1, coalesce(a.seconds, 0) / hours.expected_seconds) END AS coverage,
       c.location_id, c.id AS camera_id
FROM (known FULL JOIN due USING (camera_id, hour)) AS hours
JOIN cameras c ON c.id = hours.camera_id
JOIN locations l ON l.id = c.location_id
LEFT JOIN analysed a ON a.camera_id = hours.camera_id AND a.hour = hours.hour
"""

# With how much of what its cameras should have delivered was looked at; NULL where nobody has said what that is.
COMPLIANCE_BY_HOUR = """
CREATE OR REPLACE VIEW compliance_by_hour AS
SELECT l.name AS location, h.hour, h.hour AT TIME ZONE l.time_zone AS local_hour, l.time_zone,
       h.frames, h.seconds, h.faces, h.with_mask, h.without_mask, h.uncertain,
       h.with_mask::double precision / nullif(h.with_mask + h.without_mask, 0) AS compliance_rate,
       compliance_bound(h.with_mask, h.with_mask + h.without_mask, -1) AS rate_low,
       compliance_bound(h.with_mask, h.with_mask + h.without_mask, 1) AS rate_high,
       h.summarized_at,
       CASE WHEN due.seconds > 0 THEN least(1, coalesce(looked.seconds, 0) / due.seconds) END AS coverage
FROM compliance_hourly h
JOIN locations l ON l.id = h.location_id AND l.promoted_pipeline_id = h.pipeline_id
CROSS JOIN LATERAL (
    SELECT sum(c.expected_seconds) AS seconds FROM cameras c
    WHERE c.location_id = h.location_id AND date_trunc('hour', c.expected_since, l.time_zone) <= h.hour
      AND (c.expected_until IS NULL OR c.expected_until > h.hour)
) AS due
CROSS JOIN LATERAL (
    SELECT sum(CASE WHEN f.seconds > 0 THEN f.seconds ELSE f.frames * coalesce(c.picture_seconds, 0) END) AS seconds
    FROM frame_counts f JOIN cameras c ON c.id = f.camera_id
    WHERE f.location_id = h.location_id AND f.pipeline_id = h.pipeline_id AND f.hour = h.hour
      AND c.expected_seconds IS NOT NULL
) AS looked
"""


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    seconds = sa.DOUBLE_PRECISION()
    for column in (
        sa.Column("source", sa.Text()),
        sa.Column("time_pattern", sa.Text()),
        sa.Column("pipeline_id", sa.Integer()),
        # One of both, of a camera on a schedule.
        sa.Column("every_seconds", seconds),
        sa.Column("cron", sa.Text()),
        sa.Column("look_back_seconds", seconds, server_default=sa.text("7200"), nullable=False),
        sa.Column("sweep_seconds", seconds, server_default=sa.text("86400"), nullable=False),
        # When its slots began to count, and until when: NULL while it is enabled.
        sa.Column("scheduled_since", moment),
        sa.Column("disabled_at", moment),
        sa.Column("removed_at", moment),
        # Who is looking now, until when, and how far he is.
        sa.Column("look_token", sa.Uuid()),
        sa.Column("look_until", moment),
        sa.Column("look_began", moment),
        sa.Column("look_cursor", sa.Text()),
        sa.Column("look_is_sweep", sa.Boolean()),
        sa.Column("swept_at", moment),
        sa.Column("problem", sa.Text()),
        # Of coverage.
        sa.Column("picture_seconds", seconds),
        sa.Column("expected_seconds", seconds),
        sa.Column("expected_since", moment),
        sa.Column("expected_until", moment),
    ):
        op.add_column("cameras", column)
    op.create_foreign_key(op.f("fk_cameras_pipeline_id_pipelines"), "cameras", "pipelines", ["pipeline_id"], ["id"])
    op.create_check_constraint(op.f("ck_cameras_schedule"), "cameras", "every_seconds IS NULL OR cron IS NULL")
    op.create_table(
        "camera_slots",
        sa.Column("camera_id", sa.Integer(), nullable=False),
        sa.Column("slot", moment, nullable=False),
        sa.Column("looks", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("finished_at", moment),
        sa.ForeignKeyConstraint(["camera_id"], ["cameras.id"], name=op.f("fk_camera_slots_camera_id_cameras")),
        sa.PrimaryKeyConstraint("camera_id", "slot", name=op.f("pk_camera_slots")),
    )
    op.create_index(
        "ix_camera_slots_open", "camera_slots", ["camera_id", "slot"], postgresql_where=sa.text("finished_at IS NULL")
    )
    # Where a camera's footage of some time is found: its coverage, and the newest that is known.
    op.create_index("ix_media_objects_camera_id", "media_objects", ["camera_id", "observed_at"])
    op.execute(COVERAGE_HOURLY)
    op.execute(COMPLIANCE_BY_HOUR)
