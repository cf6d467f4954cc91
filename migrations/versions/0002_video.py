"""Videos: what a probe learns of them, when a face is shown in its video, tracks, and a view of visits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# As in 0001, with the frame's time in its video and the track; new columns of a view go behind the old ones.
FACE_RESULTS = """
CREATE OR REPLACE VIEW face_results AS
SELECT f.id AS face_id, f.observed_at, f.observed_at AT TIME ZONE l.time_zone AS local_time,
       l.name AS location, c.name AS camera, m.bucket || '/' || m.key AS uri,
       m.observed_at_source AS time_source, f.x1, f.y1, f.x2, f.y2, f.size_px, f.p_face,
       f.p_with_mask, f.p_without_mask, f.status, p.detector, p.classifier, f.pipeline_id, f.job_id,
       f.offset_seconds, f.track_id
FROM faces f
JOIN locations l ON l.id = f.location_id AND l.promoted_pipeline_id = f.pipeline_id
JOIN pipelines p ON p.id = f.pipeline_id
JOIN media_objects m ON m.id = f.media_object_id
LEFT JOIN cameras c ON c.id = f.camera_id
"""

# A track votes: what most of its decided faces say; a draw, and a track without a decided face, is uncertain.
VISIT_RESULTS = """
CREATE VIEW visit_results AS
SELECT v.job_id, v.track_id, v.location, v.camera, v.uri, v.first_seen, v.last_seen,
       v.first_seen AT TIME ZONE v.time_zone AS local_time, v.faces, v.with_mask, v.without_mask, v.uncertain,
       CASE WHEN v.with_mask > v.without_mask THEN 'with_mask' WHEN v.without_mask > v.with_mask THEN 'without_mask'
            ELSE 'uncertain' END AS status,
       v.pipeline_id
FROM (SELECT f.job_id, f.track_id, l.name AS location, l.time_zone, c.name AS camera,
             m.bucket || '/' || m.key AS uri, min(f.observed_at) AS first_seen, max(f.observed_at) AS last_seen,
             count(*) AS faces, count(*) FILTER (WHERE f.status = 'with_mask') AS with_mask,
             count(*) FILTER (WHERE f.status = 'without_mask') AS without_mask,
             count(*) FILTER (WHERE f.status = 'uncertain') AS uncertain, f.pipeline_id
      FROM faces f
      JOIN locations l ON l.id = f.location_id AND l.promoted_pipeline_id = f.pipeline_id
      JOIN media_objects m ON m.id = f.media_object_id
      LEFT JOIN cameras c ON c.id = f.camera_id
      WHERE f.track_id IS NOT NULL
      GROUP BY f.job_id, f.track_id, l.name, l.time_zone, c.name, m.bucket, m.key, f.pipeline_id) AS v
"""


def upgrade() -> None:
    for name, kind in (
        ("container", sa.Text()),
        ("codec", sa.Text()),
        ("width", sa.Integer()),
        ("height", sa.Integer()),
        ("frame_rate", sa.DOUBLE_PRECISION()),
        ("rotation", sa.SmallInteger()),
        ("duration_seconds", sa.DOUBLE_PRECISION()),
    ):
        op.add_column("media_objects", sa.Column(name, kind, nullable=True))
    op.drop_constraint(op.f("ck_media_objects_observed_at_source"), "media_objects", type_="check")
    op.create_check_constraint(
        op.f("ck_media_objects_observed_at_source"),
        "media_objects",
        "observed_at_source IN ('key_pattern', 'exif', 'creation_time', 'last_modified')",
    )
    # With a constant default Postgres rewrites no row, however many there are; partitions follow their parent.
    op.add_column(
        "faces", sa.Column("offset_seconds", sa.DOUBLE_PRECISION(), server_default=sa.text("0"), nullable=False)
    )
    op.add_column("faces", sa.Column("track_id", sa.Integer(), nullable=True))
    op.execute(FACE_RESULTS)
    op.execute(VISIT_RESULTS)
