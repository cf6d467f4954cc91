"""An S3 Inventory, read instead of a listing: its manifest, and the rows of the data files that the manifest names.

S3 writes one every day or week ("Cataloging and analyzing your data with S3 Inventory", S3 User Guide), so it may be
that old: a worker finds out which objects were deleted or replaced since.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice, repeat
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote_plus

from pydantic import BaseModel, Field, ValidationError

from common.domain import (
    MaskwatchError,
    ObjectInfo,
    PermanentJobError,
    SourceChangedError,
    TransientJobError,
    first_line,
)
from common.settings import Settings
from common.storage.opening import open_source
from common.storage.store import FILE_BUCKET, ObjectStore

#: The columns that are read: the name in configurations and CSV files → the name in Parquet files.
COLUMNS = {
    "Key": "key",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
    "StorageClass": "storage_class",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
}
REQUIRED = ("Key", "Size", "LastModifiedDate", "ETag")

#: A data file takes about 150 bytes in the manifest: room for some hundred thousand data files.
_MAX_MANIFEST_BYTES = 64 * 2**20

#: A data file is fetched in pieces of this size, and Parquet decoded so many rows at a time: neither is ever whole in
#: memory.
_PIECE_BYTES = 8 * 2**20
_ROWS_AT_ONCE = 4000

#: What to do about a data file that can't be read.
_STAYS = "what was enqueued stays; give the command again when it can be read, or use another delivery of the inventory"


class _DataFile(BaseModel):
    key: str
    md5: str = Field(alias="MD5checksum")


class _Manifest(BaseModel):
    """The fields of a manifest.json that are needed here."""

    source: str = Field(alias="sourceBucket")
    destination: str = Field(alias="destinationBucket", description="an ARN")
    layout: str = Field(alias="fileFormat")
    columns: str = Field(alias="fileSchema")
    files: list[_DataFile]


#: The values of a row, in the order of `COLUMNS`; None for what the inventory doesn't have.
Row = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Inventory:
    """One delivery of an inventory. Data files are named by the keys that the manifest gives them."""

    #: The manifest's address.
    uri: str
    #: The bucket that the inventory lists, as the ledger names it.
    bucket: str
    #: Where its data files lie.
    store: ObjectStore
    #: The key of each data file → its key in `store`, and its MD5.
    files: Mapping[str, tuple[str, str]]
    #: Reads the rows of a copy of a data file.
    rows: Callable[[IO[bytes]], Iterator[Row]]

    def objects(self, prefix: str) -> Iterator[ObjectInfo | None]:
        """The rows of all data files, as `objects_of`. Raises `MaskwatchError` if no object lies below the prefix."""
        found = False
        for file in self.files:
            for info in self.objects_of(file, prefix):
                found = found or info is not None
                yield info
        if not found:
            raise MaskwatchError(
                f"no row of the inventory {self.uri} is an object below {self.bucket}/{prefix}; check the prefix, and "
                "whether the inventory's configuration is limited to another one"
            )

    def objects_of(self, file: str, prefix: str, *, after: int = 0) -> Iterator[ObjectInfo | None]:
        """The rows of a data file after the first `after`, in their order; None for a row that is not a current object
        below the prefix.

        Raises `MaskwatchError` for a file that can't be read, has another hash than in the manifest, or has an invalid
        row.
        """
        if file not in self.files:
            raise MaskwatchError(
                f"the manifest {self.uri} was replaced, and no longer names {file}: cancel the backfill (maskwatch "
                "backfills cancel), and begin another one, which enqueues what is missing"
            )
        key, md5 = self.files[file]
        with self._fetched(key, md5) as copy:
            rows = islice(self.rows(copy), after, None)
            for number in count(after + 1):
                try:
                    row = next(rows, None)
                    info = None if row is None else _object(self.bucket, prefix, row)
                except (ValueError, OSError, EOFError, zlib.error, csv.Error) as error:
                    raise MaskwatchError(
                        f"{self.store.bucket}/{key}, row {number:,}: {error}; use another delivery of the inventory, "
                        "or leave --inventory out and have the bucket listed"
                    ) from error
                if row is None:
                    return
                yield info

    @contextmanager
    def _fetched(self, key: str, md5: str) -> Iterator[IO[bytes]]:
        """A copy of a data file in a temporary file without a name, which is gone when this process ends."""
        uri = f"{self.store.bucket}/{key}"
        found = hashlib.md5(usedforsecurity=False)
        with tempfile.TemporaryFile() as copy:
            with _reading("the inventory's data file"):
                info = self.store.stat(key)
                for start in range(0, info.size_bytes, _PIECE_BYTES):
                    piece = self.store.read_range(key, info.etag, start, min(start + _PIECE_BYTES, info.size_bytes))
                    found.update(piece)
                    _write(copy, piece, uri)
            if found.hexdigest() != md5.lower():
                raise MaskwatchError(
                    f"{uri} is not the file that the manifest names, and none of its rows was used: its MD5 is "
                    f"{found.hexdigest()}, and should be {md5}; put the right file there, or use another delivery of "
                    "the inventory"
                )
            copy.seek(0)
            yield copy


def open_inventory(uri: str, bucket: str, settings: Settings) -> Inventory:
    """The inventory of a bucket that a manifest describes.

    Raises `MaskwatchError` for a file that can't be read or isn't a manifest, and for a manifest of another bucket or
    with files that Maskwatch can't use.
    """
    if bucket == FILE_BUCKET:
        raise MaskwatchError("--inventory needs a SOURCE in S3: s3://bucket/prefix")
    store, key = open_source(uri, settings)
    uri = f"{store.bucket}/{key}"
    with _reading("the inventory's manifest", "name the file manifest.json in the folder of a delivery"):
        info = store.stat(key)
        if info.size_bytes > _MAX_MANIFEST_BYTES:
            raise MaskwatchError(
                f"{uri} has {info.size_bytes:,} bytes, too many for a manifest of an S3 Inventory; name the file "
                "manifest.json in the folder of a delivery"
            )
        content = store.read(key, info.etag, _MAX_MANIFEST_BYTES)
    try:
        manifest = _Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise MaskwatchError(
            f"{uri} is not a manifest of an S3 Inventory ({'.'.join(map(str, first['loc']))} {first['msg']}); name the "
            "file manifest.json in the folder of a delivery"
        ) from error
    if f"s3://{manifest.source}" != bucket:
        raise MaskwatchError(
            f"the inventory {uri} lists s3://{manifest.source}, but the SOURCE lies in {bucket}; name an inventory "
            "of that bucket"
        )
    rows = _rows_of(uri, manifest.layout, manifest.columns)
    if store.bucket == FILE_BUCKET:
        # A copy of a delivery: S3 puts the folder `data` beside those of the deliveries.
        folder = PurePosixPath(key).parent.parent / "data"
        places = [str(folder / PurePosixPath(file.key).name) for file in manifest.files]
    else:
        store, _ = open_source(f"s3://{manifest.destination.rpartition(':')[2]}", settings)
        places = [file.key for file in manifest.files]
    files = {file.key: (place, file.md5) for file, place in zip(manifest.files, places, strict=True)}
    return Inventory(uri, bucket, store, files, rows)


@contextmanager
def _reading(what: str, hint: str = _STAYS) -> Iterator[None]:
    try:
        yield
    except (PermanentJobError, TransientJobError, SourceChangedError) as error:
        raise MaskwatchError(f"can't read {what}: {error}; {hint}") from error


def _write(copy: IO[bytes], piece: bytes, uri: str) -> None:
    try:
        copy.write(piece)
        copy.flush()
    except OSError as error:
        raise MaskwatchError(
            f"no room for a copy of {uri} in {tempfile.gettempdir()}: {first_line(error)}; make room there, or set "
            "TMPDIR"
        ) from error


def _rows_of(uri: str, layout: str, columns: str) -> Callable[[IO[bytes]], Iterator[Row]]:
    """The function that reads the rows of an inventory's data file."""
    if layout.upper() == "CSV":
        names = [name.strip() for name in columns.split(",")]
        _check_columns(uri, names)
        return lambda file: _csv_rows(file, names)
    if layout.upper() == "PARQUET":
        import pyarrow.parquet  # noqa: F401 - so that a missing pyarrow is reported before anything is fetched

        return lambda file: _parquet_rows(file, uri)
    raise MaskwatchError(
        f"the inventory {uri} is written in {layout}, which can't be read: set its configuration to Parquet or CSV, "
        "and use the next delivery"
    )


