"""Initial schema: all tables of the design, the DEFAULT partition of `faces`, and the analysts' views."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


# Wilson's score interval at 95 % (E. B. Wilson, 1927): unlike p ± 2 s.e. it stays inside [0, 1] and says
# something sensible for few faces. It treats faces as independent: see docs/schema.md for what that means.
WILSON = """
CREATE FUNCTION compliance_bound(successes bigint, trials bigint, sign integer) RETURNS double precision
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN trials > 0 THEN
        (p + z * z / (2 * n) + sign * z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
    END
    FROM (SELECT successes::double precision / nullif(trials, 0) AS p,
                 trials::double precision AS n, 1.959963984540054::double precision AS z) AS v
$$
"""

# Every face of the pipeline that its location has promoted, with the names instead of the ids.
FACE_RESULTS = """
CREATE VIEW face_results AS
SELECT f.id AS face_id, f.observed_at, f.observed_at AT TIME ZONE l.time_zone AS local_time,
       l.name AS location, c.name AS camera, m.bucket || '/' || m.key AS uri,
       m.observed_at_source AS time_source, f.x1, f.y1, f.x2, f.y2, f.size_px, f.p_face,
       f.p_with_mask, f.p_without_mask, f.status, p.detector, p.classifier, f.pipeline_id, f.job_id
FROM faces f
JOIN locations l ON l.id = f.location_id AND l.promoted_pipeline_id = f.pipeline_id
JOIN pipelines p ON p.id = f.pipeline_id
JOIN media_objects m ON m.id = f.media_object_id
LEFT JOIN cameras c ON c.id = f.camera_id
"""

COMPLIANCE_BY_HOUR = """
CREATE VIEW compliance_by_hour AS
SELECT l.name AS location, h.hour, h.hour AT TIME ZONE l.time_zone AS local_hour, l.time_zone,
       h.frames, h.seconds, h.faces, h.with_mask, h.without_mask, h.uncertain,
       h.with_mask::double precision / nullif(h.with_mask + h.without_mask, 0) AS compliance_rate,
       compliance_bound(h.with_mask, h.with_mask + h.without_mask, -1) AS rate_low,
       compliance_bound(h.with_mask, h.with_mask + h.without_mask, 1) AS rate_high,
       h.summarized_at
FROM compliance_hourly h
JOIN locations l ON l.id = h.location_id AND l.promoted_pipeline_id = h.pipeline_id
"""

COMPLIANCE_BY_DAY = """
CREATE VIEW compliance_by_day AS
SELECT d.location, d.day, d.time_zone, d.frames, d.seconds, d.faces, d.with_mask, d.without_mask, d.uncertain,
       d.with_mask::double precision / nullif(d.with_mask + d.without_mask, 0) AS compliance_rate,
       compliance_bound(d.with_mask, d.with_mask + d.without_mask, -1) AS rate_low,
       compliance_bound(d.with_mask, d.with_mask + d.without_mask, 1) AS rate_high
FROM (SELECT location, local_hour::date AS day, time_zone, sum(frames)::bigint AS frames, sum(seconds) AS seconds,
             sum(faces)::bigint AS faces, sum(with_mask)::bigint AS with_mask,
             sum(without_mask)::bigint AS without_mask, sum(uncertain)::bigint AS uncertain
      FROM compliance_by_hour GROUP BY location, local_hour::date, time_zone) AS d
"""


def upgrade() -> None:
    op.execute("CREATE SEQUENCE faces_id_seq AS bigint")
    op.create_table(
        "faces",
        sa.Column("id", sa.BigInteger(), server_default=sa.text("nextval('faces_id_seq')"), nullable=False),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("media_object_id", sa.BigInteger(), nullable=False),
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("camera_id", sa.Integer(), nullable=True),
        sa.Column("pipeline_id", sa.Integer(), nullable=False),
        sa.Column("x1", sa.REAL(), nullable=False),
        sa.Column("y1", sa.REAL(), nullable=False),
        sa.Column("x2", sa.REAL(), nullable=False),
        sa.Column("y2", sa.REAL(), nullable=False),
        sa.Column("size_px", sa.REAL(), nullable=False),
        sa.Column("p_face", sa.REAL(), nullable=False),
        sa.Column("p_with_mask", sa.REAL(), nullable=False),
        sa.Column("p_without_mask", sa.REAL(), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "with_mask",
                "without_mask",
                "uncertain",
                name="status",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", "observed_at", name=op.f("pk_faces")),
        postgresql_partition_by="RANGE (observed_at)",
    )
    op.create_index(op.f("ix_faces_job_id"), "faces", ["job_id"], unique=False)
    op.create_index(
        op.f("ix_faces_location_id_pipeline_id_observed_at"),
        "faces",
        ["location_id", "pipeline_id", "observed_at"],
        unique=False,
    )
    op.create_table(
        "pipelines",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("detector", sa.Text(), nullable=False),
        sa.Column("classifier", sa.Text(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pipelines")),
        sa.UniqueConstraint("fingerprint", name=op.f("uq_pipelines_fingerprint")),
    )
    op.create_table(
        "locations",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("promoted_pipeline_id", sa.Integer(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["promoted_pipeline_id"],
            ["pipelines.id"],
            name=op.f("fk_locations_promoted_pipeline_id_pipelines"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_locations")),
        sa.UniqueConstraint("name", name=op.f("uq_locations_name")),
    )
    op.create_table(
        "cameras",
        sa.Column("id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["location_id"], ["locations.id"], name=op.f("fk_cameras_location_id_locations")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cameras")),
        sa.UniqueConstraint("location_id", "name", name=op.f("uq_cameras_location_id_name")),
    )
    op.create_table(
        "compliance_hourly",
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("pipeline_id", sa.Integer(), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("frames", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.DOUBLE_PRECISION(), nullable=False),
        sa.Column("faces", sa.BigInteger(), nullable=False),
        sa.Column("with_mask", sa.BigInteger(), nullable=False),
        sa.Column("without_mask", sa.BigInteger(), nullable=False),
        sa.Column("uncertain", sa.BigInteger(), nullable=False),
        sa.Column(
            "summarized_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("faces = with_mask + without_mask + uncertain", name=op.f("ck_compliance_hourly_sum")),
        sa.ForeignKeyConstraint(
            ["location_id"], ["locations.id"], name=op.f("fk_compliance_hourly_location_id_locations")
        ),
        sa.ForeignKeyConstraint(
            ["pipeline_id"], ["pipelines.id"], name=op.f("fk_compliance_hourly_pipeline_id_pipelines")
        ),
        sa.PrimaryKeyConstraint("location_id", "pipeline_id", "hour", name=op.f("pk_compliance_hourly")),
    )
    op.create_table(
        "dirty_marks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("pipeline_id", sa.Integer(), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["location_id"], ["locations.id"], name=op.f("fk_dirty_marks_location_id_locations")),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipelines.id"], name=op.f("fk_dirty_marks_pipeline_id_pipelines")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dirty_marks")),
    )
    op.create_table(
        "backfills",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("camera_id", sa.Integer(), nullable=True),
        sa.Column("pipeline_id", sa.Integer(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("time_pattern", sa.Text(), nullable=True),
        sa.Column("cursor", sa.Text(), nullable=True),
        sa.Column("counts", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["camera_id"], ["cameras.id"], name=op.f("fk_backfills_camera_id_cameras")),
        sa.ForeignKeyConstraint(["location_id"], ["locations.id"], name=op.f("fk_backfills_location_id_locations")),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipelines.id"], name=op.f("fk_backfills_pipeline_id_pipelines")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backfills")),
    )
    op.create_table(
        "media_objects",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("etag", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("last_modified", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "kind",
            sa.Enum("image", "video", name="kind", native_enum=False, create_constraint=True, length=32),
            nullable=False,
        ),
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("camera_id", sa.Integer(), nullable=True),
        sa.Column("observed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "observed_at_source",
            sa.Enum(
                "key_pattern",
                "exif",
                "last_modified",
                name="observed_at_source",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=True,
        ),
        sa.Column("observed_at_ambiguous", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("superseded_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(["camera_id"], ["cameras.id"], name=op.f("fk_media_objects_camera_id_cameras")),
        sa.ForeignKeyConstraint(["location_id"], ["locations.id"], name=op.f("fk_media_objects_location_id_locations")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_media_objects")),
        sa.UniqueConstraint("bucket", "key", "revision", name=op.f("uq_media_objects_bucket_key_revision")),
    )
    op.create_index(op.f("ix_media_objects_location_id"), "media_objects", ["location_id"], unique=False)
    op.create_index(
        "uq_media_objects_current",
        "media_objects",
        ["bucket", "key"],
        unique=True,
        postgresql_where=sa.text("superseded_at IS NULL"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("media_object_id", sa.BigInteger(), nullable=False),
        sa.Column("pipeline_id", sa.Integer(), nullable=False),
        sa.Column("backfill_id", sa.BigInteger(), nullable=True),
        sa.Column(
            "kind",
            sa.Enum("image", "probe", "chunk", name="kind", native_enum=False, create_constraint=True, length=32),
            nullable=False,
        ),
        sa.Column("range_start_ms", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("range_end_ms", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("lane", sa.SmallInteger(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "pending",
                "queued",
                "running",
                "retry_wait",
                "succeeded",
                "quarantined",
                "source_changed",
                "cancelled",
                name="state",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            server_default="pending",
            nullable=False,
        ),
        sa.Column("token", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("crashes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lost_leases", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("alone", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("next_run_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("epoch", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("range_start_ms >= 0 AND range_end_ms >= range_start_ms", name=op.f("ck_jobs_range")),
        sa.ForeignKeyConstraint(["backfill_id"], ["backfills.id"], name=op.f("fk_jobs_backfill_id_backfills")),
        sa.ForeignKeyConstraint(
            ["media_object_id"], ["media_objects.id"], name=op.f("fk_jobs_media_object_id_media_objects")
        ),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipelines.id"], name=op.f("fk_jobs_pipeline_id_pipelines")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint(
            "media_object_id",
            "pipeline_id",
            "kind",
            "range_start_ms",
            "range_end_ms",
            name=op.f("uq_jobs_media_object_id_pipeline_id_kind_range_start_ms_range_end_ms"),
        ),
    )
    op.create_index(op.f("ix_jobs_backfill_id"), "jobs", ["backfill_id"], unique=False)
    op.create_index(
        "ix_jobs_pending",
        "jobs",
        ["lane", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'pending' AND NOT alone"),
    )
    op.create_index(
        "ix_jobs_pending_alone",
        "jobs",
        ["lane", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'pending' AND alone"),
    )
    op.create_index(
        "ix_jobs_quarantined", "jobs", ["id"], unique=False, postgresql_where=sa.text("state = 'quarantined'")
    )
    op.create_index("ix_jobs_queued", "jobs", ["queued_at"], unique=False, postgresql_where=sa.text("state = 'queued'"))
    op.create_index(
        "ix_jobs_retry_wait",
        "jobs",
        ["next_run_at"],
        unique=False,
        postgresql_where=sa.text("state = 'retry_wait'"),
    )
    op.create_index(
        "ix_jobs_running",
        "jobs",
        ["lease_until"],
        unique=False,
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "frame_counts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("hour", sa.DateTime(timezone=True), nullable=False),
        sa.Column("location_id", sa.Integer(), nullable=False),
        sa.Column("camera_id", sa.Integer(), nullable=True),
        sa.Column("pipeline_id", sa.Integer(), nullable=False),
        sa.Column("frames", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.DOUBLE_PRECISION(), nullable=False),
        sa.ForeignKeyConstraint(["camera_id"], ["cameras.id"], name=op.f("fk_frame_counts_camera_id_cameras")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_frame_counts_job_id_jobs")),
        sa.ForeignKeyConstraint(["location_id"], ["locations.id"], name=op.f("fk_frame_counts_location_id_locations")),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipelines.id"], name=op.f("fk_frame_counts_pipeline_id_pipelines")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_frame_counts")),
    )
    op.create_index(op.f("ix_frame_counts_job_id"), "frame_counts", ["job_id"], unique=False)
    op.create_index(
        op.f("ix_frame_counts_location_id_pipeline_id_hour"),
        "frame_counts",
        ["location_id", "pipeline_id", "hour"],
        unique=False,
    )
    op.create_table(
        "job_attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column(
            "outcome",
            sa.Enum(
                "succeeded",
                "retried",
                "quarantined",
                "source_changed",
                "crashed",
                "lease_expired",
                "released",
                "cancelled",
                name="outcome",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "ended_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_attempts_job_id_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_attempts")),
    )
    op.create_index(op.f("ix_job_attempts_job_id"), "job_attempts", ["job_id"], unique=False)
    # What no monthly partition takes lands here instead of failing a worker; `common/database/partitions.py` splits it.
    op.execute("CREATE TABLE faces_default PARTITION OF faces DEFAULT")
    for statement in (WILSON, FACE_RESULTS, COMPLIANCE_BY_HOUR, COMPLIANCE_BY_DAY):
        op.execute(statement)
