"""The ground truth of the sample footage, and how well stored faces agree with it.

`common/sample/footage.py` draws the footage and fills in a `GroundTruth`; this module keeps it as JSON, reads the
faces that the system stored, and compares the two. It draws nothing and needs no image library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.domain import MaskStatus, MaskwatchError, Reason

#: Two boxes show the same face if their intersection over union is at least this; the usual value for face detection.
MATCH_IOU = 0.5
#: The demo's figures are for faces whose longer side has at least this many pixels.
MIN_SIZE_PX = 32.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class TrueFace:
    """A face that was drawn. Box: xyxy pixels of the image or frame, hairline to chin and ear to ear."""

    box: Box
    label: MaskStatus

    @property
    def size_px(self) -> float:
        """The longer side of the box, as `domain.Face.size_px`."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True, slots=True)
class TrueImage:
    """An image, by its key in the bucket, or a frame of a video, by its key and its time in the video.

    `local_time` is naive: the time on the location's wall clock. `faces` are in full view; `ignored` are boxes of faces
    that are partly hidden or cut off: these need not be found, and faces found there are not wrong.
    """

    key: str
    location: str
    camera: str
    local_time: datetime
    observed_at: datetime
    faces: tuple[TrueFace, ...]
    offset_seconds: float = 0.0
    ignored: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class TrueVideo:
    """A video, by its key in the bucket. visits: how many people come and leave in it."""

    key: str
    seconds: float
    frames_per_second: float
    visits: int


@dataclass(frozen=True, slots=True)
class TrueCamera:
    """A camera of the footage, and the options of `maskwatch backfill` for its keys."""

    location: str
    name: str
    time_zone: str
    prefix: str
    time_pattern: str


