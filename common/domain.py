"""The terms of Maskwatch: enums, value types and errors, with the standard library only.

Every other module may import this one; it imports no other module of Maskwatch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Any
from uuid import UUID


class MediaKind(StrEnum):
    """What an object in a bucket holds."""

    IMAGE = "image"
    VIDEO = "video"


class JobKind(StrEnum):
    """One unit of work on a media object."""

    IMAGE = "image"
    PROBE = "probe"
    CHUNK = "chunk"


class JobState(StrEnum):
    """Where a job stands; `common/ledger/states.py` lists every move."""

    PENDING = "pending"
    QUEUED = "queued"
    RUNNING = "running"
    RETRY_WAIT = "retry_wait"
    SUCCEEDED = "succeeded"
    QUARANTINED = "quarantined"
    SOURCE_CHANGED = "source_changed"
    CANCELLED = "cancelled"


#: States in which a job has not ended.
ACTIVE_STATES = (JobState.PENDING, JobState.QUEUED, JobState.RUNNING, JobState.RETRY_WAIT)


class AttemptOutcome(StrEnum):
    """How one attempt at a job ended, for `job_attempts`."""

    SUCCEEDED = "succeeded"
    RETRIED = "retried"
    QUARANTINED = "quarantined"
    SOURCE_CHANGED = "source_changed"
    CRASHED = "crashed"
    LEASE_EXPIRED = "lease_expired"
    RELEASED = "released"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class JobRef:
    """A job's id and the token that its holder last saw: all that a message carries."""

    id: int
    token: UUID


class Lane(IntEnum):
    """Dispatch order: live footage goes before backfills."""

    LIVE = 0
    BACKFILL = 1


class MaskStatus(StrEnum):
    """What a face was classified as. A mask worn wrongly is `without_mask`."""

    WITH_MASK = "with_mask"
    WITHOUT_MASK = "without_mask"
    UNCERTAIN = "uncertain"


class SampleMode(StrEnum):
    """Which frame of each cell of the sampling grid is analysed."""

    #: The first frame shown in the cell.
    FRAMES = "frames"
    #: The first keyframe in the cell, if it has one; only keyframes are decoded.
    KEYFRAMES = "keyframes"


class ObservedAtSource(StrEnum):
    """The source of the time when an image was taken or a recording began, best first."""

    KEY_PATTERN = "key_pattern"
    #: Only images.
    EXIF = "exif"
    #: Only videos: the creation time in the container.
    CREATION_TIME = "creation_time"
    #: Of a video, minus its duration.
    LAST_MODIFIED = "last_modified"


class Reason(StrEnum):
    """Why a job did not simply succeed. Stored in the ledger beside a sentence for people."""

    EMPTY_FILE = "empty_file"
    UNREADABLE_IMAGE = "unreadable_image"
    TRUNCATED_IMAGE = "truncated_image"
    IMAGE_TOO_LARGE = "image_too_large"
    UNREADABLE_VIDEO = "unreadable_video"
    NO_VIDEO_STREAM = "no_video_stream"
    EMPTY_VIDEO = "empty_video"
    TRUNCATED_VIDEO = "truncated_video"
    DAMAGED_VIDEO = "damaged_video"
    VIDEO_TOO_LONG = "video_too_long"
    FRAME_TOO_LARGE = "frame_too_large"
    UNSUPPORTED_CODEC = "unsupported_codec"
    BROKEN_TIMESTAMPS = "broken_timestamps"
    TIME_LIMIT = "time_limit"
    OBJECT_TOO_LARGE = "object_too_large"
    OBJECT_GONE = "object_gone"
    ACCESS_DENIED = "access_denied"
    BUCKET_MISSING = "bucket_missing"
    SOURCE_CHANGED = "source_changed"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    TIME_PATTERN_MISMATCH = "time_pattern_mismatch"
    NONEXISTENT_LOCAL_TIME = "nonexistent_local_time"
    FUTURE_TIME = "future_time"
    #: Neither its key nor the file nor its upload says when it was taken.
    NO_TIME = "no_time"
    MODEL_MISMATCH = "model_mismatch"
    UNEXPECTED_ERROR = "unexpected_error"
    CRASHED = "crashed"
    LEASE_EXPIRED = "lease_expired"
    SUPERSEDED = "superseded"
    CANCELLED_BY_OPERATOR = "cancelled_by_operator"
    CANCELLED_WITH_BACKFILL = "cancelled_with_backfill"
    PURGED = "purged"
    ARCHIVED = "archived"
    MODEL_OUT_OF_MEMORY = "model_out_of_memory"


