"""The `annotate` command: pictures and videos in, the same with their faces drawn out. Needs no database, but for a
stored face. `workers/annotate_video.py` reads and writes the videos."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.cli.console import json_option, note, print_json, progress
from common.cli.options import runtime_options
from common.domain import (
    Face,
    MaskStatus,
    MaskwatchError,
    MediaKind,
    PermanentJobError,
    Reason,
    SampleMode,
    SourceChangedError,
    TransientJobError,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from common.settings import Settings
    from common.storage import ObjectInfo, ObjectStore
    from workers.pipeline import PictureAnalyzer

JPEG_QUALITY = 92
#: Seconds: more than a float rounds off, less than there is between two frames.
_ROUNDING = Fraction(1, 100_000)


@dataclass(frozen=True, slots=True)
class Annotated:
    """What became of one picture: `picture` is the file that was written, or `error` says why there is none."""

    source: str
    picture: Path | None
    faces: list[Face]
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"source": self.source, "error": self.error}
        faces = [asdict(face) for face in self.faces]
        return {"source": self.source, "picture": str(self.picture), "faces": faces}


#: What `faces.id` can be.
FACE_ID = click.IntRange(1, 2**63 - 1)


class _Time(click.ParamType[Fraction]):
    """A time in a video, exact: HH:MM:SS, MM:SS or seconds, each with decimals."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        if isinstance(value, Fraction):
            return value
        parts = re.fullmatch(r"(?:(?:(\d{1,4}):)?(\d{1,2}):)?(\d{1,7}(?:\.\d{1,9})?)", str(value), re.ASCII)
        if parts is None:
            self.fail(f"{value!r} is no time in a video; expected 00:01:30.5, 01:30.5 or 90.5", param, ctx)
        hours, minutes, seconds = (Fraction(part or 0) for part in parts.groups())
        return 3600 * hours + 60 * minutes + seconds


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command was asked for, checked: the options fit each other and `out`."""

    source: str | None
    out: Path
    at: Fraction | None = None
    face_id: int | None = None
    blur: bool = False
    sample_fps: float | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raises `MaskwatchError`, in words, for options that don't fit."""
        if self.face_id is not None and self.source is not None:
            raise MaskwatchError(
                "--face looks up the footage by itself: leave out SOURCE, or --face to have SOURCE analysed"
            )
        if self.face_id is None and self.source is None:
            raise MaskwatchError("name a SOURCE: a picture, a video, a folder or an s3:// prefix; or --face ID")
        if self.at is not None and self.face_id is not None:
            raise MaskwatchError("--face knows its time by itself: leave out --at")
        if self.one_picture and self.suffix != ".png":
            raise MaskwatchError(f"--at and --face write one picture: name it, --out NAME.png instead of {self.out}")
        if self.suffix == ".png" and not self.one_picture:
            raise MaskwatchError(
                f"--out {self.out} takes one frame of a video (--at 00:01:30) or a stored face (--face ID); for "
                "pictures, name a folder"
            )
        if self.suffix not in ("", ".png", ".mp4"):
            raise MaskwatchError(
                f"--out {self.out} can't be written; name a folder for pictures, NAME.mp4 for a video, or NAME.png "
                "for one frame of it"
            )
        if self.sample_fps is not None and self.suffix != ".mp4":
            raise MaskwatchError("--sample-fps is for a video that is written as a video, with --out NAME.mp4")
        if self.sample_fps is not None and self.blur:
            raise MaskwatchError(
                "with --blur every frame is analysed, because faces would slip through between: leave out --sample-fps"
            )
        if self.limit is not None and self.suffix:
            raise MaskwatchError("--limit counts pictures, which go to a folder: leave it out")

    @property
    def one_picture(self) -> bool:
        return self.at is not None or self.face_id is not None

    @property
    def suffix(self) -> str:
        """What `out` ends in, if that makes it a picture or a video; "" for a folder, whatever its name."""
        from common.planning import IMAGE_SUFFIXES, VIDEO_SUFFIXES

        suffix = self.out.suffix.lower()
        known = suffix.removeprefix(".") in IMAGE_SUFFIXES | VIDEO_SUFFIXES
        return suffix if known and not self.out.is_dir() else ""


