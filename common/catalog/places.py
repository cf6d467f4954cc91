"""Locations, cameras and pipelines: where footage belongs, and what analyses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from common.catalog.schedule import check_schedule, interrupt_poll
from common.database.tables import Camera, CameraSlot, ComplianceHour, Location, Pipeline
from common.domain import MaskwatchError, PipelineSpec
from common.models.pipeline import pipeline_spec
from common.settings import Settings
from common.storage.opening import open_source
from common.timestamps import TimePattern, zone


def add_location(session: Session, name: str, time_zone: str) -> Location:
    """Register a location. Adding it again with the same zone changes nothing; another zone is refused,
    because figures of the old one would move to other hours."""
    zone(time_zone)
    _check_name("location", name)
    session.execute(insert(Location).values(name=name, time_zone=time_zone).on_conflict_do_nothing())
    location = session.scalars(select(Location).where(Location.name == name)).one()
    if location.time_zone != time_zone:
        raise MaskwatchError(f"location {name!r} is already registered in the time zone {location.time_zone}")
    return location


def get_location(session: Session, name: str) -> Location:
    """The location of that name. Raises `MaskwatchError` naming the known ones."""
    location = session.scalars(select(Location).where(Location.name == name)).one_or_none()
    if location is None:
        known = ", ".join(session.scalars(select(Location.name).order_by(Location.name).limit(10))) or "none yet"
        raise MaskwatchError(
            f"unknown location {name!r} (known: {known}); add it: maskwatch locations add {name} --time-zone ZONE"
        )
    return location


def list_locations(session: Session) -> list[dict[str, Any]]:
    """Every location with its time zone and the pipeline whose figures it shows."""
    return [
        {"name": row.name, "time_zone": row.time_zone, "pipeline": row.promoted_pipeline_id}
        for row in session.scalars(select(Location).order_by(Location.name))
    ]


def add_camera(session: Session, location: Location, name: str) -> Camera:
    """Register a camera of a location; adding it again changes nothing."""
    _check_name("camera", name)
    session.execute(insert(Camera).values(location_id=location.id, name=name).on_conflict_do_nothing())
    return session.scalars(select(Camera).where(Camera.location_id == location.id, Camera.name == name)).one()


def get_camera(session: Session, location: Location, name: str) -> Camera:
    """The camera of that name at a location. Raises `MaskwatchError` naming the command that adds it."""
    camera = session.scalars(select(Camera).where(Camera.location_id == location.id, Camera.name == name)).one_or_none()
    if camera is None:
        raise MaskwatchError(
            f"unknown camera {name!r} at {location.name!r}; add it: "
            f"maskwatch cameras add {name} --location {location.name}"
        )
    return camera


def configure_camera(session: Session, camera: Camera, settings: Settings, options: Mapping[str, str | None]) -> None:
    """Set the options of a camera that are not None. Their names are those of `maskwatch cameras add`.

    Raises `MaskwatchError` for an impossible value, and for a source that overlaps another camera's.
    """
    text_of = {name: value for name, value in options.items() if value is not None}
    for name in ("source", "time_pattern"):
        if name in text_of:
            setattr(camera, name, text_of[name])
    if "time_pattern" in text_of:
        TimePattern(text_of["time_pattern"])
    if "every" in text_of or "cron" in text_of:
        camera.every_seconds = seconds(text_of["every"], "--every") if "every" in text_of else None
        camera.cron = text_of.get("cron")
        check_schedule(camera.every_seconds, camera.cron)
    for option, attribute in (
        ("look_back", "look_back_seconds"),
        ("full_scan", "full_scan_seconds"),
        ("picture_every", "image_seconds"),
        ("expects", "expected_seconds"),
    ):
        if option in text_of:
            setattr(camera, attribute, seconds(text_of[option], f"--{option.replace('_', '-')}"))
    if camera.expected_seconds is not None and camera.expected_seconds > 3600:
        raise MaskwatchError("--expects must be at most 1h: a camera can't deliver more than an hour per hour")
    scheduled = camera.every_seconds is not None or camera.cron is not None
    if scheduled and camera.source is None:
        raise MaskwatchError("a camera with a schedule needs a --source")
    if camera.source is not None:
        if "source" in text_of:
            camera.source = _checked_source(session, camera, settings, camera.source)
        if not scheduled and "source" in text_of and camera.scheduled_since is None:
            raise MaskwatchError("a camera with a --source needs a schedule: --every 5m or --cron '*/5 * * * *'")
    now = session.scalar(select(func.clock_timestamp()))
    if scheduled and {"every", "cron"} & text_of.keys():
        # Slots are counted from now on; slots of the earlier schedule that are due stay due.
        camera.scheduled_since = now
    if "expects" in text_of and camera.expected_since is None:
        camera.expected_since = now
    if scheduled and camera.pipeline_id is None:
        pipeline = ensure_pipeline(session, pipeline_spec(settings))
        camera.pipeline_id = pipeline.id
        location = session.get_one(Location, camera.location_id)
        if location.promoted_pipeline_id is None:
            promote(session, location, pipeline)
    session.flush()
    interrupt_poll(session, camera.id)


def _checked_source(session: Session, camera: Camera, settings: Settings, source: str) -> str:
    """The source in the ledger's form. Raises `MaskwatchError` if it can't be listed or overlaps another camera's."""
    store, prefix = open_source(source, settings)
    next(iter(store.list_pages(prefix)), None)
    canonical = f"{store.bucket}/{prefix}"
    others = select(Camera).where(Camera.source.is_not(None), Camera.removed_at.is_(None), Camera.id != camera.id)
    for other in session.scalars(others):
        assert other.source is not None
        if other.source.startswith(canonical) or canonical.startswith(other.source):
            raise MaskwatchError(
                f"the source {canonical} overlaps that of the camera {other.name!r}, {other.source}, and an object "
                "belongs to one camera: give each camera a prefix of its own, ending in a slash"
            )
    return canonical


