"""Images, frames of videos and stored faces, drawn: what `maskwatch annotate` writes. `workers/annotation/video.py`
reads and writes whole videos."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from common.database.tables import FaceRow, MediaObject, Pipeline
from common.domain import (
    Face,
    MaskStatus,
    MaskwatchError,
    MediaKind,
    ObjectInfo,
    PermanentJobError,
    PipelineSpec,
    Reason,
    SampleMode,
    SourceChangedError,
    TransientJobError,
    first_line,
)
from common.models.pipeline import pipeline_spec
from common.planning import media_kind
from common.settings import Settings
from common.storage.opening import open_bucket, open_source
from common.storage.store import FILE_BUCKET, ObjectStore
from workers.analysis.analyzer import ImageAnalyzer
from workers.analysis.load import load_analyzer
from workers.annotation.drawing import blur_faces, draw_faces, enlarge_for_labels
from workers.annotation.video import frame_at, new_file
from workers.inference import runtime_of
from workers.media.frames import to_rgb
from workers.media.images import decode_image
from workers.media.opening import opened

JPEG_QUALITY = 92
#: Seconds: more than a float rounds off, less than there is between two frames.
_ROUNDING = Fraction(1, 100_000)


@dataclass(frozen=True, slots=True)
class Annotated:
    """The result for one image: `shown` is the file that was written, or `error` says why there is none."""

    source: str
    shown: Path | None
    faces: list[Face]
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"source": self.source, "error": self.error}
        faces = [asdict(face) for face in self.faces]
        return {"source": self.source, "picture": str(self.shown), "faces": faces}


@dataclass(frozen=True, slots=True)
class Found:
    """What lies below a prefix: images; how many other objects were skipped; the first video among them, if any."""

    images: list[ObjectInfo]
    others: int
    video: ObjectInfo | None


def find_images(store: ObjectStore, prefix: str, out_dir: Path, limit: int | None) -> Found:
    """The images below a prefix, at most `limit`.

    Objects in `out_dir` are results of an earlier run, and are ignored. If the prefix is the whole key of an object, it
    is taken for an image whatever its name, unless that is a video's.
    """
    own = f"{str(out_dir.absolute()).removeprefix('/')}/" if store.bucket == FILE_BUCKET else None
    images: list[ObjectInfo] = []
    others, video = 0, None
    for page in store.list_pages(prefix):
        for info in page:
            if own is not None and info.key.startswith(own):
                continue
            kind = media_kind(info.key)
            if kind is MediaKind.IMAGE or (kind is None and info.key == prefix):
                images.append(info)
                if len(images) == limit:
                    return Found(images, others, video)
                continue
            others += 1
            if kind is MediaKind.VIDEO and video is None:
                video = info
    return Found(images, others, video)


def annotate_images(
    store: ObjectStore,
    images: list[ObjectInfo],
    analyzer: ImageAnalyzer,
    out_dir: Path,
    settings: Settings,
    *,
    blur: bool,
) -> Iterator[Annotated]:
    """Analyse, draw and write each image; one that can't be read gives an error, and the others go on.

    Raises `MaskwatchError` if the folder can't be written to.
    """
    for info in images:
        try:
            data = store.read(info.key, info.etag, settings.storage.max_object_bytes)
            image = decode_image(data, max_pixels=settings.worker.max_image_pixels).rgb
            faces = analyzer.analyze(image)
        except (PermanentJobError, TransientJobError, SourceChangedError) as error:
            yield Annotated(info.uri, None, [], str(error))
            continue
        path = out_dir / image_name(info)
        _write(path, drawn(image, faces, blur=blur), "JPEG", quality=JPEG_QUALITY)
        yield Annotated(info.uri, path, faces)


def drawn(image_rgb: Any, faces: list[Face], *, blur: bool, emphasised: int | None = None) -> Any:
    """An image (uint8 RGB) with its faces drawn, enlarged if the labels need it."""
    if blur:
        image_rgb = blur_faces(image_rgb, faces)
    return draw_faces(*enlarge_for_labels(image_rgb, faces), emphasised=emphasised)


def _write(path: Path, image_rgb: Any, kind: str, **options: Any) -> None:
    try:
        Image.fromarray(image_rgb).save(path, kind, **options)
    except OSError as error:
        raise MaskwatchError(f"can't write {path}: {first_line(error)}") from error


def image_name(info: ObjectInfo) -> str:
    """A file name for the annotated image of an object: always the same for one object, and unique to it.

    Keys may contain any character, so only letters, digits, `_` and `-` of the last part are kept, and a hash of the
    whole URI makes the name unique.
    """
    last = info.key.rstrip("/").rpartition("/")[2]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", last.rpartition(".")[0] or last)[:80].strip("_-")
    digest = hashlib.sha256(info.uri.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{stem or 'picture'}-{digest}.jpg"


def configured_analyzer(settings: Settings) -> ImageAnalyzer:
    """The models of the configured pipeline, loaded. Raises `MaskwatchError` if one can't be used."""
    try:
        return load_analyzer(pipeline_spec(settings), runtime_of(settings, processes=1))
    except PermanentJobError as error:
        raise MaskwatchError(error.detail) from error