@click.command()
@click.argument("source", required=False)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder for annotated pictures; NAME.mp4 for a video; NAME.png for one frame or face.",
)
@click.option("--at", type=_Time(), help="One frame of a video: what is shown at 00:01:30.5 (or 01:30.5, or 90.5).")
@click.option("--face", "face_id", type=FACE_ID, help="A stored face by its face_id, in its picture or frame.")
@click.option("--blur", is_flag=True, help="Make the faces that are found unrecognisable.")
@click.option(
    "--sample-fps",
    type=click.FloatRange(0, 240, min_open=True),
    help="Analyse so many frames per second of a video, and show their boxes until the next one (default: all frames).",
)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many pictures.")
@runtime_options
@json_option
def annotate(as_json: bool, **options: Any) -> None:
    """Draw the faces of pictures or a video: green with mask, red without, amber uncertain.

    SOURCE is a picture, a video, a folder or an s3:// prefix; --out decides what is made of it. Nothing is stored but
    what --out names. A video is written as H.264, each frame at its own time, with its sound.

    With --face, the footage is looked up in the database, and the faces that are stored of it are drawn, not analysed
    again.

    --blur hides what the detector finds: look at the result before you pass it on. Voices stay.

    \b
    Examples:
      maskwatch annotate s3://footage/2026/05/ --out annotated --limit 20     # pictures
      maskwatch annotate gate.mp4 --out gate-annotated.mp4                    # a video
      maskwatch annotate gate.mp4 --out gate-anonymous.mp4 --blur
      maskwatch annotate long.mp4 --out quick.mp4 --sample-fps 2              # fewer frames analysed
      maskwatch annotate gate.mp4 --at 00:01:30 --out at.png                  # one frame of it
      maskwatch annotate --face 4711 --out face.png                           # face_id, from face_results
    """
    asked = Asked(**options)
    if asked.face_id is not None:
        result, sentence = _stored_face(asked, asked.face_id)
    else:
        assert asked.source is not None, "checked by Asked"
        with _settings_for(asked.source) as settings:
            if asked.suffix == ".mp4":
                result, sentence = _video(asked, asked.source, settings)
            elif asked.at is not None:
                result, sentence = _frame(asked, asked.source, asked.at, settings)
            else:
                _folder(asked, asked.source, settings, as_json=as_json)
                return
    if as_json:
        print_json(result)
    else:
        click.echo(sentence)


# --- pictures ---


def _folder(asked: Asked, source: str, settings: Settings, *, as_json: bool) -> None:
    from common.storage import open_source

    store, prefix = open_source(source, settings)
    found = find_pictures(store, prefix, asked.out, asked.limit)
    if not found.pictures:
        raise MaskwatchError(_nothing_found(source, found))
    results = _annotate_all(store, found.pictures, asked, settings)
    if found.video is not None:
        note(f"videos were passed over; annotate each by itself: {_how_to_annotate(found.video)}")

    failed = [result for result in results if result.error is not None]
    if as_json:
        done = [result for result in results if result.error is None]
        print_json(
            {
                "annotated": [result.as_dict() for result in done],
                "failed": [result.as_dict() for result in failed],
                "other_objects": found.others,
            }
        )
    else:
        click.echo(_sentence(results, found.others, asked.out))
    if len(failed) == len(results):
        raise MaskwatchError(f"none of the {len(results)} pictures could be annotated; the lines above say why")


def _nothing_found(source: str, found: Found) -> str:
    if found.video is not None and found.others == 1:
        return f"{found.video.uri} is a video: {_how_to_annotate(found.video)}"
    if found.video is not None:
        return f"no pictures in {source}, but videos; annotate each by itself: {_how_to_annotate(found.video)}"
    return f"no pictures in {source} ({found.others} other objects); expected JPEG, PNG, WebP, BMP or TIFF"


def _how_to_annotate(video: ObjectInfo) -> str:
    name = picture_name(video).rpartition("-")[0]
    return f"maskwatch annotate {shlex.quote(video.uri)} --out {name}-annotated.mp4"


@dataclass(frozen=True, slots=True)
class Found:
    """What lies below a prefix: pictures; how many other objects were passed on the way; a video, if any was."""

    pictures: list[ObjectInfo]
    others: int
    video: ObjectInfo | None


