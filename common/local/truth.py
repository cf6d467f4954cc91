"""What the sample footage is known to show, and how well stored faces agree with it.

`common/local/footage.py` draws the footage and fills in a `Truth`; this module keeps it as JSON, reads the
faces that the system stored, and compares the two. It draws nothing and needs no image library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.domain import MaskStatus, MaskwatchError, Reason

#: Two boxes show the same face from this intersection over union on; the usual value for face detection.
MATCH_IOU = 0.5
#: The demo promises figures for faces whose longer side has at least this many pixels.
MIN_SIZE_PX = 32.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class TrueFace:
    """A face that was drawn. Box: xyxy pixels of the picture, hairline to chin and ear to ear."""

    box: Box
    label: MaskStatus

    @property
    def size_px(self) -> float:
        """The longer side of the box, as `domain.Face.size_px`."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True, slots=True)
class TruePicture:
    """A picture, by its key in the bucket. `local_time` is naive: what the location's wall clock showed."""

    key: str
    location: str
    camera: str
    local_time: datetime
    observed_at: datetime
    faces: tuple[TrueFace, ...]


@dataclass(frozen=True, slots=True)
class TrueCamera:
    """A camera of the footage, and what `maskwatch backfill` has to be told about its keys."""

    location: str
    name: str
    time_zone: str
    prefix: str
    time_pattern: str


@dataclass(frozen=True, slots=True)
class BadObject:
    """An object that is no good picture. `reason` is what its job ends with; None: it never becomes a job."""

    key: str
    reason: Reason | None
    note: str


@dataclass(frozen=True, slots=True)
class Truth:
    """All that is known about one set of sample footage."""

    seed: int
    cameras: tuple[TrueCamera, ...]
    pictures: tuple[TruePicture, ...]
    bad_objects: tuple[BadObject, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON; datetimes as ISO 8601."""
        path.write_text(json.dumps(asdict(self), default=datetime.isoformat, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Read what `save` wrote. Raises `MaskwatchError` where there is no such file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MaskwatchError(f"no truth at {path}: `maskwatch demo` makes the footage and its truth") from error
        return cls(
            seed=values["seed"],
            cameras=tuple(TrueCamera(**camera) for camera in values["cameras"]),
            pictures=tuple(_picture(picture) for picture in values["pictures"]),
            bad_objects=tuple(
                BadObject(bad["key"], Reason(bad["reason"]) if bad["reason"] else None, bad["note"])
                for bad in values["bad_objects"]
            ),
        )


def _picture(values: dict[str, Any]) -> TruePicture:
    faces = tuple(TrueFace(tuple(face["box"]), MaskStatus(face["label"])) for face in values["faces"])
    return TruePicture(
        key=values["key"],
        location=values["location"],
        camera=values["camera"],
        local_time=datetime.fromisoformat(values["local_time"]),
        observed_at=datetime.fromisoformat(values["observed_at"]),
        faces=faces,
    )


@dataclass(frozen=True, slots=True)
class StoredFace:
    """A face the system found, by the key of its picture. Box: xyxy pixels of the picture."""

    key: str
    box: Box
    status: MaskStatus


def stored_faces(session: Session, bucket: str) -> list[StoredFace]:
    """The faces of `face_results` whose pictures lie in `bucket` (for example `s3://footage`)."""
    base = bucket.rstrip("/") + "/"
    rows = session.execute(
        text("SELECT uri, x1, y1, x2, y2, status FROM face_results WHERE starts_with(uri, :base) ORDER BY face_id"),
        {"base": base},
    )
    return [
        StoredFace(row.uri.removeprefix(base), (row.x1, row.y1, row.x2, row.y2), MaskStatus(row.status)) for row in rows
    ]


@dataclass(slots=True)
class TruthReport:
    """How stored faces agree with the truth. Shares are in [0, 1], None where there is nothing to share.

    Found and labelled are counted over true faces of `min_size_px` and more; smaller ones are in
    `small_faces` and `small_found` only. `confusion[label][status]` counts the found ones.
    """

    min_size_px: float
    pictures: int
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
        """Of the found faces, those with the true label; an uncertain one is not right."""
        return self.labelled_right / self.found if self.found else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "found_share": self.found_share, "labelled_right_share": self.labelled_right_share}

    def table(self) -> list[tuple[str, str]]:
        """Rows (what, figure) for `console.print_table`."""
        wrong = [
            (f"  {label.replace('_', ' ')}, labelled {status.replace('_', ' ')}", str(count))
            for label, statuses in self.confusion.items()
            for status, count in statuses.items()
            if count and status != label
        ]
        return [
            ("pictures", str(self.pictures)),
            (f"faces of {self.min_size_px:g} px and more", str(self.faces)),
            ("found (IoU ≥ 0.5)", _share(self.found, self.faces)),
            ("of those, labelled right", _share(self.labelled_right, self.found)),
            *wrong,
            ("smaller faces found", _share(self.small_found, self.small_faces)),
            ("detections where no face is", str(self.extra)),
        ]


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "none to find"


def compare_with_truth(stored: Iterable[StoredFace], truth: Truth, min_size_px: float = MIN_SIZE_PX) -> TruthReport:
    """Match stored faces to true ones within each picture and count.

    Pairs are taken greedily, best IoU first, one to one, down to `MATCH_IOU`. Stored faces of pictures
    that the truth does not know count as extra.
    """
    by_key: dict[str, list[StoredFace]] = {}
    for one in stored:
        by_key.setdefault(one.key, []).append(one)
    report = TruthReport(min_size_px, pictures=len(truth.pictures))
    for picture in truth.pictures:
        found = by_key.pop(picture.key, [])
        pairs = dict(match([face.box for face in picture.faces], [face.box for face in found]))
        report.extra += len(found) - len(pairs)
        for index, face in enumerate(picture.faces):
            _count(report, face, found[pairs[index]] if index in pairs else None)
    report.extra += sum(len(faces) for faces in by_key.values())
    return report


def _count(report: TruthReport, true: TrueFace, stored: StoredFace | None) -> None:
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
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
