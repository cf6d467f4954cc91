"""What a finished job leaves behind, in the one transaction that ends it: the state, the faces, what was
looked at, and the marks that its hours must be summarized again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg import Connection
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.domain import Face, FrameFaces, ObservedAt, PermanentJobError, Reason, VideoInfo
from common.ledger import ClaimedJob, purged_detail
from common.retention import purged_before

_COPY_FACES = (
    "COPY faces (observed_at, job_id, media_object_id, location_id, camera_id, pipeline_id,"
    " x1, y1, x2, y2, size_px, p_face, p_with_mask, p_without_mask, status, offset_seconds, track_id) FROM STDIN"
)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why a job that succeeded could do a part of its range only."""

    reason: Reason
    detail: str


def record_image(session: Session, job: ClaimedJob, faces: Sequence[Face], seen: ObservedAt, *, fence: bool) -> None:
    """End an image job with its faces. Raises `StaleJobError`, and writes nothing, if the job was lost;
    `PermanentJobError` if it was seen in purged time."""
    ledger.succeed(session, job, seen, fence=fence)
    _leave_out_purged(session, job, [seen.instant])
    # A picture counts as one frame of no length, faces or not.
    _count(session, job, [(seen.instant, 0.0)])
    _copy(session, job, [(seen.instant, 0.0, face, None) for face in faces])


def record_probe(
    session: Session,
    job: ClaimedJob,
    info: VideoInfo,
    seen: ObservedAt,
    ranges_ms: Sequence[tuple[int, int]],
    *,
    fence: bool,
) -> None:
    """End a probe with the plan of its video. Raises `StaleJobError`, and writes nothing, if the job was lost."""
    ledger.plan_chunks(session, job, info, ranges_ms)
    ledger.succeed(session, job, seen, fence=fence)


def record_chunk(
    session: Session, job: ClaimedJob, frames: Sequence[FrameFaces], shortfall: Shortfall | None, *, fence: bool
) -> None:
    """End a chunk with its frames; those of purged time are left out. Raises `StaleJobError`, and writes nothing, if
    the job was lost; `PermanentJobError` if all frames were seen in purged time."""
    began = job.observed_at
    assert began is not None, "a chunk is planned by a probe, which settles when the recording began"
    placed = [(began.instant + timedelta(seconds=frame.offset_seconds), frame) for frame in frames]
    # So that what follows comes after this transaction's first write: see `purged_before`.
    session.execute(text("SELECT pg_current_xact_id()"))
    stored = _leave_out_purged(session, job, [at for at, _ in placed])
    if not all(stored):
        placed = [pair for pair, kept in zip(placed, stored, strict=True) if kept]
        shortfall = Shortfall(
            Reason.PURGED, f"{job.uri}: {stored.count(False)} frames were seen in purged time and left out"
        )
    ledger.succeed(
        session,
        job,
        began,
        reason=shortfall.reason if shortfall else None,
        detail=shortfall.detail if shortfall else None,
        fence=fence,
    )
    _count(session, job, [(at, frame.covers_seconds) for at, frame in placed])
    _copy(
        session,
        job,
        [
            (at, frame.offset_seconds, face, track_id)
            for at, frame in placed
            for face, track_id in zip(frame.faces, frame.track_ids, strict=True)
        ],
    )


def _leave_out_purged(session: Session, job: ClaimedJob, ats: Sequence[datetime]) -> list[bool]:
    """Which of these instants lie in hours of the location that may be stored; `PermanentJobError` if none does."""
    purged = purged_before(session)
    if purged is None or not ats:
        return [True] * len(ats)
    stored = session.scalars(
        text(
            "SELECT date_trunc('hour', at, :zone) >= :purged"
            " FROM unnest(CAST(:ats AS timestamptz[])) WITH ORDINALITY AS seen (at, number) ORDER BY number"
        ),
        {"zone": job.time_zone, "purged": purged, "ats": list(ats)},
    ).all()
    if not any(stored):
        raise PermanentJobError(Reason.PURGED, purged_detail(ats[0], purged))
    return list(stored)


def _count(session: Session, job: ClaimedJob, frames: Sequence[tuple[datetime, float]]) -> None:
    """Count frames (when seen, seconds they stand for) in the hours of their location, and mark these."""
    session.execute(
        text(
            "WITH counted AS ("
            " INSERT INTO frame_counts (job_id, hour, location_id, camera_id, pipeline_id, frames, seconds)"
            " SELECT :job, date_trunc('hour', at, :zone) AS hour, :location, :camera, :pipeline, count(*), sum(seconds)"
            " FROM unnest(CAST(:ats AS timestamptz[]), CAST(:seconds AS double precision[])) AS seen (at, seconds)"
            " GROUP BY hour RETURNING location_id, pipeline_id, hour"
            ") INSERT INTO dirty_marks (location_id, pipeline_id, hour) SELECT * FROM counted"
        ),
        {
            "job": job.ref.id,
            "ats": [at for at, _ in frames],
            "seconds": [seconds for _, seconds in frames],
            "zone": job.time_zone,
            "location": job.location_id,
            "camera": job.camera_id,
            "pipeline": job.pipeline_id,
        },
    )


def _copy(session: Session, job: ClaimedJob, faces: Sequence[tuple[datetime, float, Face, int | None]]) -> None:
    """Store faces: when seen, the offset in the video, the face, its track."""
    if not faces:
        return
    # COPY is about eight times faster than inserts, and is part of the session's transaction all the same.
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, Connection)
    owner = (job.ref.id, job.media_object_id, job.location_id, job.camera_id, job.pipeline_id)
    with connection.cursor() as cursor, cursor.copy(_COPY_FACES) as copy:
        for at, offset, face, track_id in faces:
            box = (face.x1, face.y1, face.x2, face.y2, face.size_px)
            found = (face.p_face, face.p_with_mask, face.p_without_mask, face.status.value)
            copy.write_row((at, *owner, *box, *found, offset, track_id))