def find_pictures(store: ObjectStore, prefix: str, out_dir: Path, limit: int | None) -> Found:
    """The pictures below a prefix, at most `limit`.

    What lies in `out_dir` are our own pictures of an earlier run: neither. An object that is named itself
    is taken whatever its name, unless it is a video's.
    """
    from common.planning import media_kind
    from common.storage import FILE_BUCKET

    own = f"{str(out_dir.absolute()).removeprefix('/')}/" if store.bucket == FILE_BUCKET else None
    pictures: list[ObjectInfo] = []
    others, video = 0, None
    for page in store.list_pages(prefix):
        for info in page:
            if own is not None and info.key.startswith(own):
                continue
            kind = media_kind(info.key)
            if kind is MediaKind.IMAGE or (kind is None and info.key == prefix):
                pictures.append(info)
                if len(pictures) == limit:
                    return Found(pictures, others, video)
                continue
            others += 1
            if kind is MediaKind.VIDEO and video is None:
                video = info
    return Found(pictures, others, video)


def annotate_pictures(
    store: ObjectStore, pictures: list[ObjectInfo], analyzer: PictureAnalyzer, asked: Asked, settings: Settings
) -> Iterator[Annotated]:
    """Analyse, draw and write each picture; one that can't be read gives an error, and the rest goes on.

    Raises `MaskwatchError` if the folder can't be written to.
    """
    from workers.decoding import decode_image

    for info in pictures:
        try:
            data = store.read(info.key, info.etag, settings.storage.max_object_bytes)
            image = decode_image(data, max_pixels=settings.worker.max_image_pixels).rgb
            faces = analyzer.analyze(image)
        except (PermanentJobError, TransientJobError, SourceChangedError) as error:
            yield Annotated(info.uri, None, [], str(error))
            continue
        path = asked.out / picture_name(info)
        _write(path, _drawn(image, faces, blur=asked.blur), "JPEG", quality=JPEG_QUALITY)
        yield Annotated(info.uri, path, faces)


def _drawn(image_rgb: Any, faces: list[Face], *, blur: bool, emphasised: int | None = None) -> Any:
    """A picture (uint8 RGB) with its faces drawn, enlarged if the labels need it."""
    from workers.drawing import blur_faces, draw_faces, enlarge_for_labels

    if blur:
        image_rgb = blur_faces(image_rgb, faces)
    return draw_faces(*enlarge_for_labels(image_rgb, faces), emphasised=emphasised)


def _write(path: Path, image_rgb: Any, kind: str, **options: Any) -> None:
    from PIL import Image

    try:
        Image.fromarray(image_rgb).save(path, kind, **options)
    except OSError as error:
        raise MaskwatchError(f"can't write {path}: {error.strerror or error}") from error


def picture_name(info: ObjectInfo) -> str:
    """A file name for the annotated picture of an object: the same every time, another for every object.

    Keys are data and may hold anything. So of the last part only letters, digits, `_` and `-` remain, and a
    hash of the whole URI tells equal ones apart.
    """
    last = info.key.rstrip("/").rpartition("/")[2]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", last.rpartition(".")[0] or last)[:80].strip("_-")
    digest = hashlib.sha256(info.uri.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{stem or 'picture'}-{digest}.jpg"


def _annotate_all(store: ObjectStore, pictures: list[ObjectInfo], asked: Asked, settings: Settings) -> list[Annotated]:
    analyzer = _analyzer(settings)
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"can't make the folder {asked.out}: {error.strerror}") from error
    results = []
    with progress() as bar:
        task = bar.add_task("annotating", total=len(pictures))
        for result in annotate_pictures(store, pictures, analyzer, asked, settings):
            if result.error is not None:
                note(result.error if result.source in result.error else f"{result.source}: {result.error}")
            results.append(result)
            bar.advance(task)
    return results


def _analyzer(settings: Settings) -> PictureAnalyzer:
    from workers.inference import runtime_of
    from workers.pipeline import load_analyzer

    try:
        return load_analyzer(settings.pipeline.spec(), runtime_of(settings, processes=1))
    except PermanentJobError as error:
        raise MaskwatchError(error.detail) from error


# --- videos ---


