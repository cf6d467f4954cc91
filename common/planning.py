"""From listed objects to planned work: pure rules, no input or output.

What an object is, how a video is cut into chunks, and why something can't be planned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

from common.domain import MediaKind, ObjectInfo, ObservedAt, ObservedAtSource, Reason
from common.timestamps import END, FIRST, LocalTimeError, TimePattern, is_ahead, is_storable, resolve_local

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "bmp", "tif", "tiff"})
VIDEO_SUFFIXES = frozenset({"mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mts", "gif"})

#: Folders that network storage and desktops put beside footage: thumbnails, recycle bins, snapshots, resource forks. Of
#: Synology, QNAP, Windows, macOS and the desktops of freedesktop.org.
LITTER = frozenset(
    {
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler",
        "system volume information", ".trash", ".trashes", ".thumbnails", "__macosx", ".appledouble", "lost+found",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedObject:
    """An object and the result of planning it. `reason` is set if it can only be quarantined."""

    info: ObjectInfo
    kind: MediaKind
    observed_at: ObservedAt | None
    reason: Reason | None = None
    detail: str | None = None

    @property
    def best_known_time(self) -> datetime:
        """The time that `--since` and `--until` are compared with: the key's, otherwise LastModified."""
        return self.observed_at.instant if self.observed_at else self.info.last_modified


def media_kind(key: str) -> MediaKind | None:
    """The kind of an object, by its suffix; None if Maskwatch does not analyse it, or it is `LITTER`."""
    folders, _, name = key.rpartition("/")
    # "._name.jpg" is the resource fork of "name.jpg".
    if name.startswith("._") or not LITTER.isdisjoint(folders.lower().split("/")):
        return None
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    if suffix in IMAGE_SUFFIXES:
        return MediaKind.IMAGE
    return MediaKind.VIDEO if suffix in VIDEO_SUFFIXES else None


def chunk_ranges(duration_seconds: float | None, chunk_seconds: float) -> list[tuple[int, int]]:
    """The half-open ranges, in ms of the file's own time, that a video is analysed in: at least one.

    The last range is as long as the others: its job always continues to the end of the file, because headers may be
    wrong. A video whose header tells no length is one chunk.
    """
    chunk_ms = round(chunk_seconds * 1000)
    count = max(1, math.ceil((duration_seconds or 0) * 1000 / chunk_ms))
    return [(index * chunk_ms, (index + 1) * chunk_ms) for index in range(count)]


def plan_object(info: ObjectInfo, pattern: TimePattern | None, where: ZoneInfo) -> PlannedObject | None:
    """Plan one listed object; None if Maskwatch does not analyse its kind."""
    kind = media_kind(info.key)
    if kind is None:
        return None
    seen = None
    if pattern is not None:
        local = pattern.match(info.key)
        if local is None:
            detail = f"the key {info.key!r} does not match the time pattern {pattern.pattern!r}"
            return PlannedObject(info, kind, None, Reason.TIME_PATTERN_MISMATCH, detail)
        try:
            seen = ObservedAt(*_instant(local, where))
        except LocalTimeError as error:
            return PlannedObject(info, kind, None, Reason.NONEXISTENT_LOCAL_TIME, f"{error} (key {info.key!r})")
        if not is_storable(seen.instant):
            named = local.isoformat(sep=" ")
            detail = (
                f"the key {info.key!r} read with the time pattern {pattern.pattern!r} names {named}, which is not "
                f"between {FIRST.year} and {END.year - 1} (UTC)"
            )
            return PlannedObject(info, kind, None, Reason.TIME_PATTERN_MISMATCH, detail)
        if is_ahead(seen.instant, info.last_modified):
            detail = (
                f"the key {info.key!r} read with the time pattern {pattern.pattern!r} names {seen.instant:%Y-%m-%d}, "
                f"but the object was last modified earlier, on {info.last_modified:%Y-%m-%d}"
            )
            return PlannedObject(info, kind, None, Reason.FUTURE_TIME, detail)
    if info.archived:
        return PlannedObject(info, kind, seen, Reason.ARCHIVED, archived_detail(info))
    return PlannedObject(info, kind, seen)


def _instant(local: datetime, where: ZoneInfo) -> tuple[datetime, ObservedAtSource, bool]:
    instant, ambiguous = resolve_local(local, where)
    return instant, ObservedAtSource.KEY_PATTERN, ambiguous


def archived_detail(info: ObjectInfo) -> str:
    """The detail of a job whose object lies in an archive: what to do about it."""
    return (
        f"{info.uri} lies in the storage class {info.storage_class}: give the backfill again with --restore; the "
        "object is analysed when it is restored"
    )
