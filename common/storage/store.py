"""The protocol of stores of footage, their URIs, and the checks that all stores share.

Listing raises `MaskwatchError`, which is shown to the person who waits. Reading raises the job errors of
`common/domain.py`, whose reason the ledger stores. Reads are pinned to an ETag, so that the analysed version is
the planned one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from common.domain import MaskwatchError, ObjectInfo, PermanentJobError, Reason, SourceChangedError, TransientJobError

FILE_BUCKET = "file://"


#: An index entry of Postgres may take a third of a page, which has to hold the bucket and the revision, too.
MAX_KEY_BYTES = 2000


class ObjectStore(Protocol):
    """A bucket, or the local file system as one."""

    bucket: str

    def list_pages(self, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """Objects below a prefix, in key order, page by page; `start_after` resumes behind a key."""
        ...

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        """At most `limit` folders directly below a prefix, each ending in a slash, in order; none if the store would
        have to list everything to find them."""
        ...

    def restore(self, key: str, *, days: int, tier: str) -> None:
        """Ask for a readable copy of an archived object, for so many days. Asking twice does no harm."""
        ...

    def stat(self, key: str) -> ObjectInfo:
        """The object as it is now."""
        ...

    def read(self, key: str, etag: str, max_bytes: int) -> bytes:
        """The whole object, if it still has this ETag and at most `max_bytes`."""
        ...

    def read_range(self, key: str, etag: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the object, all of them, if it still has this ETag."""
        ...


def split_uri(uri: str) -> tuple[str, str]:
    """(bucket, key) of an `s3://` or `file://` URI."""
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise MaskwatchError(f"{uri!r} names no bucket; expected s3://bucket/prefix")
        return f"s3://{bucket}", key
    return FILE_BUCKET, uri.removeprefix("file://").removeprefix("/")


def named_object(uri: str) -> tuple[str, str]:
    """(bucket, key) of one object, as the ledger names it, from a URI or a path. The object need not exist any more."""
    if "://" not in uri:
        uri = f"{FILE_BUCKET}{Path(uri).expanduser().absolute()}"
    if not uri.startswith(("s3://", FILE_BUCKET)):
        raise MaskwatchError(f"{uri!r} is no object; expected s3://bucket/key or a path")
    bucket, key = split_uri(uri)
    if bucket == FILE_BUCKET:
        key = os.path.normpath(f"/{key}").lstrip("/")
    if not is_storable(key):
        raise MaskwatchError(f"{uri!r} names no object; expected a key of at most {MAX_KEY_BYTES} bytes of UTF-8")
    return bucket, key


def is_storable(key: str) -> bool:
    """Whether the ledger can hold this key: UTF-8 without NUL, short enough for an index. (File systems allow
    more; S3 keys have at most 1,024 bytes.)"""
    try:
        return "\0" not in key and 0 < len(key.encode("utf-8")) <= MAX_KEY_BYTES
    except UnicodeEncodeError:
        return False


def check_etag(found: ObjectInfo, etag: str) -> None:
    if found.etag != etag:
        raise SourceChangedError(f"{found.uri} changed: planned ETag {etag}, found {found.etag}")


def whole(data: bytes, uri: str, start: int, stop: int) -> bytes:
    """The data of a range; raises `TransientJobError` if a part is missing."""
    if len(data) != stop - start:
        raise TransientJobError(
            Reason.STORAGE_UNAVAILABLE, f"reading {uri}: got {len(data):,} bytes for the range [{start:,}, {stop:,})"
        )
    return data


def check(found: ObjectInfo, etag: str, max_bytes: int) -> None:
    check_etag(found, etag)
    if found.size_bytes > max_bytes:
        raise PermanentJobError(
            Reason.OBJECT_TOO_LARGE,
            f"{found.uri} has {found.size_bytes:,} bytes, more than the {max_bytes:,} that "
            "MASKWATCH_STORAGE__MAX_OBJECT_BYTES allows",
        )
