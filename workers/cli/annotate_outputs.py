"""Writes the output of `maskwatch annotate` and reports it: a folder of images, a video, a frame or a stored face.

Needs no database, except for a stored face.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from common.cli.parts.console import bar, note, print_json
from common.cli.parts.deployment import deployment, has_aws_configuration, uses_embedded_stack
from common.database.sessions import session_scope
from common.domain import (
    Face,
    MaskStatus,
    MaskwatchError,
    ObjectInfo,
    PermanentJobError,
    SourceChangedError,
    TransientJobError,
)
from common.settings import Settings, get_settings
from common.storage.opening import open_source
from common.storage.store import ObjectStore
from workers.annotation.images import (
    Annotated,
    Found,
    annotate_images,
    configured_analyzer,
    drawn,
    find_images,
    image_name,
    look_up,
    one_video,
    read_again,
    read_frame,
    write_whole,
)
from workers.annotation.video import annotate_video, clock
from workers.cli.annotate_request import Asked


def write(asked: Asked, *, as_json: bool) -> None:
    """Write what is asked for, and print what was written."""
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


# --- images ---


def _folder(asked: Asked, source: str, settings: Settings, *, as_json: bool) -> None:
    store, prefix = open_source(source, settings)
    found = find_images(store, prefix, asked.out, asked.limit)
    if not found.images:
        raise MaskwatchError(_nothing_found(source, found))
    results = _annotate_all(store, found.images, asked, settings)
    if found.video is not None:
        note(f"videos were skipped; annotate each by itself: {_how_to_annotate(found.video)}")

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
        return f"{source} holds videos and no pictures; annotate each by itself: {_how_to_annotate(found.video)}"
    return f"no pictures in {source} ({found.others} other objects); expected JPEG, PNG, WebP, BMP or TIFF"


def _how_to_annotate(video: ObjectInfo) -> str:
    name = image_name(video).rpartition("-")[0]
    return f"maskwatch annotate {shlex.quote(video.uri)} --out {name}-annotated.mp4"


def _annotate_all(store: ObjectStore, images: list[ObjectInfo], asked: Asked, settings: Settings) -> list[Annotated]:
    analyzer = configured_analyzer(settings)
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"can't make the folder {asked.out}: {error.strerror}") from error
    results = []
    with bar("annotating", len(images)) as shown:
        for result in annotate_images(store, images, analyzer, asked.out, settings, blur=asked.blur):
            if result.error is not None:
                note(result.error if result.source in result.error else f"{result.source}: {result.error}")
            results.append(result)
            shown.advance()
    return results


# --- videos ---


def _video(asked: Asked, source: str, settings: Settings) -> tuple[dict[str, Any], str]:
    """Write a video; returns the report for machines and the sentence for people."""
    info = one_video(source, asked.out, settings)
    analyzer = configured_analyzer(settings)
    with _told(info.uri), bar("annotating, seconds") as shown:
        done = annotate_video(
            info, asked.out, analyzer, settings, sample_fps=asked.sample_fps, blur=asked.blur,
            begins=lambda seconds: shown.show(0, None if seconds is None else round(seconds)),
            reached=lambda seconds: shown.show(round(seconds)),
        )  # fmt: skip
    if done.cut_off_at is not None:
        note(f"{info.uri} is cut off: it was decoded and written up to {clock(done.cut_off_at)}")
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
    """Write the frame of a video that is shown at a time; returns as `_video`."""
    info = one_video(source, asked.out, settings)
    with _told(info.uri):
        image, shown_at = read_frame(info, at, None, settings)
    faces = configured_analyzer(settings).analyze(image)
    write_whole(asked.out, drawn(image, faces, blur=asked.blur))
    result = {
        "source": info.uri,
        "picture": str(asked.out),
        "offset_seconds": shown_at,
        "faces": [asdict(face) for face in faces],
    }
    return result, f"{asked.out}: the frame at {clock(shown_at)}, {len(faces)} faces ({_counts(faces)})"


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Turn a job's errors into a `MaskwatchError`: one sentence that names the footage."""
    try:
        yield
    except (PermanentJobError, TransientJobError, SourceChangedError) as error:
        text = str(error)
        raise MaskwatchError(text if uri in text else f"{uri}: {text}") from error


# --- a stored face ---


def _stored_face(asked: Asked, face_id: int) -> tuple[dict[str, Any], str]:
    """Write the picture or frame of a stored face; returns as `_video`."""
    with deployment() as settings:
        with session_scope() as session:
            stored = look_up(session, face_id)
        try:
            image = read_again(stored, settings)
        except SourceChangedError as error:
            raise MaskwatchError(
                f"the footage has changed since face {face_id} was found ({error}): backfill it again, and name a "
                "face of the new rows"
            ) from error
        except (PermanentJobError, TransientJobError) as error:
            raise MaskwatchError(f"face {face_id} can't be shown: {error}") from error
    index = stored.ids.index(face_id)
    write_whole(asked.out, drawn(image, stored.faces, blur=asked.blur, emphasised=index))
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


# --- words ---


def _settings_for(source: str) -> AbstractContextManager[Settings]:
    """The settings for reading a source. Only s3:// without any AWS configuration needs the embedded stack."""
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
        f"{len(results) - written} failed, {others} other objects skipped"
    )