def _video(asked: Asked, source: str, settings: Settings) -> tuple[dict[str, Any], str]:
    """Write a video; returns what to say of it, to machines and to people."""
    from workers.annotate_video import annotate_video, clock

    info = _one_video(asked, source, settings)
    analyzer = _analyzer(settings)
    with _told(info.uri), progress() as bar:
        task = bar.add_task("annotating, seconds", total=None)
        done = annotate_video(
            info, asked.out, analyzer, settings, sample_fps=asked.sample_fps, blur=asked.blur,
            begins=lambda seconds: bar.update(task, total=None if seconds is None else round(seconds)),
            reached=lambda seconds: bar.update(task, completed=round(seconds)),
        )  # fmt: skip
    if done.cut_off_at is not None:
        note(f"{info.uri} is cut off: it can be decoded up to {clock(done.cut_off_at)}, and until there it was written")
    if done.sound_left_out:
        codecs = ", ".join(done.sound_left_out)
        note(f"the sound ({codecs}) was left out: players expect AAC, MP3, AC-3, Opus, FLAC or ALAC in an MP4")
    result = {
        "source": info.uri,
        "video": str(asked.out),
        "frames": done.frames,
        "frames_analysed": done.analysed,
        "seconds": done.seconds,
        "faces": {status.value: done.faces[status] for status in MaskStatus},
        "sound": done.sound,
        "sound_left_out": done.sound_left_out,
        "cut_off_at_seconds": done.cut_off_at,
    }
    counts = ", ".join(f"{done.faces[status]} {status.value}" for status in MaskStatus)
    return result, (
        f"{asked.out}: {done.frames} frames, {clock(done.seconds)}; "
        f"in the {done.analysed} that were analysed, a face was found {done.faces.total()} times ({counts})"
    )


def _frame(asked: Asked, source: str, at: Fraction, settings: Settings) -> tuple[dict[str, Any], str]:
    """Write the frame of a video that is shown at a time; returns what to say of it."""
    from workers.annotate_video import clock

    info = _one_video(asked, source, settings)
    with _told(info.uri):
        image, shown_at = _read_frame(info, at, None, settings)
    faces = _analyzer(settings).analyze(image)
    _write_whole(asked.out, _drawn(image, faces, blur=asked.blur))
    result = {
        "source": info.uri,
        "picture": str(asked.out),
        "offset_seconds": shown_at,
        "faces": [asdict(face) for face in faces],
    }
    return result, f"{asked.out}: the frame at {clock(shown_at)}, {len(faces)} faces ({_counts(faces)})"


def _read_frame(info: ObjectInfo, at: Fraction, mode: SampleMode | None, settings: Settings) -> tuple[Any, float]:
    """The picture (uint8 RGB) that a video shows at a time, and since when; with a mode, of the frames it looks at."""
    from workers.annotate_video import frame_at
    from workers.frames import to_picture
    from workers.videos import opened

    with opened(info, settings) as video:
        seconds = video.info().duration_seconds
        length = Fraction(seconds) if seconds is not None and mode is None else None
        sample = frame_at(video, at, length, info.uri, mode or SampleMode.FRAMES)
        return to_picture(sample.frame), float(sample.at)


def _one_video(asked: Asked, source: str, settings: Settings) -> ObjectInfo:
    """The one video that a source is, and not the file that is about to be written."""
    from common.planning import media_kind
    from common.storage import FILE_BUCKET, open_source

    store, prefix = open_source(source, settings)
    found = list(islice((info for page in store.list_pages(prefix) for info in page), 2))
    if not found:
        raise MaskwatchError(f"there is nothing at {source}; name a video")
    info = found[0]
    # Keys come in their order: the one that is named itself is the first.
    if len(found) > 1 and info.key != prefix:
        raise MaskwatchError(f"{source} holds several objects, and {asked.out} takes one video: name it")
    if media_kind(info.key) is MediaKind.IMAGE:
        raise MaskwatchError(
            f"{info.uri} is a picture, and {asked.out} takes a video; for pictures, --out names a folder"
        )
    if info.bucket == FILE_BUCKET and asked.out.exists() and asked.out.samefile(Path("/", info.key)):
        raise MaskwatchError(f"{asked.out} is the video itself, which would be lost; name another --out")
    return info