def switch_camera(session: Session, camera: Camera, action: str) -> None:
    """Enable, disable or remove a camera. Raises `MaskwatchError` where that changes nothing."""
    now = session.scalar(select(func.clock_timestamp()))
    if camera.removed_at is not None:
        raise MaskwatchError(f"camera {camera.name!r} was removed at {camera.removed_at:%Y-%m-%d %H:%M} UTC")
    if (action == "disable") == (camera.disabled_at is not None) and action != "remove":
        raise MaskwatchError(f"camera {camera.name!r} is {action}d already")
    if action == "enable":
        camera.disabled_at = None
    elif action == "disable":
        camera.disabled_at = now
    else:
        camera.removed_at = camera.expected_until = now
    session.flush()
    interrupt_poll(session, camera.id)


def list_cameras(session: Session) -> list[dict[str, Any]]:
    """Every camera, for people and machines."""
    last = (
        select(func.max(CameraSlot.finished_at)).where(CameraSlot.camera_id == Camera.id).correlate(Camera)
    ).scalar_subquery()
    waiting = (
        select(func.count())
        .where(CameraSlot.camera_id == Camera.id, CameraSlot.finished_at.is_(None))
        .correlate(Camera)
        .scalar_subquery()
    )
    query = select(Camera, Location.name, last, waiting).join(Location, Location.id == Camera.location_id)
    return [
        {
            "name": camera.name,
            "location": location,
            "state": _camera_state(camera),
            "source": camera.source,
            "time_pattern": camera.time_pattern,
            "schedule": f"every {camera.every_seconds:g} s" if camera.every_seconds else camera.cron,
            "look_back_seconds": camera.look_back_seconds,
            "sweep_seconds": camera.full_scan_seconds,
            "picture_seconds": camera.image_seconds,
            "expected_seconds": camera.expected_seconds,
            "last_look": last_poll,
            "slots_due": due,
            "problem": camera.problem,
        }
        for camera, location, last_poll, due in session.execute(query.order_by(Location.name, Camera.name)).tuples()
    ]


def _camera_state(camera: Camera) -> str:
    if camera.removed_at is not None:
        return "removed"
    if camera.disabled_at is not None:
        return "disabled"
    return "scheduled" if camera.scheduled_since is not None else "by hand"


def seconds(value: str, what: str) -> float:
    """A duration as people write it (30s, 5m, 2h, 1d), in seconds. Raises `MaskwatchError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.strip())
    if found is None or not (length := float(found[1]) * _UNITS[found[2]]):
        raise MaskwatchError(f"{what} {value!r} is no duration; valid: 30s, 5m, 2h, 1d")
    return length


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def ensure_pipeline(session: Session, spec: PipelineSpec) -> Pipeline:
    """The pipeline row of a spec; equal specs share one row."""
    session.execute(
        insert(Pipeline)
        .values(
            fingerprint=spec.fingerprint,
            detector=spec.detector.name,
            classifier=spec.classifier.name,
            spec=spec.as_dict(),
        )
        .on_conflict_do_nothing()
    )
    return session.scalars(select(Pipeline).where(Pipeline.fingerprint == spec.fingerprint)).one()


def get_pipeline(session: Session, pipeline_id: int) -> Pipeline:
    """Raises `MaskwatchError` if there is no pipeline with this id."""
    pipeline = session.get(Pipeline, pipeline_id)
    if pipeline is None:
        raise MaskwatchError(f"there is no pipeline {pipeline_id}; list them: maskwatch pipelines list")
    return pipeline


def list_pipelines(session: Session) -> list[dict[str, Any]]:
    """Every pipeline, with the names of the locations that show its figures."""
    shown: dict[int | None, list[str]] = {}
    for location in session.scalars(select(Location).order_by(Location.name)):
        shown.setdefault(location.promoted_pipeline_id, []).append(location.name)
    return [
        {"id": row.id, "created_at": row.created_at, "shown_by": shown.get(row.id, []), "spec": row.spec}
        for row in session.scalars(select(Pipeline).order_by(Pipeline.id))
    ]


def hours_by_pipeline(session: Session, location: Location) -> dict[int, int]:
    """How many hours of a location are summarized, by pipeline id."""
    query = (
        select(ComplianceHour.pipeline_id, func.count())
        .where(ComplianceHour.location_id == location.id)
        .group_by(ComplianceHour.pipeline_id)
    )
    return dict(session.execute(query).tuples().all())


def _check_name(what: str, name: str) -> None:
    if not name.strip() or not name.isprintable() or len(name) > 200:
        raise MaskwatchError(f"a {what} needs a name of 1 to 200 printable characters, not {name!r}")


def promote(session: Session, location: Location, pipeline: Pipeline) -> None:
    """Let the views of this location show the figures of this pipeline."""
    location.promoted_pipeline_id = pipeline.id