# --- frames of videos ---


def read_frame(info: ObjectInfo, at: Fraction, mode: SampleMode | None, settings: Settings) -> tuple[Any, float]:
    """The frame (uint8 RGB) that a video shows at a time, and since when in seconds; mode: only among the frames that
    this mode samples."""
    with opened(info, settings) as video:
        seconds = video.info().duration_seconds
        length = Fraction(seconds) if seconds is not None and mode is None else None
        sample = frame_at(video, at, length, info.uri, mode or SampleMode.FRAMES)
        return to_rgb(sample.frame), float(sample.at)


def one_video(source: str, out: Path, settings: Settings) -> ObjectInfo:
    """The single video at a source. Raises `MaskwatchError` if there is none or another object, or if it is `out`."""
    store, prefix = open_source(source, settings)
    found = list(islice((info for page in store.list_pages(prefix) for info in page), 2))
    if not found:
        raise MaskwatchError(f"there is nothing at {source}; name a video")
    info = found[0]
    # Keys are listed in order: if the prefix is the whole key of an object, it comes first.
    if len(found) > 1 and info.key != prefix:
        raise MaskwatchError(f"{source} holds several objects, but {out} takes one video: name it")
    if media_kind(info.key) is MediaKind.IMAGE:
        raise MaskwatchError(
            f"{info.uri} is a picture, but {out} takes a video; for pictures, name a folder with --out"
        )
    if info.bucket == FILE_BUCKET and out.exists() and out.samefile(Path("/", info.key)):
        raise MaskwatchError(f"{out} is the source video, which would be overwritten; name another --out")
    return info


def write_whole(out: Path, image_rgb: Any) -> None:
    """Write a PNG that gets its name when it is complete."""
    with new_file(out) as part:
        _write(part, image_rgb, "PNG")


# --- stored faces ---


@dataclass(frozen=True, slots=True)
class StoredFaces:
    """The stored faces of one image or frame. mode: which frames of the video were sampled; None for an image."""

    info: ObjectInfo
    mode: SampleMode | None
    offset_seconds: float
    ids: list[int]
    faces: list[Face]


def look_up(session: Session, face_id: int) -> StoredFaces:
    """A stored face and the others of its image or frame. Raises `MaskwatchError` for an unknown id."""
    row = session.scalars(select(FaceRow).where(FaceRow.id == face_id)).first()
    if row is None:
        raise MaskwatchError(f"there is no face {face_id}; take a face_id from the view face_results")
    together = session.scalars(
        select(FaceRow)
        .where(
            FaceRow.job_id == row.job_id,
            FaceRow.offset_seconds == row.offset_seconds,
            FaceRow.observed_at == row.observed_at,
        )
        .order_by(FaceRow.id)
    ).all()
    media = session.get_one(MediaObject, row.media_object_id)
    spec = PipelineSpec.from_dict(session.get_one(Pipeline, row.pipeline_id).spec)
    return StoredFaces(
        ObjectInfo(media.bucket, media.key, media.etag, media.size_bytes, media.last_modified),
        spec.sample if media.kind is MediaKind.VIDEO else None,
        row.offset_seconds,
        [each.id for each in together],
        [
            Face(f.x1, f.y1, f.x2, f.y2, f.p_face, f.p_with_mask, f.p_without_mask, MaskStatus(f.status))
            for f in together
        ],
    )


def read_again(stored: StoredFaces, settings: Settings) -> Any:
    """The image or frame, uint8 RGB, as it was analysed. Raises a job's errors if the footage has changed."""
    info = stored.info
    if stored.mode is None:
        data = open_bucket(info.bucket).read(info.key, info.etag, settings.storage.max_object_bytes)
        return decode_image(data, max_pixels=settings.worker.max_image_pixels).rgb
    # The stored offset is the exact one rounded to a float, so search up to a little after it.
    image, shown_at = read_frame(info, Fraction(stored.offset_seconds) + _ROUNDING, stored.mode, settings)
    if abs(shown_at - stored.offset_seconds) > _ROUNDING:
        raise PermanentJobError(
            Reason.TRUNCATED_VIDEO, f"{info.uri} has no frame at {stored.offset_seconds} s any more"
        )
    return image
