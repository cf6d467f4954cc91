"""The tables, as SQLAlchemy 2 mapped classes. docs/schema.md explains them to analysts; migrations/ makes them.

Constraint names follow one convention, so that migrations can name what they change. Enums are text with a
CHECK: readable in psql, and a new value needs no type change.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import Enum
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    SmallInteger,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSONB, REAL
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from common.domain import AttemptOutcome, JobKind, JobState, MaskStatus, MediaKind, ObservedAtSource


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {datetime: DateTime(timezone=True), str: Text, dict[str, Any]: JSONB}


def _enum(kind: type[Enum], name: str) -> EnumType:
    return EnumType(
        kind,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=32,
        values_callable=lambda members: [member.value for member in members],
    )


def _created_at() -> Mapped[datetime]:
    return mapped_column(server_default=func.clock_timestamp())


class OldestVersion(Base):
    """The oldest version of a part of Maskwatch that may work on this schema (`common/database/versions.py`)."""

    __tablename__ = "oldest_versions"
    __table_args__ = (CheckConstraint(r"version ~ '^\d+\.\d+\.\d+$'", name="version"),)

    part: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str]


class Location(Base):
    """A place compliance is reported for. Its time zone decides what an hour and a day are."""

    __tablename__ = "locations"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    time_zone: Mapped[str]
    #: The pipeline whose figures the views show.
    promoted_pipeline_id: Mapped[int | None] = mapped_column(ForeignKey("pipelines.id"))
    created_at: Mapped[datetime] = _created_at()


class Camera(Base):
    """A camera of a location. With a source and a schedule it is polled for footage (`common/catalog/schedule.py`)."""

    __tablename__ = "cameras"
    __table_args__ = (
        UniqueConstraint("location_id", "name"),
        CheckConstraint("every_seconds IS NULL OR cron IS NULL", name="schedule"),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("locations.id"))
    name: Mapped[str]
    created_at: Mapped[datetime] = _created_at()
    source: Mapped[str | None]
    time_pattern: Mapped[str | None]
    #: The pipeline that analyses its footage.
    pipeline_id: Mapped[int | None] = mapped_column(ForeignKey("pipelines.id"))
    every_seconds: Mapped[float | None] = mapped_column(DOUBLE_PRECISION)
    #: A cron expression in the location's time zone.
    cron: Mapped[str | None]
    #: How late footage may come and still be found by the next poll; later footage is found by a full scan.
    look_back_seconds: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default=text("7200"))
    #: How often a poll is a full scan, which lists everything.
    full_scan_seconds: Mapped[float] = mapped_column("sweep_seconds", DOUBLE_PRECISION, server_default=text("86400"))
    #: The instant that slots are counted from.
    scheduled_since: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    removed_at: Mapped[datetime | None]
    #: The token and the lease of the process that polls the camera now.
    poll_token: Mapped[uuid.UUID | None] = mapped_column("look_token")
    poll_until: Mapped[datetime | None] = mapped_column("look_until")
    #: When the current poll began, and how far it is.
    poll_began: Mapped[datetime | None] = mapped_column("look_began")
    poll_cursor: Mapped[str | None] = mapped_column("look_cursor")
    poll_is_full_scan: Mapped[bool | None] = mapped_column("look_is_sweep")
    #: When the last full scan began.
    fully_scanned_at: Mapped[datetime | None] = mapped_column("swept_at")
    #: Why the last poll failed.
    problem: Mapped[str | None]
    #: How much of an hour an image stands for, in coverage.
    image_seconds: Mapped[float | None] = mapped_column("picture_seconds", DOUBLE_PRECISION)
    #: Footage per hour that the camera should deliver, from when, until when; NULL: not known.
    expected_seconds: Mapped[float | None] = mapped_column(DOUBLE_PRECISION)
    expected_since: Mapped[datetime | None]
    expected_until: Mapped[datetime | None]


class CameraSlot(Base):
    """A time at which a camera is to be polled. The key keeps it unique, however many schedulers note it."""

    __tablename__ = "camera_slots"
    __table_args__ = (
        PrimaryKeyConstraint("camera_id", "slot"),
        Index("ix_camera_slots_open", "camera_id", "slot", postgresql_where=text("finished_at IS NULL")),
    )

    camera_id: Mapped[int] = mapped_column(ForeignKey("cameras.id"))
    slot: Mapped[datetime]
    #: How many polls ended it: one.
    polls: Mapped[int] = mapped_column("looks", server_default=text("0"))
    finished_at: Mapped[datetime | None]


class Pipeline(Base):
    """Pinned models and settings (`domain.PipelineSpec`); the fingerprint is the SHA-256 of `spec`."""

    __tablename__ = "pipelines"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(unique=True)
    detector: Mapped[str]
    classifier: Mapped[str]
    spec: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _created_at()


class Backfill(Base):
    """One call of `maskwatch backfill`: its options, and the counts of what it found."""

    __tablename__ = "backfills"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    source: Mapped[str]
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"))
    #: URI of the manifest that was read in place of a listing.
    inventory: Mapped[str | None]
    location_id: Mapped[int] = mapped_column(ForeignKey("locations.id"))
    camera_id: Mapped[int | None] = mapped_column(ForeignKey("cameras.id"))
    pipeline_id: Mapped[int] = mapped_column(ForeignKey("pipelines.id"))
    since: Mapped[datetime | None]
    until: Mapped[datetime | None]
    time_pattern: Mapped[str | None]
    #: Numbers of objects by outcome (`producer/submit.py` names them); empty until the listing has ended.
    counts: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    started_at: Mapped[datetime] = _created_at()
    #: While this is set, the listing stands still and no job of the backfill is sent.
    paused_at: Mapped[datetime | None]
    cancelled_at: Mapped[datetime | None]
    #: When the listing ended. Jobs of the backfill may still be active.
    finished_at: Mapped[datetime | None]


class BackfillPart(Base):
    """A part of a backfill's listing, read by one thread at a time: a range of keys, or one file of a manifest."""

    __tablename__ = "backfill_parts"
    __table_args__ = (PrimaryKeyConstraint("backfill_id", "number"),)

    backfill_id: Mapped[int] = mapped_column(ForeignKey("backfills.id"))
    number: Mapped[int]
    #: The part holds the keys after this one, up to and including `ends_with` (NULL: to the end).
    begins_after: Mapped[str] = mapped_column(server_default=text("''"))
    ends_with: Mapped[str | None]
    manifest_file: Mapped[str | None]
    #: The last registered key, or the number of registered lines: the listing continues behind it.
    cursor: Mapped[str | None]
    #: As in `Backfill`, for this part.
    counts: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    finished_at: Mapped[datetime | None]


