"""What a finished job leaves behind, in the one transaction that ends it: the state, the faces, what was
looked at, and the mark that its hour must be summarized again."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import Connection
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.domain import Face, ObservedAt
from common.ledger import ClaimedJob

_COPY_FACES = (
    "COPY faces (observed_at, job_id, media_object_id, location_id, camera_id, pipeline_id,"
    " x1, y1, x2, y2, size_px, p_face, p_with_mask, p_without_mask, status) FROM STDIN"
)


def record_image(session: Session, job: ClaimedJob, faces: Sequence[Face], seen: ObservedAt, *, fence: bool) -> None:
    """End an image job with its faces. Raises `StaleJobError`, and writes nothing, if the job was lost."""
    ledger.succeed(session, job, seen, fence=fence)
    # A picture counts as one frame of no length, faces or not.
    session.execute(
        text(
            "WITH counted AS ("
            " INSERT INTO frame_counts (job_id, hour, location_id, camera_id, pipeline_id, frames, seconds)"
            " VALUES (:job, date_trunc('hour', CAST(:at AS timestamptz), :zone), :location, :camera, :pipeline, 1, 0)"
            " RETURNING location_id, pipeline_id, hour"
            ") INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT * FROM counted"
        ),
        {
            "job": job.ref.id,
            "at": seen.instant,
            "zone": job.time_zone,
            "location": job.location_id,
            "camera": job.camera_id,
            "pipeline": job.pipeline_id,
        },
    )
    if faces:
        _copy(session, job, faces, seen)


def _copy(session: Session, job: ClaimedJob, faces: Sequence[Face], seen: ObservedAt) -> None:
    # COPY is about eight times faster than inserts, and is part of the session's transaction all the same.
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, Connection)
    owner = (job.ref.id, job.media_object_id, job.location_id, job.camera_id, job.pipeline_id)
    with connection.cursor() as cursor, cursor.copy(_COPY_FACES) as copy:
        for face in faces:
            box = (face.x1, face.y1, face.x2, face.y2, face.size_px)
            copy.write_row(
                (seen.instant, *owner, *box, face.p_face, face.p_with_mask, face.p_without_mask, face.status.value)
            )
