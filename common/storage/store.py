"""Where footage lies: S3 buckets and local folders behind one small protocol.

Listing raises `MaskwatchError` (a person waits for it); reading raises the job errors of `common/domain.py`
(the ledger keeps the reason). Reads are pinned to an ETag, so that what is analysed is what was planned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.domain import (
    ArchivedError,
    MaskwatchError,
    PermanentJobError,
    Reason,
    SourceChangedError,
    TransientJobError,
    first_line,
)
from common.settings import Settings, StorageSettings, get_settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

FILE_BUCKET = "file://"

#: The storage classes that hold nothing readable until it is restored ("Understanding and managing Amazon S3 storage
#: classes", S3 User Guide). Glacier Instant Retrieval is none of them.
ARCHIVES = frozenset({"GLACIER", "DEEP_ARCHIVE"})

#: A third of a Postgres page, what an index entry may take, holds the bucket and the revision, too.
MAX_KEY_BYTES = 2000


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One version of one object as listed; bucket + "/" + key is its URI."""

    bucket: str
    key: str
    etag: str
    size_bytes: int
    last_modified: datetime
    #: As S3 names it; None for its standard class, and where there are none.
    storage_class: str | None = None
    #: Of an object in an archive: a copy of it can be read for now.
    restored: bool = False

    @property
    def uri(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def archived(self) -> bool:
        """Whether it has to be restored before it can be read."""
        return self.storage_class in ARCHIVES and not self.restored


class ObjectStore(Protocol):
    """A bucket, or the local file system as one."""

    bucket: str

    def list_pages(self, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """Objects below a prefix, in key order, page by page; `start_after` resumes behind a key."""
        ...

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        """At most `limit` prefixes of the next level below one, each ending in a slash, in order; none where a store
        can't tell them without reading everything."""
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


def open_source(source: str, settings: Settings) -> tuple[ObjectStore, str]:
    """The store and prefix a person means by `s3://bucket/prefix`, `file:///path`, or a path.

    Raises `MaskwatchError` for another scheme and for a path that isn't there.
    """
    if not is_storable(source):
        raise MaskwatchError(f"can't read {source!r}: its name is no UTF-8, or too long")
    if "://" not in source:
        source = f"{FILE_BUCKET}{Path(source).expanduser().absolute()}"
    if not source.startswith(("s3://", FILE_BUCKET)):
        raise MaskwatchError(f"can't read {source!r}; expected s3://bucket/prefix or a folder")
    bucket, prefix = split_uri(source)
    if bucket == FILE_BUCKET:
        # One file, one key: however the way to it was written.
        prefix = os.path.normpath(f"/{prefix}").lstrip("/")
        try:
            Path("/", prefix).stat()
        except OSError as error:
            raise MaskwatchError(f"there is no folder or file /{prefix} ({first_line(error)})") from error
    return _open(bucket, settings.storage), prefix


def named_object(uri: str) -> tuple[str, str]:
    """(bucket, key) of one object, as the ledger names it, from a URI or a path. It need not exist any more."""
    if "://" not in uri:
        uri = f"{FILE_BUCKET}{Path(uri).expanduser().absolute()}"
    if not uri.startswith(("s3://", FILE_BUCKET)):
        raise MaskwatchError(f"{uri!r} is no s3://bucket/key and no path")
    bucket, key = split_uri(uri)
    if bucket == FILE_BUCKET:
        key = os.path.normpath(f"/{key}").lstrip("/")
    if not is_storable(key):
        raise MaskwatchError(f"{uri!r} names no object")
    return bucket, key


def is_storable(key: str) -> bool:
    """Whether the ledger can hold this key: UTF-8 without NUL, short enough for an index. (File systems allow
    more; S3 keys have at most 1,024 bytes.)"""
    try:
        return "\0" not in key and 0 < len(key.encode("utf-8")) <= MAX_KEY_BYTES
    except UnicodeEncodeError:
        return False


@lru_cache(maxsize=32)
def open_bucket(bucket: str) -> ObjectStore:
    """The store of a bucket as the ledger names it, one client per process."""
    return _open(bucket, get_settings().storage)


def _open(bucket: str, settings: StorageSettings) -> ObjectStore:
    if bucket == FILE_BUCKET:
        return FileStore(settings.list_page_size)
    return S3Store(bucket, settings)


class FileStore:
    """Local files. The ETag is the time of the last change and the size, which is what a rewrite changes."""

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
                continue  # deleted while we listed: there is nothing to analyse
            if len(page) == self._page_size:
                yield page
                page = []
        if page:
            yield page

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        return []  # a walk has to go through all of it each time

    def restore(self, key: str, *, days: int, tier: str) -> None:
        raise MaskwatchError(f"file:///{key} is a file: there is nothing to restore")

    def _walk(self, root: Path) -> Iterator[Path]:
        """All files below a folder in the order of their keys, hidden ones left out."""
        # Reversed, so that the first is popped first; a stack of ours, because folders may nest deeper than calls.
        stack = [root]
        while stack:
            path = stack.pop()
            # Links to folders are not followed: they may lead back up.
            if path.is_dir() and (path == root or not path.is_symlink()):
                try:
                    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
                except FileNotFoundError:
                    continue  # deleted while we listed
                except OSError as error:
                    raise MaskwatchError(f"may not list {path}: {first_line(error)}") from error
                entries.sort(key=lambda entry: f"{entry}/" if entry.is_dir() else str(entry), reverse=True)
                stack += entries
            elif path.is_file():
                yield path

    def stat(self, key: str) -> ObjectInfo:
        with _file_errors(key):
            return self._info(key, Path("/", key).stat())

    def read(self, key: str, etag: str, max_bytes: int) -> bytes:
        with _file_errors(key), Path("/", key).open("rb") as file:
            before = self._info(key, os.fstat(file.fileno()))
            _check(before, etag, max_bytes)
            data = file.read(max_bytes + 1)
            # A file that is written while we read it must not pass for the one that was planned.
            _check(self._info(key, os.fstat(file.fileno())), etag, max_bytes)
            return data

    def read_range(self, key: str, etag: str, start: int, stop: int) -> bytes:
        with _file_errors(key), Path("/", key).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
            # Looked at afterwards, so that what a writer has changed meanwhile can't pass for what was planned.
            _check_etag(self._info(key, os.fstat(file.fileno())), etag)
        return _whole(data, f"file:///{key}", start, stop)

    def _info(self, key: str, stat: os.stat_result) -> ObjectInfo:
        modified = datetime.fromtimestamp(stat.st_mtime_ns // 1_000_000_000, UTC)
        return ObjectInfo(FILE_BUCKET, key, f"{stat.st_mtime_ns:x}-{stat.st_size:x}", stat.st_size, modified)


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


def _check_etag(found: ObjectInfo, etag: str) -> None:
    if found.etag != etag:
        raise SourceChangedError(f"{found.uri} changed: planned ETag {etag}, found {found.etag}")


def _whole(data: bytes, uri: str, start: int, stop: int) -> bytes:
    """What was read of a range, if it is all of it."""
    if len(data) != stop - start:
        raise TransientJobError(
            Reason.STORAGE_UNAVAILABLE, f"reading {uri}: {len(data):,} bytes came for [{start:,}, {stop:,})"
        )
    return data


def _check(found: ObjectInfo, etag: str, max_bytes: int) -> None:
    _check_etag(found, etag)
    if found.size_bytes > max_bytes:
        raise PermanentJobError(
            Reason.OBJECT_TOO_LARGE,
            f"{found.uri} has {found.size_bytes:,} bytes, more than the {max_bytes:,} that "
            "MASKWATCH_STORAGE__MAX_OBJECT_BYTES allows",
        )


class S3Store:
    """One S3 bucket. Credentials, region and profile come from the usual AWS variables and roles."""

    def __init__(self, bucket: str, settings: StorageSettings) -> None:
        self.bucket = bucket
        self._name = bucket.removeprefix("s3://")
        self._page_size = settings.list_page_size
        self._client = _client(settings.endpoint_url, settings.connect_timeout_seconds, settings.read_timeout_seconds)
        # A bucket that lets the owner pay ignores it.
        self._payer: dict[str, Any] = {"RequestPayer": "requester"} if settings.requester_pays else {}

    def list_pages(self, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._name,
            Prefix=prefix,
            StartAfter=start_after,
            # Which archived objects can be read for now; servers that have no archive ignore it.
            OptionalObjectAttributes=["RestoreStatus"],
            PaginationConfig={"PageSize": self._page_size},
            **self._payer,
        )
        with _listing_errors(f"{self.bucket}/{prefix}"):
            for page in pages:
                # "Folders" made by consoles are empty objects whose key ends in a slash.
                yield [self._listed(entry) for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]

    def _listed(self, entry: Any) -> ObjectInfo:
        storage_class = entry.get("StorageClass", "STANDARD")
        restored = entry.get("RestoreStatus", {})
        return ObjectInfo(
            self.bucket,
            entry["Key"],
            entry["ETag"].strip('"'),
            entry["Size"],
            entry["LastModified"],
            None if storage_class == "STANDARD" else storage_class,
            "RestoreExpiryDate" in restored and not restored.get("IsRestoreInProgress", False),
        )

    def list_folders(self, prefix: str, limit: int) -> list[str]:
        folders: list[str] = []
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._name, Prefix=prefix, Delimiter="/", PaginationConfig={"PageSize": 1000}, **self._payer
        )
        with _listing_errors(f"{self.bucket}/{prefix}"):
            # Where millions of objects lie beside the folders, a few pages have to do.
            for page in islice(pages, 10):
                folders += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
                if len(folders) >= limit:
                    break
        return folders[:limit]

    def restore(self, key: str, *, days: int, tier: str) -> None:
        from botocore.exceptions import ClientError

        request: Any = {"Days": days, "GlacierJobParameters": {"Tier": tier}}
        with _reading_errors(self.bucket, key):
            try:
                self._client.restore_object(Bucket=self._name, Key=key, RestoreRequest=request, **self._payer)
            except ClientError as error:
                if _error_code(error) != "RestoreAlreadyInProgress":
                    raise

    def stat(self, key: str) -> ObjectInfo:
        with _reading_errors(self.bucket, key):
            head = self._client.head_object(Bucket=self._name, Key=key, **self._payer)
        return ObjectInfo(self.bucket, key, head["ETag"].strip('"'), head["ContentLength"], head["LastModified"])

    def read(self, key: str, etag: str, max_bytes: int) -> bytes:
        with _reading_errors(self.bucket, key):
            answer = self._client.get_object(Bucket=self._name, Key=key, IfMatch=f'"{etag}"', **self._payer)
            found = ObjectInfo(
                self.bucket, key, answer["ETag"].strip('"'), answer["ContentLength"], answer["LastModified"]
            )
            with answer["Body"] as body:
                _check(found, etag, max_bytes)
                return body.read()

    def read_range(self, key: str, etag: str, start: int, stop: int) -> bytes:
        with _reading_errors(self.bucket, key):
            answer = self._client.get_object(
                Bucket=self._name, Key=key, IfMatch=f'"{etag}"', Range=f"bytes={start}-{stop - 1}", **self._payer
            )
            with answer["Body"] as body:
                # Some servers ignore that a version was asked for.
                if (found := answer["ETag"].strip('"')) != etag:
                    raise SourceChangedError(f"{self.bucket}/{key} changed: planned ETag {etag}, found {found}")
                # Others ignore that a range was asked for and send everything, from its first byte on.
                if not answer.get("ContentRange", "").startswith(f"bytes {start}-{stop - 1}/"):
                    raise TransientJobError(
                        Reason.STORAGE_UNAVAILABLE,
                        f"reading {self.bucket}/{key}: the server doesn't answer the range [{start:,}, {stop:,}) with "
                        "this range",
                    )
                data = body.read()
        return _whole(data, f"{self.bucket}/{key}", start, stop)


@lru_cache(maxsize=8)
def _client(endpoint_url: str | None, connect_timeout: float, read_timeout: float) -> S3Client:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        # "standard" adds jitter and retries throttling; what still fails after it goes to the ledger.
        retries={"mode": "standard", "total_max_attempts": 4},
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        max_pool_connections=16,
    )
    try:
        return boto3.client("s3", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise MaskwatchError(f"the S3 configuration can't be used: {first_line(error)}") from error


def _error_code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _listing_errors(uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = _error_code(error)
        if code == "NoSuchBucket":
            raise MaskwatchError(f"the bucket of {uri} does not exist; check the name and the endpoint") from error
        if code == _SKEWED:
            raise MaskwatchError(f"listing {uri} failed: {_CLOCK}") from error
        if code in _DENIED:
            raise MaskwatchError(
                f"listing {uri} is denied ({code}): grant s3:ListBucket to these keys; of a bucket whose "
                "requester pays, set MASKWATCH_STORAGE__REQUESTER_PAYS"
            ) from error
        raise MaskwatchError(f"listing {uri} failed: {first_line(error)}") from error
    except NoCredentialsError as error:
        raise MaskwatchError(
            f"no AWS credentials for {uri}: set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except BotoCoreError as error:
        raise MaskwatchError(f"listing {uri} failed: {first_line(error)}") from error


#: Comes with status 403, and no grant helps against it.
_SKEWED = "RequestTimeTooSkewed"
_CLOCK = f"this machine's clock and the server's are many minutes apart ({_SKEWED}): set it, best by NTP"

_DENIED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled"}


@contextmanager
def _reading_errors(bucket: str, key: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    uri = f"{bucket}/{key}"
    try:
        yield
    except ClientError as error:
        code = _error_code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 412 or code == "PreconditionFailed":
            raise SourceChangedError(f"{uri} no longer has the planned ETag") from error
        if code == "NoSuchBucket":
            raise PermanentJobError(Reason.BUCKET_MISSING, f"the bucket of {uri} does not exist") from error
        if code == "InvalidObjectState":
            raise ArchivedError(f"{uri} lies in an archive and is not restored") from error
        if status == 404 or code in {"NoSuchKey", "404"}:
            raise PermanentJobError(Reason.OBJECT_GONE, f"{uri} is gone") from error
        if code == _SKEWED:
            raise TransientJobError(Reason.STORAGE_UNAVAILABLE, f"reading {uri}: {_CLOCK}") from error
        if status == 403 or code in _DENIED:
            raise PermanentJobError(
                Reason.ACCESS_DENIED, f"reading {uri} is denied ({code}): grant s3:GetObject to these keys"
            ) from error
        raise TransientJobError(Reason.STORAGE_UNAVAILABLE, f"reading {uri}: {code} (HTTP {status})") from error
    except (BotoCoreError, HTTPError) as error:
        # Connections refused or cut, time-outs, bodies shorter than announced.
        raise TransientJobError(Reason.STORAGE_UNAVAILABLE, f"reading {uri}: {first_line(error)}") from error