#: Reasons that concern the source rather than one object, if every object of the source meets them.
REFUSALS = (Reason.ACCESS_DENIED, Reason.BUCKET_MISSING, Reason.STORAGE_UNAVAILABLE)


class MaskwatchError(Exception):
    """Something a person has to put right. The message names what was wrong and what to do.

    The command line prints it as one line and exits with `exit_code`.
    """

    exit_code = 1


#: An error's text is cut to this many characters in a message.
LINE_LIMIT = 500


def first_line(error: BaseException) -> str:
    """A library's error as part of a message: the first line of its text, or its type's name if it has no text.

    For an `OSError`: the system's text, without number and path. For an error of SQLAlchemy: the server's text,
    without the statement and its parameters, which may hold secrets.
    """
    said = getattr(error, "orig", None) or error
    lines = str(getattr(said, "strerror", None) or said).strip().splitlines()
    return lines[0].strip()[:LINE_LIMIT] if lines else type(said).__name__


class PermanentJobError(Exception):
    """The job can't succeed unless a person changes something: it is quarantined with this reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class ArchivedError(PermanentJobError):
    """The object lies in an archive, and must be restored before it can be read."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.ARCHIVED, detail)


class TransientJobError(Exception):
    """The job may succeed later: it is retried with backoff, in the ledger."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class SourceChangedError(Exception):
    """The object is no longer the one that was planned (its ETag differs)."""


@dataclass(frozen=True, slots=True)
class PausePolicy:
    """When the circuit breaker pauses a source, and the wait before a trial: `seconds` before the first, twice as long
    before each further one, at most `cap_seconds`."""

    after_refusals: int
    seconds: float
    cap_seconds: float


@dataclass(frozen=True, slots=True)
class TimeRange:
    """A half-open range of instants, [start, end); None: no limit on that side. Aware datetimes only."""

    start: datetime | None = None
    end: datetime | None = None

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and value.tzinfo is None:
                raise ValueError(f"{name} {value.isoformat()} has no time zone; valid: an aware datetime")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(f"end {self.end.isoformat()} is not after start {self.start.isoformat()}")

    def __contains__(self, instant: datetime) -> bool:
        return (self.start is None or instant >= self.start) and (self.end is None or instant < self.end)


class UnknownSpecError(MaskwatchError):
    """A pipeline's spec holds something that this version does not know: only a newer version can do its jobs."""

    def __init__(self, unknown: Sequence[str]) -> None:
        super().__init__(f"this version doesn't know {', '.join(unknown)} in the pipeline's spec: install a newer one")
        self.unknown = tuple(unknown)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model file, pinned: its name in `common/models/manifest.py` and the SHA-256 of its bytes."""

    name: str
    sha256: str


#: The newest `PipelineSpec.revision` that this version implements.
NEWEST_REVISION = 1

#: How videos are sampled if a spec doesn't say so, as in specs from before there were videos.
DEFAULT_SAMPLING = {"sample": SampleMode.FRAMES, "sample_fps": 1.0}


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """The pinned models and settings that turn images and videos into faces.

    Two images analysed under equal specs are comparable; figures never mix two specs.
    Sizes are pixels of the original image, probabilities are in [0, 1].
    """

    detector: ModelRef
    classifier: ModelRef
    #: Detections below this score are dropped.
    detector_threshold: float
    #: Images whose longer side is below this are enlarged before detection, at most `enlarge_limit` times.
    enlarge_below_px: int
    enlarge_limit: float
    #: Images whose longer side is above this are scaled down before detection.
    shrink_above_px: int
    #: Boxes with a side below this grow around their centre by `widen_factor` before classification.
    widen_below_px: int
    widen_factor: float
    #: A face whose larger probability is below this is `uncertain`.
    uncertain_below: float
    #: Raised when a change of the code (not of a setting or a weight) changes what is found.
    revision: int = 1
    #: For videos: which frame is taken from each cell of a grid of `sample_fps` cells per second of the file's time.
    sample: SampleMode = SampleMode.FRAMES
    sample_fps: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        # The default sampling is left out, so that the fingerprints of pipelines from before there were videos stay.
        return {name: value for name, value in asdict(self).items() if DEFAULT_SAMPLING.get(name) != value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PipelineSpec:
        """The spec that `as_dict` wrote, also an earlier version's. Raises `UnknownSpecError` for a newer one's."""
        if unknown := _unknown_in(values):
            raise UnknownSpecError(unknown)
        values = dict(values)
        return cls(
            detector=ModelRef(**values.pop("detector")),
            classifier=ModelRef(**values.pop("classifier")),
            sample=SampleMode(values.pop("sample", SampleMode.FRAMES)),
            **values,
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the spec: the identity of a pipeline."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _unknown_in(spec: dict[str, Any]) -> list[str]:
    """What this version does not know in a stored spec, sorted: names of fields, and values of known fields."""
    unknown = spec.keys() - PipelineSpec.__dataclass_fields__.keys()
    for model in ("detector", "classifier"):
        unknown |= {f"{model}.{name}" for name in spec[model].keys() - ModelRef.__dataclass_fields__.keys()}
    if (sample := spec.get("sample", SampleMode.FRAMES)) not in list(SampleMode):
        unknown.add(f"sample {sample}")
    if (revision := spec.get("revision", 1)) > NEWEST_REVISION:
        unknown.add(f"revision {revision}")
    return sorted(unknown)


@dataclass(frozen=True, slots=True)
class ObservedAt:
    """When a camera saw something: an aware instant, and the source of that time.

    `ambiguous` is set when a local time occurred twice (clocks set back) and the first was taken.
    """

    instant: datetime
    source: ObservedAtSource
    ambiguous: bool = False


@dataclass(frozen=True, slots=True)
class Face:
    """One face in one frame. Box: xyxy pixels of the original frame, inside it. Probabilities sum to 1."""

    x1: float
    y1: float
    x2: float
    y2: float
    p_face: float
    p_with_mask: float
    p_without_mask: float
    status: MaskStatus

    @property
    def size_px(self) -> float:
        """The longer side of the box, in pixels: the face size wherever figures are given by face size."""
        return max(self.x2 - self.x1, self.y2 - self.y1)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The contents of a video's header. Sizes in pixels of the stored frames, before `rotation` turns them upright."""

    #: FFmpeg's names, e.g. `mp4` and `h264`.
    container: str
    codec: str
    width: int
    height: int
    #: Frames per second on average; None where the header doesn't tell.
    frame_rate: float | None
    #: Degrees counter-clockwise that a player turns the frames: 0, 90, 180 or 270.
    rotation: int
    #: Of the video stream, else the best estimate; None where the header doesn't tell.
    duration_seconds: float | None
    #: When the recording began, by the container's own account; aware.
    created_at: datetime | None


@dataclass(frozen=True, slots=True)
class FrameFaces:
    """An analysed frame of a video, with no face or more. `track_ids` (1, 2, ...) are the faces' tracks within the job.

    offset_seconds: when it is shown, from the start of the file. covers_seconds: how much of the video it stands for.
    """

    offset_seconds: float
    covers_seconds: float
    faces: tuple[Face, ...]
    track_ids: tuple[int, ...]


#: The storage classes whose objects must be restored before they can be read ("Understanding and managing Amazon S3
#: storage classes", S3 User Guide). Glacier Instant Retrieval is none of them.
ARCHIVES = frozenset({"GLACIER", "DEEP_ARCHIVE"})


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One version of one object as listed; bucket + "/" + key is its URI."""

    bucket: str
    key: str
    etag: str
    size_bytes: int
    last_modified: datetime
    #: The name of the storage class in S3; None for the standard class and for files.
    storage_class: str | None = None
    #: For an archived object: whether a restored copy can be read for now.
    restored: bool = False

    @property
    def uri(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def archived(self) -> bool:
        """Whether it has to be restored before it can be read."""
        return self.storage_class in ARCHIVES and not self.restored