class Source(Base):
    """Where footage lies: a bucket, or `file://`. The circuit breaker (`common/ledger/circuit_breaker.py`) pauses a
    source that refuses everything."""

    __tablename__ = "sources"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    bucket: Mapped[str] = mapped_column(unique=True)
    #: Refusals in a row, and when the first of them began; 0 and NULL once the source has answered again.
    refusals: Mapped[int] = mapped_column(server_default=text("0"))
    refusing_since: Mapped[datetime | None]
    #: While this is set, the source is paused: only a single job is sent, at `next_trial_at`.
    paused_at: Mapped[datetime | None]
    next_trial_at: Mapped[datetime | None]
    trials: Mapped[int] = mapped_column(server_default=text("0"))
    reason: Mapped[str | None]
    detail: Mapped[str | None]
    created_at: Mapped[datetime] = _created_at()


class MediaObject(Base):
    """One version of one object: (bucket, key, revision); the revision is the version id or the ETag."""

    __tablename__ = "media_objects"
    __table_args__ = (
        UniqueConstraint("bucket", "key", "revision"),
        # A key counts once: only one of its versions is current.
        Index(
            "uq_media_objects_current",
            "bucket",
            "key",
            unique=True,
            postgresql_where=text("superseded_at IS NULL"),
        ),
        Index(None, "location_id"),
        # Finds a camera's footage of some time, and its newest footage.
        Index("ix_media_objects_camera_id", "camera_id", "observed_at"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    #: `s3://name`, or `file://` for local folders; bucket || '/' || key is the URI.
    bucket: Mapped[str]
    key: Mapped[str]
    revision: Mapped[str]
    etag: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    last_modified: Mapped[datetime]
    #: As S3 named it when the object was last listed; NULL for the standard class, and for files.
    storage_class: Mapped[str | None]
    #: When S3 was last asked to restore an archived object.
    restore_requested_at: Mapped[datetime | None]
    kind: Mapped[MediaKind] = mapped_column(_enum(MediaKind, "kind"))
    location_id: Mapped[int] = mapped_column(ForeignKey("locations.id"))
    camera_id: Mapped[int | None] = mapped_column(ForeignKey("cameras.id"))
    #: Of a video, the start of the recording. Known at planning from the key's pattern, otherwise filled in by the
    #: worker (EXIF, creation time, LastModified).
    observed_at: Mapped[datetime | None]
    observed_at_source: Mapped[ObservedAtSource | None] = mapped_column(_enum(ObservedAtSource, "observed_at_source"))
    observed_at_ambiguous: Mapped[bool] = mapped_column(server_default=text("false"))
    #: Of a video, known once it was probed (`domain.VideoInfo`).
    container: Mapped[str | None]
    codec: Mapped[str | None]
    width: Mapped[int | None]
    height: Mapped[int | None]
    frame_rate: Mapped[float | None] = mapped_column(DOUBLE_PRECISION)
    rotation: Mapped[int | None] = mapped_column(SmallInteger)
    duration_seconds: Mapped[float | None] = mapped_column(DOUBLE_PRECISION)
    superseded_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = _created_at()


#: A feed: jobs that are dispatched in the order of their ids, and paused together.
_FEED = ("source_id", text("coalesce(backfill_id, 0)"), "lane", "id")


class Job(Base):
    """One unit of work on a media object. Only `common/ledger/` changes rows here."""

    __tablename__ = "jobs"
    __table_args__ = (
        # A media object is planned once per pipeline and range.
        UniqueConstraint("media_object_id", "pipeline_id", "kind", "range_start_ms", "range_end_ms"),
        CheckConstraint("range_start_ms >= 0 AND range_end_ms >= range_start_ms", name="range"),
        CheckConstraint(
            "state <> 'running' OR (lease_until IS NOT NULL AND worker IS NOT NULL)",
            name="running",
        ),
        CheckConstraint(
            "state NOT IN ('succeeded', 'quarantined', 'source_changed', 'cancelled') OR finished_at IS NOT NULL",
            name="finished",
        ),
        Index("ix_jobs_pending", *_FEED, postgresql_where=text("state = 'pending' AND NOT alone")),
        Index("ix_jobs_pending_alone", *_FEED, postgresql_where=text("state = 'pending' AND alone")),
        Index("ix_jobs_retry_wait", "next_run_at", postgresql_where=text("state = 'retry_wait'")),
        Index("ix_jobs_queued", "queued_at", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_running", "lease_until", postgresql_where=text("state = 'running'")),
        Index("ix_jobs_quarantined", "id", postgresql_where=text("state = 'quarantined'")),
        Index("ix_jobs_quarantined_source", "source_id", "finished_at", postgresql_where=text("state = 'quarantined'")),
        Index("ix_jobs_backfill_id", "backfill_id", "state"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    media_object_id: Mapped[int] = mapped_column(ForeignKey("media_objects.id"))
    #: The source of the media object's bucket; stored here, too, so that dispatch can skip a paused source.
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"))
    pipeline_id: Mapped[int] = mapped_column(ForeignKey("pipelines.id"))
    backfill_id: Mapped[int | None] = mapped_column(ForeignKey("backfills.id"))
    kind: Mapped[JobKind] = mapped_column(_enum(JobKind, "kind"))
    #: Half-open range of the file's own time; 0 and 0 for an image and a probe. The last chunk of a video reaches to
    #: the end of the file, whatever the header says.
    range_start_ms: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    range_end_ms: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    lane: Mapped[int] = mapped_column(SmallInteger)
    state: Mapped[JobState] = mapped_column(_enum(JobState, "state"), server_default=JobState.PENDING.value)
    #: The fence: changes with every transition; a writer that holds an older token is refused.
    token: Mapped[uuid.UUID] = mapped_column(server_default=func.gen_random_uuid())
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    failures: Mapped[int] = mapped_column(server_default=text("0"))
    crashes: Mapped[int] = mapped_column(server_default=text("0"))
    lost_leases: Mapped[int] = mapped_column(server_default=text("0"))
    #: Isolated: sent in a message of its own, because a process died or a lease ran out while it ran.
    isolated: Mapped[bool] = mapped_column("alone", server_default=text("false"))
    next_run_at: Mapped[datetime | None]
    queued_at: Mapped[datetime | None]
    #: The lane whose list in Redis holds its message. Differs from `lane` for an isolated job, and for a backfill's job
    #: that is sent ahead of live footage.
    sent_lane: Mapped[int | None] = mapped_column(SmallInteger)
    #: The epoch of the Redis that the message was sent to.
    epoch: Mapped[str | None]
    started_at: Mapped[datetime | None]
    lease_until: Mapped[datetime | None]
    worker: Mapped[str | None]
    finished_at: Mapped[datetime | None]
    reason: Mapped[str | None]
    detail: Mapped[str | None]
    created_at: Mapped[datetime] = _created_at()


class JobAttempt(Base):
    """How one attempt at a job ended; written when it ends."""

    __tablename__ = "job_attempts"
    __table_args__ = (Index(None, "job_id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    outcome: Mapped[AttemptOutcome] = mapped_column(_enum(AttemptOutcome, "outcome"))
    worker: Mapped[str | None]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    reason: Mapped[str | None]
    detail: Mapped[str | None]


class OperatorAction(Base):
    """What a person did to jobs or footage, and when. Append-only."""

    __tablename__ = "operator_actions"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    action: Mapped[str]
    #: The operator's name on the command line, and the name of the database role.
    by: Mapped[str]
    database_user: Mapped[str] = mapped_column(server_default=text("SESSION_USER"))
    detail: Mapped[str | None]
    at: Mapped[datetime] = _created_at()


class OperatorActionJob(Base):
    """A job that an action changed."""

    __tablename__ = "operator_action_jobs"
    __table_args__ = (PrimaryKeyConstraint("job_id", "action_id"),)

    action_id: Mapped[int] = mapped_column(ForeignKey("operator_actions.id"))
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))


class Purge(Base):
    """Faces seen before an instant were removed: see `workers/summaries/purging.py`. The latest `before` holds."""

    __tablename__ = "purges"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    before: Mapped[datetime]
    action_id: Mapped[int] = mapped_column(ForeignKey("operator_actions.id"))
    #: From this time on, the summaries of purged hours are final.
    frozen_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class ErasedObject(Base):
    """An object that must not be registered again. Only the SHA-256 of its URI is kept, because a name is data, too."""

    __tablename__ = "erased_objects"

    uri_sha256: Mapped[bytes] = mapped_column(primary_key=True)
    action_id: Mapped[int] = mapped_column(ForeignKey("operator_actions.id"))


class FrameCount(Base):
    """What was analysed, with or without faces: frames and seconds of one job in one hour of its location.

    Deliberately not unique per job and hour: only the fence prevents duplicates, and the tests show that it does.
    """

    __tablename__ = "frame_counts"
    __table_args__ = (
        Index(None, "job_id"),
        Index(None, "location_id", "pipeline_id", "hour"),
        Index("ix_frame_counts_camera_id", "camera_id", "hour", postgresql_where=text("camera_id IS NOT NULL")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    hour: Mapped[datetime]
    location_id: Mapped[int] = mapped_column(ForeignKey("locations.id"))
    camera_id: Mapped[int | None] = mapped_column(ForeignKey("cameras.id"))
    pipeline_id: Mapped[int] = mapped_column(ForeignKey("pipelines.id"))
    frames: Mapped[int]
    seconds: Mapped[float] = mapped_column(DOUBLE_PRECISION)


faces_id_seq = Sequence("faces_id_seq", metadata=Base.metadata, data_type=BigInteger)


class FaceRow(Base):
    """One face in one frame. Partitioned by month of `observed_at`; rows exist only for succeeded jobs.

    No foreign keys: they would cost a look-up for every row of a COPY, and the transaction that writes a job's faces
    has locked that job.
    """

    __tablename__ = "faces"
    __table_args__ = (
        PrimaryKeyConstraint("id", "observed_at"),
        Index(None, "location_id", "pipeline_id", "observed_at"),
        Index(None, "job_id"),
        {"postgresql_partition_by": "RANGE (observed_at)"},
    )

    id: Mapped[int] = mapped_column(BigInteger, faces_id_seq, server_default=faces_id_seq.next_value())
    observed_at: Mapped[datetime]
    job_id: Mapped[int] = mapped_column(BigInteger)
    media_object_id: Mapped[int] = mapped_column(BigInteger)
    location_id: Mapped[int]
    camera_id: Mapped[int | None]
    pipeline_id: Mapped[int]
    x1: Mapped[float] = mapped_column(REAL)
    y1: Mapped[float] = mapped_column(REAL)
    x2: Mapped[float] = mapped_column(REAL)
    y2: Mapped[float] = mapped_column(REAL)
    #: The longer side of the box, pixels of the original frame.
    size_px: Mapped[float] = mapped_column(REAL)
    p_face: Mapped[float] = mapped_column(REAL)
    p_with_mask: Mapped[float] = mapped_column(REAL)
    p_without_mask: Mapped[float] = mapped_column(REAL)
    status: Mapped[MaskStatus] = mapped_column(_enum(MaskStatus, "status"))
    #: When the frame is shown, from the start of its video; 0 for an image.
    offset_seconds: Mapped[float] = mapped_column(DOUBLE_PRECISION, server_default=text("0"))
    #: Faces of one job with the same number are taken for the same person; NULL for an image.
    track_id: Mapped[int | None]


class FailingStep(Base):
    """A step of a producer's tick that failed when it was last tried."""

    __tablename__ = "failing_steps"
    __table_args__ = (PrimaryKeyConstraint("tick", "step"),)

    tick: Mapped[str]
    step: Mapped[str]
    detail: Mapped[str]
    since: Mapped[datetime] = _created_at()
    last_at: Mapped[datetime] = _created_at()
    times: Mapped[int] = mapped_column(BigInteger, server_default=text("1"))


class DirtyMark(Base):
    """This hour of this location and pipeline must be summarized again. Append-only: see DESIGN, Summaries."""

    __tablename__ = "dirty_marks"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("locations.id"))
    pipeline_id: Mapped[int] = mapped_column(ForeignKey("pipelines.id"))
    hour: Mapped[datetime]
    created_at: Mapped[datetime] = _created_at()


class ComplianceHour(Base):
    """The summary of one hour: always equal to a full recompute from `faces` and `frame_counts`."""

    __tablename__ = "compliance_hourly"
    __table_args__ = (
        PrimaryKeyConstraint("location_id", "pipeline_id", "hour"),
        CheckConstraint("faces = with_mask + without_mask + uncertain", name="sum"),
    )

    location_id: Mapped[int] = mapped_column(ForeignKey("locations.id"))
    pipeline_id: Mapped[int] = mapped_column(ForeignKey("pipelines.id"))
    hour: Mapped[datetime]
    frames: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float] = mapped_column(DOUBLE_PRECISION)
    faces: Mapped[int] = mapped_column(BigInteger)
    with_mask: Mapped[int] = mapped_column(BigInteger)
    without_mask: Mapped[int] = mapped_column(BigInteger)
    uncertain: Mapped[int] = mapped_column(BigInteger)
    summarized_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
