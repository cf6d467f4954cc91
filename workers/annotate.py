"""The `annotate` command: pictures in, the same pictures with their faces drawn out. Needs no database."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console import json_option, note, print_json, progress
from common.domain import (
    Face,
    MaskStatus,
    MaskwatchError,
    MediaKind,
    PermanentJobError,
    SourceChangedError,
    TransientJobError,
)
from common.options import runtime_options

if TYPE_CHECKING:
    from common.settings import Settings
    from common.storage import ObjectInfo, ObjectStore
    from workers.pipeline import PictureAnalyzer

JPEG_QUALITY = 92


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


@click.command()
@click.argument("source")
@click.option(
    "--out", "out_dir", required=True, type=click.Path(path_type=Path), help="Folder for the annotated pictures."
)
@click.option("--limit", type=click.IntRange(min=1), help="Stop after this many pictures.")
@runtime_options
@json_option
def annotate(source: str, out_dir: Path, limit: int | None, as_json: bool) -> None:
    """Draw the faces of pictures: green with mask, red without, amber uncertain.

    SOURCE is a picture, a folder or an s3:// prefix. Nothing is stored but the pictures in the folder given.

    \b
    Example:
      maskwatch annotate s3://footage/2026/05/ --out annotated --limit 20
    """
    with _settings_for(source) as settings:
        from common.storage import open_source

        store, prefix = open_source(source, settings)
        pictures, others = find_pictures(store, prefix, out_dir, limit)
        if not pictures:
            raise MaskwatchError(
                f"no pictures in {source} ({others} other objects); expected JPEG, PNG, WebP, BMP or TIFF"
            )
        results = _annotate_all(store, pictures, out_dir, settings)

    failed = [result for result in results if result.error is not None]
    if as_json:
        done = [result for result in results if result.error is None]
        print_json(
            {
                "annotated": [result.as_dict() for result in done],
                "failed": [result.as_dict() for result in failed],
                "other_objects": others,
            }
        )
    else:
        click.echo(_sentence(results, others, out_dir))
    if len(failed) == len(results):
        raise MaskwatchError(f"none of the {len(results)} pictures could be annotated; the lines above say why")


def find_pictures(store: ObjectStore, prefix: str, out_dir: Path, limit: int | None) -> tuple[list[ObjectInfo], int]:
    """The pictures below a prefix, at most `limit`, and how many other objects were passed on the way.

    What lies in `out_dir` are our own pictures of an earlier run: neither. An object that is named itself
    is taken whatever its name.
    """
    from common.planning import media_kind
    from common.storage import FILE_BUCKET

    own = f"{str(out_dir.absolute()).removeprefix('/')}/" if store.bucket == FILE_BUCKET else None
    pictures: list[ObjectInfo] = []
    others = 0
    for page in store.list_pages(prefix):
        for info in page:
            if own is not None and info.key.startswith(own):
                continue
            if info.key != prefix and media_kind(info.key) is not MediaKind.IMAGE:
                others += 1
                continue
            pictures.append(info)
            if len(pictures) == limit:
                return pictures, others
    return pictures, others


def annotate_pictures(
    store: ObjectStore, pictures: list[ObjectInfo], analyzer: PictureAnalyzer, out_dir: Path, settings: Settings
) -> Iterator[Annotated]:
    """Analyse, draw and write each picture; one that can't be read gives an error, and the rest goes on.

    Raises `MaskwatchError` if `out_dir` can't be written to.
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
        path = out_dir / picture_name(info)
        write_annotated(path, image, faces)
        yield Annotated(info.uri, path, faces)


def write_annotated(path: Path, image_rgb: Any, faces: list[Face]) -> None:
    """Write a picture (uint8 RGB) with its faces drawn, as JPEG, enlarged if the labels need it."""
    from PIL import Image

    from workers.drawing import draw_faces, enlarge_for_labels

    drawn = draw_faces(*enlarge_for_labels(image_rgb, faces))
    try:
        Image.fromarray(drawn).save(path, "JPEG", quality=JPEG_QUALITY)
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


def _annotate_all(store: ObjectStore, pictures: list[ObjectInfo], out_dir: Path, settings: Settings) -> list[Annotated]:
    from workers.inference import runtime_of
    from workers.pipeline import load_analyzer

    try:
        analyzer = load_analyzer(settings.pipeline.spec(), runtime_of(settings, processes=1))
    except PermanentJobError as error:
        raise MaskwatchError(error.detail) from error
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MaskwatchError(f"can't make the folder {out_dir}: {error.strerror}") from error
    results = []
    with progress() as bar:
        task = bar.add_task("annotating", total=len(pictures))
        for result in annotate_pictures(store, pictures, analyzer, out_dir, settings):
            if result.error is not None:
                note(result.error if result.source in result.error else f"{result.source}: {result.error}")
            results.append(result)
            bar.advance(task)
    return results


def _settings_for(source: str) -> AbstractContextManager[Settings]:
    """The settings to read a source with. Only s3:// without any AWS configuration needs the embedded stack."""
    from common.deployment import deployment, has_aws_configuration, uses_embedded_stack
    from common.settings import get_settings

    settings = get_settings()
    embedded = uses_embedded_stack(settings) and not has_aws_configuration(settings)
    return deployment() if source.startswith("s3://") and embedded else nullcontext(settings)


def _sentence(results: list[Annotated], others: int, out_dir: Path) -> str:
    faces = [face for result in results for face in result.faces]
    counts = ", ".join(f"{sum(face.status is status for face in faces)} {status.value}" for status in MaskStatus)
    written = sum(result.error is None for result in results)
    return (
        f"{written} pictures in {out_dir}: {len(faces)} faces ({counts}); "
        f"{len(results) - written} failed, {others} other objects passed over"
    )