def _write_whole(out: Path, image_rgb: Any) -> None:
    """Write a PNG that appears under its name when it is complete."""
    from workers.annotate_video import replacing

    with replacing(out) as part:
        _write(part, image_rgb, "PNG")


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Errors of a job, for a person who waits: one sentence that names the footage."""
    try:
        yield
    except (PermanentJobError, TransientJobError, SourceChangedError) as error:
        text = str(error)
        raise MaskwatchError(text if uri in text else f"{uri}: {text}") from error


# --- a stored face ---


@dataclass(frozen=True, slots=True)
class _Stored:
    """The stored faces of one picture or frame. mode: of a video, which frames were looked at; None: a picture."""

    info: ObjectInfo
    mode: SampleMode | None
    offset_seconds: float
    ids: list[int]
    faces: list[Face]


def _stored_face(asked: Asked, face_id: int) -> tuple[dict[str, Any], str]:
    """Write the picture or frame of a stored face; returns what to say of it."""
    from common.database import session_scope
    from common.deployment import deployment
    from workers.annotate_video import clock

    with deployment() as settings:
        with session_scope() as session:
            stored = _look_up(session, face_id)
        try:
            image = _read_again(stored, settings)
        except SourceChangedError as error:
            raise MaskwatchError(
                f"the footage is no longer what face {face_id} was found in ({error}): backfill it again, and take a "
                "face of the new rows"
            ) from error
        except (PermanentJobError, TransientJobError) as error:
            raise MaskwatchError(f"face {face_id} can't be shown: {error}") from error
    index = stored.ids.index(face_id)
    _write_whole(asked.out, _drawn(image, stored.faces, blur=asked.blur, emphasised=index))
    result = {
        "source": stored.info.uri,
        "picture": str(asked.out),
        "face_id": face_id,
        "offset_seconds": stored.offset_seconds,
        "faces": [{"face_id": each, **asdict(face)} for each, face in zip(stored.ids, stored.faces, strict=True)],
    }
    where = stored.info.uri if stored.mode is None else f"{stored.info.uri} at {clock(stored.offset_seconds)}"
    others = len(stored.faces) - 1
    return result, f"{asked.out}: face {face_id}, {stored.faces[index].status.value}, and {others} others of {where}"


def _look_up(session: Session, face_id: int) -> _Stored:
    from sqlalchemy import select

    from common.domain import PipelineSpec
    from common.storage import ObjectInfo
    from common.tables import FaceRow, MediaObject, Pipeline

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
    return _Stored(
        ObjectInfo(media.bucket, media.key, media.etag, media.size_bytes, media.last_modified),
        spec.sample if media.kind is MediaKind.VIDEO else None,
        row.offset_seconds,
        [each.id for each in together],
        [
            Face(f.x1, f.y1, f.x2, f.y2, f.p_face, f.p_with_mask, f.p_without_mask, MaskStatus(f.status))
            for f in together
        ],
    )


def _read_again(stored: _Stored, settings: Settings) -> Any:
    """The picture or frame, uint8 RGB, as it was analysed. Errors of jobs, where it isn't the same any more."""
    from common.storage import open_bucket
    from workers.decoding import decode_image

    info = stored.info
    if stored.mode is None:
        data = open_bucket(info.bucket).read(info.key, info.etag, settings.storage.max_object_bytes)
        return decode_image(data, max_pixels=settings.worker.max_image_pixels).rgb
    # The stored offset is the exact one, rounded to a float: the frame is the last until just behind it.
    image, shown_at = _read_frame(info, Fraction(stored.offset_seconds) + _ROUNDING, stored.mode, settings)
    if abs(shown_at - stored.offset_seconds) > _ROUNDING:
        raise PermanentJobError(
            Reason.TRUNCATED_VIDEO, f"{info.uri} has no frame at {stored.offset_seconds} s any more"
        )
    return image


# --- words ---


def _settings_for(source: str) -> AbstractContextManager[Settings]:
    """The settings to read a source with. Only s3:// without any AWS configuration needs the embedded stack."""
    from common.deployment import deployment, has_aws_configuration, uses_embedded_stack
    from common.settings import get_settings

    settings = get_settings()
    embedded = uses_embedded_stack(settings) and not has_aws_configuration(settings)
    return deployment() if source.startswith("s3://") and embedded else nullcontext(settings)


def _counts(faces: list[Face]) -> str:
    return ", ".join(f"{sum(face.status is status for face in faces)} {status.value}" for status in MaskStatus)


def _sentence(results: list[Annotated], others: int, out_dir: Path) -> str:
    faces = [face for result in results for face in result.faces]
    written = sum(result.error is None for result in results)
    return (
        f"{written} pictures in {out_dir}: {len(faces)} faces ({_counts(faces)}); "
        f"{len(results) - written} failed, {others} other objects passed over"
    )
