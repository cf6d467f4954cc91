"""Opens the store of a URI or a path."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from common.domain import MaskwatchError, first_line
from common.settings import Settings, StorageSettings, get_settings
from common.storage.local_files import FileStore
from common.storage.s3 import S3Store
from common.storage.store import FILE_BUCKET, ObjectStore, is_storable, split_uri


def open_source(source: str, settings: Settings) -> tuple[ObjectStore, str]:
    """The store and prefix of `s3://bucket/prefix`, `file:///path`, or a path.

    Raises `MaskwatchError` for another scheme and for a path that doesn't exist.
    """
    if not is_storable(source):
        raise MaskwatchError(f"can't read {source!r}: the name is not UTF-8, or too long")
    if "://" not in source:
        source = f"{FILE_BUCKET}{Path(source).expanduser().absolute()}"
    if not source.startswith(("s3://", FILE_BUCKET)):
        raise MaskwatchError(f"can't read {source!r}; expected s3://bucket/prefix or a folder")
    bucket, prefix = split_uri(source)
    if bucket == FILE_BUCKET:
        # Normalized, so that a file has one key, however its path was written.
        prefix = os.path.normpath(f"/{prefix}").lstrip("/")
        try:
            Path("/", prefix).stat()
        except OSError as error:
            raise MaskwatchError(f"there is no folder or file /{prefix} ({first_line(error)})") from error
    return _open(bucket, settings.storage), prefix


@lru_cache(maxsize=32)
def open_bucket(bucket: str) -> ObjectStore:
    """The store of a bucket as the ledger names it, one client per process."""
    return _open(bucket, get_settings().storage)


def _open(bucket: str, settings: StorageSettings) -> ObjectStore:
    if bucket == FILE_BUCKET:
        return FileStore(settings.list_page_size)
    return S3Store(bucket, settings)
