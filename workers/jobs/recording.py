"""Writes the results of a job in the transaction that ends it: the state, the faces, the counts of analysed frames,
and the marks that its hours must be summarized again."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg import Connection
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.database.sessions import sql
from common.domain import Face, FrameFaces, ObservedAt, PermanentJobError, Reason, VideoInfo
from common.ledger import ClaimedJob, purged_detail
from common.ledger.retention import PURGED_BEFORE_SQL, purged_before

_COPY_FACES = (
    "COPY faces (observed_at, job_id, media_object_id, location_id, camera_id, pipeline_id,"
    " x1, y1, x2, y2, size_px, p_face, p_with_mask, p_without_mask, status, offset_seconds, track_id) FROM STDIN"
)

#: Counts frames of jobs in the hours of their locations, except purged hours; returns how many frames were counted.
_COUNT_FRAMES = (
    "WITH counted AS ("  # noqa: S608 - constants
    " INSERT INTO frame_counts (job_id, hour, location_id, camera_id, pipeline_id, frames, seconds)"
    " SELECT job, date_trunc('hour', at, zone) AS hour, location, camera, pipeline, count(*), sum(seconds)"
    " FROM json_to_recordset(CAST(:frames AS json)) AS seen (job bigint, at timestamptz, seconds float8)"
    " JOIN json_to_recordset(CAST(:jobs AS json))"
    " AS of (job bigint, zone text, location int, camera int, pipeline int) USING (job)"
    f" WHERE date_trunc('hour', at, zone) >= {PURGED_BEFORE_SQL}"
    " GROUP BY job, hour, location, camera, pipeline RETURNING location_id, pipeline_id, hour, frames"
    "), marked AS (INSERT INTO dirty_marks (location_id, pipeline_id, hour)"
    " SELECT DISTINCT location_id, pipeline_id, hour FROM counted"
    ") SELECT coalesce(sum(frames), 0) FROM counted"
)


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why a job that succeeded could analyse only a part of its range."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class AnalysedImage:
    """The faces that were found in the image of a job, and when the camera saw it."""

    job: ClaimedJob
    faces: Sequence[Face]
    seen: ObservedAt


def record_image(session: Session, job: ClaimedJob, faces: Sequence[Face], seen: ObservedAt) -> None:
    """End an image job with its faces. Raises `StaleJobError`, and writes nothing, if the job was lost;
    `PermanentJobError` if it was seen in purged time."""
    record_images(session, [AnalysedImage(job, faces, seen)])


def record_images(session: Session, images: Collection[AnalysedImage]) -> None:
    """End image jobs with their faces, all of them or none, in as many statements as one job takes. Raises as
    `record_image`, if one of the jobs does."""
    ledger.succeed_all(session, [(image.job, image.seen) for image in images])
    # An image counts as one frame of 0 s, with or without faces.
    stored = _count(session, [(image.job, image.seen.instant, 0.0) for image in images])
    if stored < len(images):
        for image in images:
            _leave_out_purged(session, image.job, [image.seen.instant])
    _copy(
        session,
        [(image.job, image.seen.instant, 0.0, face, None) for image in images for face in image.faces],
    )


def record_probe(
    session: Session,
    job: ClaimedJob,
    info: VideoInfo,
    seen: ObservedAt,
    ranges_ms: Sequence[tuple[int, int]],
) -> None:
    """End a probe with the plan of its video. Raises `StaleJobError`, and writes nothing, if the job was lost."""
    ledger.plan_chunks(session, job, info, ranges_ms)
    ledger.succeed(session, job, ledger.settled_start(session, job) or seen)


def record_chunk(session: Session, job: ClaimedJob, frames: Sequence[FrameFaces], shortfall: Shortfall | None) -> None:
    """End a chunk with its frames; those of purged time are left out. Raises `StaleJobError`, and writes nothing, if
    the job was lost; `PermanentJobError` if all frames were seen in purged time."""
    began = job.observed_at
    assert began is not None, "a chunk is planned by a probe, which settles when the recording began"
    placed = [(began.instant + timedelta(seconds=frame.offset_seconds), frame) for frame in frames]
    # Counts as this transaction's first write, which must come before `purged_before`.
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
    )
    _count(session, [(job, at, frame.covers_seconds) for at, frame in placed])
    _copy(
        session,
        [
            (job, at, frame.offset_seconds, face, track_id)
            for at, frame in placed
            for face, track_id in zip(frame.faces, frame.track_ids, strict=True)
        ],
    )


def _leave_out_purged(session: Session, job: ClaimedJob, ats: Sequence[datetime]) -> list[bool]:
    """For each instant, whether its hour at the location may be stored. Raises `PermanentJobError` if none may."""
    purged = purged_before(session)
    if purged is None or not ats:
        return [True] * len(ats)
    stored = session.scalars(
        text(
            """
            SELECT date_trunc('hour', at, :zone) >= :purged
            FROM unnest(CAST(:ats AS timestamptz[])) WITH ORDINALITY AS seen (at, number)
            ORDER BY number
            """
        ),
        {"zone": job.time_zone, "purged": purged, "ats": list(ats)},
    ).all()
    if not any(stored):
        raise PermanentJobError(Reason.PURGED, purged_detail(ats[0], purged))
    return list(stored)


def _count(session: Session, frames: Sequence[tuple[ClaimedJob, datetime, float]]) -> int:
    """Count frames (job, when seen, seconds that it covers) in the hours of their locations, and mark these hours.
    Frames of purged hours are left out; returns how many were counted. Call it after the transaction's first write."""
    jobs = {job.ref.id: job for job, _, _ in frames}
    counted = session.scalar(
        sql(_COUNT_FRAMES),
        {
            "frames": json.dumps(
                [{"job": job.ref.id, "at": at.isoformat(), "seconds": seconds} for job, at, seconds in frames]
            ),
            "jobs": json.dumps(
                [
                    {
                        "job": job_id,
                        "zone": job.time_zone,
                        "location": job.location_id,
                        "camera": job.camera_id,
                        "pipeline": job.pipeline_id,
                    }
                    for job_id, job in jobs.items()
                ]
            ),
        },
    )
    return int(counted or 0)


def _copy(session: Session, faces: Sequence[tuple[ClaimedJob, datetime, float, Face, int | None]]) -> None:
    """Store faces: (job, when seen, offset in the video in seconds, face, track id or None)."""
    if not faces:
        return
    # COPY is about eight times faster than inserts, and is part of the session's transaction all the same.
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, Connection)
    with connection.cursor() as cursor, cursor.copy(_COPY_FACES) as copy:
        for job, at, offset, face, track_id in faces:
            owner = (job.ref.id, job.media_object_id, job.location_id, job.camera_id, job.pipeline_id)
            box = (face.x1, face.y1, face.x2, face.y2, face.size_px)
            found = (face.p_face, face.p_with_mask, face.p_without_mask, face.status.value)
            copy.write_row((at, *owner, *box, *found, offset, track_id))
