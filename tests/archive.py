"""Rows for the read side, put in by hand: what the producer, the workers and the aggregator would have left."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar
from zoneinfo import ZoneInfo

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database.tables import Camera, ComplianceHour, FaceRow, FrameCount, Job, Location, MediaObject, Pipeline
from common.domain import JobKind, JobState, Lane, MaskStatus, MediaKind, ObservedAtSource
from common.ledger import circuit_breaker
from common.ledger.states import FINAL_STATES

Statuses = tuple[int, int, int]
Row = TypeVar("Row")


@dataclass
class Archive:
    """Adds pictures and keeps its own book, for tests to compare with."""

    session: Session
    locations: dict[str, Location] = field(default_factory=dict)
    #: (location, picture's instant, faces by status) of everything the promoted pipeline has seen.
    seen: list[tuple[str, datetime, Statuses]] = field(default_factory=list)

    def pipeline(self, name: str = "compact") -> Pipeline:
        return self._add(
            Pipeline(fingerprint=f"fingerprint of {name}", detector="centerface", classifier=name, spec={})
        )

    def location(self, name: str, time_zone: str, pipeline: Pipeline | None) -> Location:
        promoted = pipeline.id if pipeline else None
        self.locations[name] = self._add(Location(name=name, time_zone=time_zone, promoted_pipeline_id=promoted))
        return self.locations[name]

    def camera(self, location: Location, name: str) -> Camera:
        return self._add(Camera(location_id=location.id, name=name))

    def media(self, location: Location, key: str, camera: Camera | None = None) -> MediaObject:
        return self._add(
            MediaObject(
                bucket="s3://footage", key=key, revision="1", etag="1", size_bytes=1, kind=MediaKind.IMAGE,
                last_modified=datetime.fromisoformat("2026-04-01T00:00:00+00:00"), location_id=location.id,
                camera_id=camera.id if camera else None, observed_at_source=ObservedAtSource.KEY_PATTERN,
            )
        )  # fmt: skip

    def job(self, media: MediaObject, pipeline: Pipeline, state: JobState, **values: object) -> Job:
        return self._add(
            Job(
                media_object_id=media.id,
                source_id=circuit_breaker.ensure(self.session, media.bucket),
                pipeline_id=pipeline.id,
                kind=JobKind.IMAGE,
                lane=Lane.BACKFILL,
                state=state,
                finished_at=self.session.scalar(text("SELECT now()")) if state in FINAL_STATES else None,
                **values,
            )
        )

    def image(
        self,
        location: Location,
        instant: datetime,
        faces: Statuses,
        *,
        pipeline: Pipeline,
        camera: Camera | None = None,
    ) -> Job:
        """An analysed picture with so many faces (with mask, without, uncertain)."""
        media = self.media(location, f"{location.name}/{instant.timestamp():.0f}-{pipeline.id}.jpg", camera)
        job = self.job(media, pipeline, JobState.SUCCEEDED)
        place = {"location_id": location.id, "pipeline_id": pipeline.id, "camera_id": media.camera_id}
        hour = hour_of(instant, location.time_zone)
        self._add(FrameCount(job_id=job.id, hour=hour, frames=1, seconds=0, **place))
        probabilities = {"with_mask": 0.9, "without_mask": 0.1, "uncertain": 0.55}
        self.session.add_all(
            FaceRow(
                observed_at=instant, job_id=job.id, media_object_id=media.id, x1=10, y1=20, x2=50, y2=70, size_px=50,
                p_face=0.8, p_with_mask=probabilities[status], p_without_mask=1 - probabilities[status],
                status=status, **place,
            )
            for status, count in zip(MaskStatus, faces, strict=True)
            for _ in range(count)
        )  # fmt: skip
        self.session.flush()
        if pipeline.id == location.promoted_pipeline_id:
            self.seen.append((location.name, instant, faces))
        return job

    def summarize(self) -> None:
        """Write `compliance_hourly` for the promoted pipelines, computed here and not in the database."""
        frames: Counter[tuple[str, datetime]] = Counter()
        sums: dict[tuple[str, datetime], Counter[str]] = {}
        for name, instant, faces in self.seen:
            key = (name, hour_of(instant, self.locations[name].time_zone))
            frames[key] += 1
            counts = sums.setdefault(key, Counter())
            counts.update(dict(zip(("with_mask", "without_mask", "uncertain"), faces, strict=True)))
        for (name, hour), count in frames.items():
            location, by_status = self.locations[name], sums[name, hour]
            self._add(
                ComplianceHour(
                    location_id=location.id, pipeline_id=location.promoted_pipeline_id, hour=hour, frames=count,
                    seconds=0, faces=by_status.total(), with_mask=by_status["with_mask"],
                    without_mask=by_status["without_mask"], uncertain=by_status["uncertain"],
                )
            )  # fmt: skip

    def _add(self, row: Row) -> Row:
        self.session.add(row)
        self.session.flush()
        return row


def hour_of(instant: datetime, time_zone: str) -> datetime:
    """The local hour's first instant, as Python's zoneinfo sees it: zones' offsets are whole minutes here."""
    local = instant.astimezone(ZoneInfo(time_zone))
    return local.replace(minute=0, second=0, microsecond=0).astimezone(ZoneInfo("UTC"))
