"""Corrects a camera's location or time pattern, or a location's time zone: footage, faces and summaries move.

One transaction changes the setting, the registered footage, the faces found in it, and the record of who did it, so
that nobody sees a part of it. No footage is read again, except chunks of videos whose counts can't be moved from hour
to hour: a zone that differs by half an hour splits them between two hours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Row, select, text
from sqlalchemy.orm import Session

from common import ledger
from common.catalog.schedule import interrupt_poll
from common.database.tables import Backfill, Camera, Location
from common.domain import MaskwatchError, MediaKind, ObjectInfo, ObservedAt, ObservedAtSource, PermanentJobError, Reason
from common.ledger import audit
from common.ledger.retention import PURGED_BEFORE_SQL, purged_before
from common.planning import PlannedObject, plan_object
from common.timestamps import TimePattern, hour_of, observed_from_file, zone

#: Objects per statement.
BATCH = 2000


@dataclass(slots=True)
class Correction:
    """What a correction did, in objects."""

    #: All current objects of the camera or the location.
    objects: int = 0
    #: Objects that are counted at another place or time than before.
    moved: int = 0
    #: Objects that had no time, and now have one.
    placed: int = 0
    #: Objects that have no time any more, or a purged time: they are quarantined.
    unplaced: int = 0
    #: Objects that count in purged hours: they stay as they are.
    frozen: int = 0
    #: Jobs that start again.
    jobs_again: int = 0
    #: False if the new location shows the figures of another pipeline.
    shown: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reading:
    """The zone and the key patterns that times are read with."""

    zone: ZoneInfo
    patterns: Sequence[TimePattern]


def correct_camera(
    session: Session, camera: Camera, *, to: Location | None = None, time_pattern: str | None = None, by: str
) -> Correction:
    """Correct the location of a camera, or the time pattern of its keys.

    Raises `MaskwatchError` for an impossible change, and for a pattern that fits none of the camera's footage.
    """
    (camera,) = _lock_cameras(session, Camera.id == camera.id)
    location = session.get_one(Location, camera.location_id)
    place = to or location
    backfills = _lock(session, Backfill.camera_id == camera.id)
    # After `_lock`, nobody else changes the locations until this transaction ends.
    session.refresh(location)
    session.refresh(place)
    said = []
    if to is not None:
        if to.id == location.id:
            raise MaskwatchError(f"camera {camera.name!r} is at {to.name!r} already")
        if session.scalar(select(Camera.id).where(Camera.location_id == to.id, Camera.name == camera.name)):
            raise MaskwatchError(f"{to.name!r} has a camera {camera.name!r} already: their footage would be mixed")
        said.append(f"location {location.name} → {to.name}")
    if time_pattern is not None:
        TimePattern(time_pattern)
        said.append(f"time pattern {camera.time_pattern or 'none'} → {time_pattern}")
    if location.time_zone != place.time_zone:
        _check_bounds(backfills)
    before = Reading(zone(location.time_zone), _patterns(session, location))
    after = Reading(zone(place.time_zone), [TimePattern(time_pattern)] if time_pattern else [])
    detail = f"camera {camera.name} of {location.name}: {', '.join(said)}"
    ledger.lock_footage(session, camera_id=camera.id)
    done, again = _move(session, "camera_id = :id", camera.id, place, before, after, detail)
    if time_pattern is not None and done.objects and done.unplaced == done.objects:
        raise MaskwatchError(
            f"the time pattern {time_pattern!r} fits none of the {done.unplaced} keys of camera {camera.name!r}; "
            "nothing was changed"
        )
    camera.location_id = place.id
    for backfill in backfills:
        backfill.location_id = place.id
    if time_pattern is not None:
        camera.time_pattern = time_pattern
        for backfill in backfills:
            backfill.time_pattern = time_pattern
    if place.promoted_pipeline_id is None:
        place.promoted_pipeline_id = location.promoted_pipeline_id
    done.shown = place.promoted_pipeline_id == location.promoted_pipeline_id
    audit.record(session, "correct", by, detail=detail, job_ids=again)
    return done


def correct_zone(session: Session, location: Location, time_zone: str, *, by: str) -> Correction:
    """Correct the time zone of a location: all its footage moves, whether it belongs to a camera or not.

    Raises `MaskwatchError` for an unknown zone, and for the zone that the location has.
    """
    after = Reading(zone(time_zone), [])
    _lock_cameras(session, Camera.location_id == location.id)
    backfills = _lock(session, Backfill.location_id == location.id)
    session.refresh(location)
    if location.time_zone == time_zone:
        raise MaskwatchError(f"location {location.name!r} is in the time zone {time_zone} already")
    _check_bounds(backfills)
    before = Reading(zone(location.time_zone), _patterns(session, location))
    detail = f"location {location.name}: time zone {location.time_zone} → {time_zone}"
    ledger.lock_footage(session, location_id=location.id)
    location.time_zone = time_zone
    session.flush()
    done, again = _move(session, "location_id = :id", location.id, location, before, after, detail)
    audit.record(session, "correct", by, detail=detail, job_ids=again)
    return done


def _lock_cameras(session: Session, which: Any) -> list[Camera]:
    """Lock cameras: their polls wait for this transaction, and then find that they have lost the camera."""
    # No time limit: a correction is done as a whole or not at all.
    session.execute(text("SET LOCAL statement_timeout = 0"))
    # The same lock as an update's: a transaction that inserts a row referring to a camera need not wait.
    query = select(Camera).where(which).order_by(Camera.id).with_for_update(key_share=True)
    cameras = list(session.scalars(query.execution_options(populate_existing=True)))
    for camera in cameras:
        interrupt_poll(session, camera.id)
    return cameras


def _lock(session: Session, which: Any) -> list[Backfill]:
    """Keep everybody from registering; returns the backfills that may still be listed, locked.

    Raises `MaskwatchError` if one has just begun: its process and this one would wait for each other.
    """
    query = (
        select(Backfill)
        .where(which, Backfill.finished_at.is_(None), Backfill.cancelled_at.is_(None))
        .order_by(Backfill.id)
        .execution_options(populate_existing=True)
    )
    backfills = list(session.scalars(query.with_for_update(key_share=True)))
    ledger.keep_from_registering(session)
    if {row.id for row in session.scalars(query)} != {row.id for row in backfills}:
        raise MaskwatchError("a backfill of this footage has just begun or ended; give the command again")
    return backfills


def _check_bounds(backfills: Sequence[Backfill]) -> None:
    """Raise `MaskwatchError` for a backfill whose time range was read in the time zone that is to be corrected."""
    for backfill in backfills:
        if backfill.since is not None or backfill.until is not None:
            raise MaskwatchError(
                f"the time range of backfill {backfill.id} was read in the time zone that is to be corrected; wait for "
                f"the end of its listing (maskwatch backfills list), or cancel it: maskwatch backfills cancel "
                f"{backfill.id}"
            )


def _patterns(session: Session, location: Location) -> list[TimePattern]:
    """All time patterns that the footage of a location may have been read with."""
    found = [
        pattern
        for table in (Camera, Backfill)
        for pattern in session.scalars(
            select(table.time_pattern).where(table.location_id == location.id, table.time_pattern.is_not(None))
        )
    ]
    return [TimePattern(pattern) for pattern in dict.fromkeys(found) if pattern]


def _move(
    session: Session, which: str, of: int, place: Location, before: Reading, after: Reading, detail: str
) -> tuple[Correction, list[int]]:
    """Move the footage; returns the counts and the jobs that start again."""
    done = Correction()
    again: list[int] = []
    purged = purged_before(session)
    for rows in _batches(session, which, of):
        placements = []
        for row in rows:
            placement = _place(row, before, after, purged)
            placements.append(placement)
            if row.superseded_at is not None:
                continue
            done.objects += 1
            done.frozen += row.frozen
            if placement.reason is not None or (placement.seen is None and row.reason is not None):
                done.unplaced += 1
            elif row.observed_at is None and placement.seen is not None:
                done.placed += 1
            elif placement.shift or row.location_id != place.id:
                done.moved += 1
        again += ledger.correct(session, placements, place, detail=detail)
    done.jobs_again = len(again)
    return done, again


def _batches(session: Session, which: str, of: int) -> Iterator[Sequence[Row[Any]]]:
    """The footage in batches, with the reason why it could not be placed in time (or None), and whether it counts in
    purged hours."""
    query = (
        "SELECT m.*, (SELECT reason FROM jobs WHERE media_object_id = m.id AND state = 'quarantined'"  # noqa: S608
        " AND reason = ANY(:reasons) LIMIT 1) AS reason,"
        " EXISTS (SELECT FROM jobs JOIN frame_counts c ON c.job_id = jobs.id WHERE media_object_id = m.id"
        f" AND c.hour < {PURGED_BEFORE_SQL}) AS frozen"
        f" FROM media_objects m WHERE {which}"
    )
    parameters = {"id": of, "reasons": [*ledger.UNPLACED, Reason.PURGED]}
    # A server-side cursor: it shows the rows as they are now, whatever is written meanwhile.
    yield from session.execute(text(query), parameters, execution_options={"yield_per": BATCH}).partitions()


def _place(row: Row[Any], before: Reading, after: Reading, purged: datetime | None) -> ledger.Placement:
    stored = None
    if row.observed_at is not None:
        stored = ObservedAt(row.observed_at, ObservedAtSource(row.observed_at_source), row.observed_at_ambiguous)
    if row.frozen and row.kind == MediaKind.IMAGE:
        return ledger.Placement(row.id, stored, timedelta())
    info = ObjectInfo(row.bucket, row.key, row.etag, row.size_bytes, row.last_modified)
    planned = _read_again(info, MediaKind(row.kind), stored, row.reason, before, after)
    seen, reason, detail = planned.observed_at, planned.reason, planned.detail
    if row.superseded_at is not None:
        reason = detail = None
    elif (
        reason is None
        and seen
        and purged
        and row.kind == MediaKind.IMAGE
        and hour_of(seen.instant, after.zone) < purged
    ):
        # A video is not refused: the worker leaves out its frames from purged time.
        reason, detail = Reason.PURGED, f"{info.uri}: {ledger.purged_detail(seen.instant, purged)}"
    shift = seen.instant - stored.instant if seen and stored else timedelta()
    return ledger.Placement(row.id, seen, shift, reason, detail)


def _read_again(
    info: ObjectInfo,
    kind: MediaKind,
    stored: ObservedAt | None,
    reason: str | None,
    before: Reading,
    after: Reading,
) -> PlannedObject:
    """When an object was taken, by reading the source of its time in the new way."""
    for pattern in after.patterns:
        return plan_object(info, pattern, after.zone) or PlannedObject(info, kind, stored)
    unplaced = stored is None and reason in ledger.UNPLACED
    if unplaced or (stored is not None and stored.source is ObservedAtSource.KEY_PATTERN):
        # Only by the pattern that gives the stored time: another pattern would give another time.
        for pattern in before.patterns:
            then = plan_object(info, pattern, before.zone)
            if then is not None and (then.reason == reason if unplaced else then.observed_at == stored):
                return plan_object(info, pattern, after.zone) or then
        if unplaced:
            return PlannedObject(info, kind, None)
    if stored is None or stored.source in (ObservedAtSource.CREATION_TIME, ObservedAtSource.LAST_MODIFIED):
        return PlannedObject(info, kind, stored)  # an instant, which depends on no zone
    local = stored.instant.astimezone(before.zone).replace(tzinfo=None)
    try:
        read = observed_from_file(None, local, info.last_modified, after.zone)
    except PermanentJobError as error:
        return PlannedObject(info, kind, None, error.reason, error.detail)
    if stored.source is ObservedAtSource.KEY_PATTERN and read.source is ObservedAtSource.EXIF:
        read = ObservedAt(read.instant, stored.source, read.ambiguous)
    return PlannedObject(info, kind, read)
