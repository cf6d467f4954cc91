"""Locations, cameras and pipelines: what footage belongs to and what analyses it."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from common.domain import MaskwatchError, PipelineSpec
from common.planning import zone
from common.tables import Camera, Location, Pipeline


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


def _check_name(what: str, name: str) -> None:
    if not name.strip() or not name.isprintable() or len(name) > 200:
        raise MaskwatchError(f"a {what} needs a name of 1 to 200 printable characters, not {name!r}")


def promote(session: Session, location: Location, pipeline: Pipeline) -> None:
    """Let the views of this location show this pipeline."""
    location.promoted_pipeline_id = pipeline.id