@dataclass(frozen=True, slots=True)
class BadObject:
    """An object that can't be analysed. reason: the reason its job is quarantined with; None: it gets no job."""

    key: str
    reason: Reason | None
    note: str


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """The ground truth of one set of sample footage. `images` holds the frames of its videos, too."""

    seed: int
    cameras: tuple[TrueCamera, ...]
    images: tuple[TrueImage, ...]
    bad_objects: tuple[BadObject, ...]
    videos: tuple[TrueVideo, ...] = ()

    def save(self, path: Path) -> None:
        """Write the ground truth as JSON; datetimes as ISO 8601."""
        values = {"pictures" if name == "images" else name: value for name, value in asdict(self).items()}
        path.write_text(json.dumps(values, default=datetime.isoformat, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> GroundTruth:
        """Read a file that `save` wrote. Raises `MaskwatchError` if there is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MaskwatchError(f"no ground truth at {path}: `maskwatch demo` makes it, with the footage") from error
        return cls(
            seed=values["seed"],
            cameras=tuple(TrueCamera(**camera) for camera in values["cameras"]),
            images=tuple(_image(image) for image in values["pictures"]),
            bad_objects=tuple(
                BadObject(bad["key"], Reason(bad["reason"]) if bad["reason"] else None, bad["note"])
                for bad in values["bad_objects"]
            ),
            videos=tuple(TrueVideo(**video) for video in values["videos"]),
        )


def _image(values: dict[str, Any]) -> TrueImage:
    faces = tuple(TrueFace(tuple(face["box"]), MaskStatus(face["label"])) for face in values["faces"])
    return TrueImage(
        key=values["key"],
        location=values["location"],
        camera=values["camera"],
        local_time=datetime.fromisoformat(values["local_time"]),
        observed_at=datetime.fromisoformat(values["observed_at"]),
        faces=faces,
        offset_seconds=values["offset_seconds"],
        ignored=tuple(tuple(box) for box in values["ignored"]),
    )


@dataclass(frozen=True, slots=True)
class StoredFace:
    """A face that Maskwatch found, by the key of its image or video. Box: xyxy pixels of the image or frame.

    offset_seconds: when in its video; 0 for an image.
    """

    key: str
    box: Box
    status: MaskStatus
    offset_seconds: float = 0.0


def stored_faces(session: Session, bucket: str) -> list[StoredFace]:
    """The faces of `face_results` whose images and videos lie in `bucket` (for example `s3://footage`)."""
    base = bucket.rstrip("/") + "/"
    rows = session.execute(
        text(
            """
            SELECT uri, offset_seconds, x1, y1, x2, y2, status
            FROM face_results
            WHERE starts_with(uri, :base)
            ORDER BY face_id
            """
        ),
        {"base": base},
    )
    return [
        StoredFace(
            row.uri.removeprefix(base), (row.x1, row.y1, row.x2, row.y2), MaskStatus(row.status), row.offset_seconds
        )
        for row in rows
    ]


def stored_visits(session: Session, bucket: str) -> dict[str, int]:
    """The number of visits (tracks) in each video of `bucket`, by key. A video without faces is left out."""
    base = bucket.rstrip("/") + "/"
    rows = session.execute(
        text(
            """
            SELECT uri, count(DISTINCT (job_id, track_id)) AS visits
            FROM face_results
            WHERE starts_with(uri, :base)
              AND track_id IS NOT NULL
            GROUP BY uri
            ORDER BY uri
            """
        ),
        {"base": base},
    )
    return {row.uri.removeprefix(base): row.visits for row in rows}


@dataclass(slots=True)
class Comparison:
    """How well stored faces agree with the ground truth. Shares are in [0, 1]; None where nothing was counted.

    Found and labelled are counted over true faces of `min_size_px` and more; smaller ones are in
    `small_faces` and `small_found` only. `confusion[label][status]` counts the found ones. `frames` are the frames of
    videos that the ground truth describes. `visits_counted`: how many visits Maskwatch counted; None: not compared.
    """

    min_size_px: float
    images: int
    frames: int = 0
    visits: int = 0
    visits_counted: int | None = None
    faces: int = 0
    found: int = 0
    labelled_right: int = 0
    small_faces: int = 0
    small_found: int = 0
    extra: int = 0
    confusion: dict[str, dict[str, int]] = field(
        default_factory=lambda: {
            label: {status.value: 0 for status in MaskStatus}
            for label in (MaskStatus.WITH_MASK.value, MaskStatus.WITHOUT_MASK.value)
        }
    )

    @property
    def found_share(self) -> float | None:
        return self.found / self.faces if self.faces else None

    @property
    def labelled_right_share(self) -> float | None:
        """The share of found faces with the true label; an uncertain face is not right."""
        return self.labelled_right / self.found if self.found else None

    def as_dict(self) -> dict[str, Any]:
        figures = {"pictures" if name == "images" else name: value for name, value in asdict(self).items()}
        return {**figures, "found_share": self.found_share, "labelled_right_share": self.labelled_right_share}

    def table(self) -> list[tuple[str, str]]:
        """Rows (what, figure) for `console.print_table`."""
        wrong = [
            (f"  {label.replace('_', ' ')}, labelled {status.replace('_', ' ')}", str(count))
            for label, statuses in self.confusion.items()
            for status, count in statuses.items()
            if count and status != label
        ]
        visits = f"{self.visits}" + ("" if self.visits_counted is None else f", counted {self.visits_counted}")
        return [
            ("pictures", str(self.images)),
            ("frames of videos", str(self.frames)),
            (f"faces of {self.min_size_px:g} px and more", str(self.faces)),
            ("found (IoU ≥ 0.5)", _share(self.found, self.faces)),
            ("of those, labelled right", _share(self.labelled_right, self.found)),
            *wrong,
            ("smaller faces found", _share(self.small_found, self.small_faces)),
            ("detections where no face is", str(self.extra)),
            *([("visits in videos", visits)] if self.visits else []),
        ]


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none to find"


def compare_with_ground_truth(
    stored: Iterable[StoredFace],
    ground_truth: GroundTruth,
    min_size_px: float = MIN_SIZE_PX,
    counted_visits: Mapping[str, int] | None = None,
) -> Comparison:
    """Match stored faces to true ones within each image and each frame, and count.

    Pairs are taken greedily, best IoU first, one to one, down to `MATCH_IOU`. Stored faces of images and frames
    that the ground truth doesn't describe count as extra. counted_visits: the result of `stored_visits`.
    """
    found_at: dict[_Moment, list[StoredFace]] = {}
    for one in stored:
        found_at.setdefault(_moment(one), []).append(one)
    videos = {video.key for video in ground_truth.videos}
    frames = sum(image.key in videos for image in ground_truth.images)
    report = Comparison(
        min_size_px,
        images=len(ground_truth.images) - frames,
        frames=frames,
        visits=sum(video.visits for video in ground_truth.videos),
        visits_counted=None if counted_visits is None else sum(counted_visits.get(key, 0) for key in videos),
    )
    for image in ground_truth.images:
        found = found_at.pop(_moment(image), [])
        pairs = dict(match([face.box for face in image.faces], [face.box for face in found]))
        others = [face for index, face in enumerate(found) if index not in pairs.values()]
        report.extra += sum(not any(_mostly_in(face.box, box) for box in image.ignored) for face in others)
        for index, face in enumerate(image.faces):
            _count_face(report, face, found[pairs[index]] if index in pairs else None)
    report.extra += sum(len(faces) for faces in found_at.values())
    return report


#: An image's key, and a time in ms, because the times of one frame in a database and a decoder differ in the last
#: digits.
_Moment = tuple[str, int]


def _moment(shown: StoredFace | TrueImage) -> _Moment:
    return shown.key, round(shown.offset_seconds * 1000)


def _count_face(report: Comparison, true: TrueFace, stored: StoredFace | None) -> None:
    if true.size_px < report.min_size_px:
        report.small_faces += 1
        report.small_found += stored is not None
        return
    report.faces += 1
    if stored is not None:
        report.found += 1
        report.labelled_right += stored.status == true.label
        report.confusion[true.label.value][stored.status.value] += 1


def match(true: Sequence[Box], stored: Sequence[Box]) -> Iterator[tuple[int, int]]:
    """Pairs (index in true, index in stored), greedily, best IoU first, one to one, at `MATCH_IOU` or more."""
    overlaps = sorted(
        ((iou(a, b), i, j) for i, a in enumerate(true) for j, b in enumerate(stored)), key=lambda pair: -pair[0]
    )
    taken_true: set[int] = set()
    taken_stored: set[int] = set()
    for overlap, i, j in overlaps:
        if overlap < MATCH_IOU:
            return
        if i not in taken_true and j not in taken_stored:
            taken_true.add(i)
            taken_stored.add(j)
            yield i, j


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes, in [0, 1]."""
    both = _common_area(a, b)
    if not both:
        return 0.0
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _common_area(a: Box, b: Box) -> float:
    """The area that both boxes cover."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _mostly_in(box: Box, ignored: Box) -> bool:
    """Whether half of the box lies in the ignored one, as COCO judges detections in its ignored regions."""
    return _common_area(box, ignored) >= 0.5 * (box[2] - box[0]) * (box[3] - box[1])
