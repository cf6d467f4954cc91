"""The local file system as a bucket. Files are read whole or by ranges, pinned to an ETag that is made here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from common.domain import MaskwatchError, ObjectInfo, PermanentJobError, Reason, TransientJobError, first_line
from common.observability.logs import get_logger
from common.storage.store import FILE_BUCKET, check, check_etag, whole

log = get_logger(__name__)


class FileStore:
    """Local files. The ETag is made of modification time and size, which change when a file is written again."""

    bucket = FILE_BUCKET

    def __init__(self, page_size: int = 1000) -> None:
        self._page_size = page_size

    def list_pages(self, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        page: list[ObjectInfo] = []
        for path in self._walk(Path("/", prefix)):
            key = str(path).removeprefix("/")
            if key <= start_after:
                continue
            try:
                page.append(self._info(key, path.stat()))
            except FileNotFoundError:
                continue  # deleted during the listing: there is nothing to analyse
            if len(page) == self._page_size:
                yield page
                page = []
        if page:
            yield page

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        return []  # finding folders would take a walk through all files

    def restore(self, key: str, *, days: int, tier: str) -> None:
        raise MaskwatchError(f"file:///{key} is a file: there is nothing to restore")

    def _walk(self, root: Path) -> Iterator[Path]:
        """All files below a folder in the order of their keys, hidden ones left out."""
        # Reversed, so that the first is popped first. Not recursive, because folders may nest deeper than calls.
        stack = [root]
        while stack:
            path = stack.pop()
            try:
                # Links to folders are not followed: they may lead back up.
                if path.is_dir() and (path == root or not path.is_symlink()):
                    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
                    entries.sort(key=_sorted_by, reverse=True)
                    stack += entries
                elif path.is_file():
                    yield path
            except FileNotFoundError:
                continue  # deleted during the listing
            except OSError as error:
                if path == root:
                    raise MaskwatchError(f"may not list {path}: {first_line(error)}") from error
                # It costs itself only: the rest of the source is listed.
                log.warning("can't be listed and is left out", path=str(path), detail=first_line(error))

    def stat(self, key: str) -> ObjectInfo:
        with _file_errors(key):
            return self._info(key, Path("/", key).stat())

    def read(self, key: str, etag: str, max_bytes: int) -> bytes:
        with _file_errors(key), Path("/", key).open("rb") as file:
            before = self._info(key, os.fstat(file.fileno()))
            check(before, etag, max_bytes)
            data = file.read(max_bytes + 1)
            # Checked after reading, too: a file that changes during the read must not pass for the planned one.
            check(self._info(key, os.fstat(file.fileno())), etag, max_bytes)
            return data

    def read_range(self, key: str, etag: str, start: int, stop: int) -> bytes:
        with _file_errors(key), Path("/", key).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
            # Checked after reading, so that a file that changes during the read can't pass for the planned one.
            check_etag(self._info(key, os.fstat(file.fileno())), etag)
        return whole(data, f"file:///{key}", start, stop)

    def _info(self, key: str, stat: os.stat_result) -> ObjectInfo:
        try:
            modified = datetime.fromtimestamp(stat.st_mtime_ns // 1_000_000_000, UTC)
        except (OverflowError, ValueError, OSError):
            modified = _NO_DATE
        return ObjectInfo(FILE_BUCKET, key, f"{stat.st_mtime_ns:x}-{stat.st_size:x}", stat.st_size, modified)


def _sorted_by(path: Path) -> str:
    """What a key below this path begins with."""
    try:
        return f"{path}/" if path.is_dir() else str(path)
    except OSError:
        return str(path)  # its own turn says what is wrong with it


#: Stands for a time that no calendar of Python reaches. It is no time for footage either.
_NO_DATE = datetime(1, 1, 2, tzinfo=UTC)


@contextmanager
def _file_errors(key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PermanentJobError(Reason.OBJECT_GONE, f"file:///{key} is gone") from error
    except PermissionError as error:
        raise PermanentJobError(Reason.ACCESS_DENIED, f"may not read file:///{key}: {first_line(error)}") from error
    except OSError as error:
        raise TransientJobError(Reason.STORAGE_UNAVAILABLE, f"reading file:///{key}: {first_line(error)}") from error
