"""Short ways to put planned objects into the ledger and to look at what it holds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import places
from common.domain import Face, JobRef, Lane, MaskStatus, MediaKind, ObjectInfo, ObservedAt, ObservedAtSource
from common.ledger import ClaimedJob, Dispatch, Registered
from common.models.pipeline import pipeline_spec
from common.planning import PlannedObject
from common.settings import get_settings

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def planned(key: str, *, etag: str = "e1", at: datetime = NOON, modified: datetime = NOON) -> PlannedObject:
    info = ObjectInfo("s3://footage", key, etag, 1000, modified)
    return PlannedObject(info, MediaKind.IMAGE, ObservedAt(at, ObservedAtSource.KEY_PATTERN))


def register(session: Session, *objects: PlannedObject, zone: str = "UTC", lane: Lane = Lane.BACKFILL) -> Registered:
    location = places.add_location(session, "lobby", zone)
    pipeline = places.ensure_pipeline(session, pipeline_spec(get_settings()))
    location.promoted_pipeline_id = pipeline.id
    result = ledger.register(session, objects, location=location, camera=None, pipeline=pipeline, lane=lane)
    session.commit()
    return result


def register_many(session: Session, count: int) -> None:
    register(session, *(planned(f"{n:04}.jpg", at=NOON + timedelta(minutes=n)) for n in range(count)))


def take(
    session: Session, limit: int = 100, *, isolated: bool = False, epoch: str = "epoch", message_size: int = 1
) -> list[JobRef]:
    """pending → queued, live first, as a tick does; the caller commits."""
    jobs: list[JobRef] = []
    for lane, feeds in ledger.feeds_with_work(session, isolated=isolated).items():
        to = Dispatch(lane, epoch, message_size)
        left = limit - len(jobs)
        jobs += [job.ref for job in ledger.take_pending(session, feeds, to, lane=lane, limit=left, isolated=isolated)]
    return jobs


def dispatch(session: Session, limit: int = 100, *, isolated: bool = False) -> list[JobRef]:
    refs = take(session, limit, isolated=isolated)
    session.commit()
    return refs


def claim(session: Session, refs: list[JobRef], *, worker: str = "w/1", lease: float = 60) -> list[ClaimedJob]:
    jobs = ledger.claim(session, refs, worker=worker, lease_seconds=lease)
    session.commit()
    return jobs


def face(status: MaskStatus = MaskStatus.WITH_MASK) -> Face:
    p_with = {MaskStatus.WITH_MASK: 0.9, MaskStatus.WITHOUT_MASK: 0.1, MaskStatus.UNCERTAIN: 0.5}[status]
    return Face(10, 10, 50, 60, 0.8, p_with, 1 - p_with, status)


def states(session: Session) -> dict[str, int]:
    session.rollback()
    return {row[0]: row[1] for row in session.execute(text("SELECT state, count(*) FROM jobs GROUP BY 1"))}


def scalar(session: Session, query: str, **parameters: Any) -> Any:
    session.rollback()
    return session.execute(text(query), parameters).scalar()


def rows(session: Session, query: str, **parameters: Any) -> list[Any]:
    session.rollback()
    return list(session.execute(text(query), parameters).all())


def coverage_by_both(session: Session) -> list[Any]:
    """All hours of all cameras, as `coverage_hourly` has them; fails where `camera_coverage` says something else."""
    names = (
        "v.hour, v.local_hour, v.expected_seconds, v.present_seconds, v.analysed_seconds, v.waiting_seconds,"
        " v.failed_seconds, v.missing_seconds, v.pieces, v.failed_pieces, v.coverage"
    )
    view = rows(session, f"SELECT camera_id, {names} FROM coverage_hourly v ORDER BY camera_id, hour")
    function = "camera_coverage(c.id, '-infinity', 'infinity')"
    others = rows(session, f"SELECT c.id, {names} FROM cameras c CROSS JOIN {function} v ORDER BY c.id, hour")
    assert [tuple(row) for row in view] == [tuple(row) for row in others]
    return view