def _check_columns(uri: str, names: Collection[str]) -> None:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise MaskwatchError(
            f"the inventory {uri} lacks {' and '.join(missing)}, which the ledger needs: include it in the inventory's "
            "configuration, and use the next delivery"
        )


def _csv_rows(file: IO[bytes], names: Sequence[str]) -> Iterator[Row]:
    """Rows of a gzipped CSV file without a header."""
    places = [names.index(name) if name in names else None for name in COLUMNS]
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        for values in csv.reader(lines, strict=True):
            if len(values) != len(names):
                raise ValueError(f"{len(values)} columns, and the manifest names {len(names)}")
            row = [None if place is None else values[place] for place in places]
            # URL-encoded as forms are: S3 writes a space as a plus, and a plus as %2B.
            row[0] = unquote_plus(row[0] or "", errors="strict")
            yield row


def _parquet_rows(file: IO[bytes], uri: str) -> Iterator[Row]:
    """Rows of a Parquet file."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    def values(batch: Any, name: str) -> Any:
        if name not in there:
            return repeat(None)
        column = batch.column(name)
        if pa.types.is_timestamp(column.type):
            # In any unit, with or without a zone; S3 means UTC.
            column = column.cast(pa.timestamp("us", "UTC"), safe=False)
        return column.to_pylist()

    try:
        # Page by page: by default all columns of a group of rows are read at once, and a group can be the whole file.
        parquet = ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        there = [name for name in COLUMNS.values() if name in parquet.schema_arrow.names]
        _check_columns(uri, [name for name, theirs in COLUMNS.items() if theirs in there])
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=there, use_threads=False):
            yield from zip(*(values(batch, name) for name in COLUMNS.values()), strict=False)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _object(bucket: str, prefix: str, row: Row) -> ObjectInfo | None:
    """The object of a row; None if it isn't below the prefix, or is an earlier version, a delete marker, or a
    "folder" made by a console. Raises `ValueError` for an invalid row."""
    key, size, modified, etag, storage_class, is_latest, is_delete_marker = row
    if not key:
        raise ValueError("no Key")
    if not key.startswith(prefix) or key.endswith("/"):
        return None
    # In CSV files these are text. Without such columns the inventory lists only current versions.
    if str(is_latest).lower() == "false" or str(is_delete_marker).lower() == "true":
        return None
    if not etag:
        raise ValueError("no ETag")
    return ObjectInfo(
        bucket,
        key,
        etag.strip('"'),
        _size(size),
        _instant(modified),
        None if storage_class in (None, "", "STANDARD") else storage_class,
    )


def _size(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < 2**63:
        raise ValueError(f"the Size {value!r} is not a number of bytes")
    return number


def _instant(value: Any) -> datetime:
    try:
        instant = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the LastModifiedDate {value!r} is not a time") from error
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
