"""S3 Inventories as S3 delivers them, for the tests: gzipped CSV with keys encoded as in a form, or Parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from tests.services import Bucket

#: One row, by the names of a configuration.
Row = Mapping[str, Any]

COLUMNS = ("Bucket", "Key", "Size", "LastModifiedDate", "ETag", "StorageClass")
VERSIONED = ("Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "LastModifiedDate", "ETag")

#: Of each column that Parquet has: its name there, and its type.
PARQUET = {
    "Bucket": ("bucket", pa.string()),
    "Key": ("key", pa.string()),
    "VersionId": ("version_id", pa.string()),
    "IsLatest": ("is_latest", pa.bool_()),
    "IsDeleteMarker": ("is_delete_marker", pa.bool_()),
    "Size": ("size", pa.int64()),
    "LastModifiedDate": ("last_modified_date", pa.timestamp("ms", "UTC")),
    "ETag": ("e_tag", pa.string()),
    "StorageClass": ("storage_class", pa.string()),
}

NOON = datetime(2026, 3, 2, 12, 0, 0, 123000, tzinfo=UTC)
DELIVERY = "of/footage/daily/2026-11-01T01-00Z/manifest.json"


def row(key: str, **values: Any) -> dict[str, Any]:
    """A row of the bucket `footage`."""
    return {
        "Bucket": "footage",
        "Key": key,
        "Size": 7,
        "LastModifiedDate": NOON,
        "ETag": "e1",
        "StorageClass": "STANDARD",
        **values,
    }


def rows_of(bucket: Bucket) -> list[dict[str, Any]]:
    """A row for each object that lies in a bucket, the last keys first: no order can be relied on."""
    listed = bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents", [])
    return [
        {
            "Bucket": bucket.name,
            "Key": entry["Key"],
            "Size": entry["Size"],
            "LastModifiedDate": entry["LastModified"],
            "ETag": entry["ETag"].strip('"'),
            "StorageClass": entry["StorageClass"],
        }
        for entry in reversed(listed)
    ]


def csv_file(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> bytes:
    text = io.StringIO()
    lines = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for values in rows:
        lines.writerow([_in_csv(name, values.get(name)) for name in columns])
    return gzip.compress(text.getvalue().encode(), mtime=0)  # the same bytes, and MD5, whenever it is made


def _in_csv(name: str, value: Any) -> str:
    if name == "Key":
        return quote_plus(value, safe="/")
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03}Z"
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def parquet_file(
    rows: Sequence[Row], columns: Sequence[str] = COLUMNS, *, times: pa.DataType | None = None, **options: Any
) -> bytes:
    """`times` is the type that LastModifiedDate has."""
    arrays = {}
    for column in columns:
        name, kind = PARQUET[column]
        values = [values.get(column) for values in rows]
        if column == "LastModifiedDate" and times is not None:
            kind = times
            values = [value.isoformat() if kind == pa.string() and value else value for value in values]
        arrays[name] = pa.array(values, kind)
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file, **options)
    return file.getvalue()


def data_file(layout: str, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> bytes:
    return csv_file(rows, columns) if layout == "CSV" else parquet_file(rows, columns)


def manifest(
    files: Mapping[str, bytes], layout: str = "CSV", columns: Sequence[str] = COLUMNS, *, of: str = "footage",
    lies_in: str = "inventories",
) -> dict[str, Any]:  # fmt: skip
    """What a manifest.json holds that names these data files."""
    fields = " ".join(f"optional binary {PARQUET[column][0]} (UTF8);" for column in columns)
    return {
        "sourceBucket": of,
        "destinationBucket": f"arn:aws:s3:::{lies_in}",
        "version": "2016-11-30",
        "creationTimestamp": "1793494800000",
        "fileFormat": layout,
        "fileSchema": ", ".join(columns) if layout == "CSV" else f"message s3.inventory {{ {fields} }}",
        "files": [
            {"key": key, "size": len(content), "MD5checksum": hashlib.md5(content).hexdigest()}
            for key, content in files.items()
        ],
    }


def deliver(
    bucket: Bucket, files: Sequence[Sequence[Row]], *, layout: str = "CSV", columns: Sequence[str] = COLUMNS
) -> tuple[Bucket, str]:
    """Put an inventory of a bucket, in so many data files, into another one; returns that, and the manifest's URI."""
    other = Bucket(f"{bucket.name}-inventories", bucket.client)
    other.client.create_bucket(Bucket=other.name)
    contents = {f"of/footage/daily/data/{n}": data_file(layout, rows, columns) for n, rows in enumerate(files)}
    for key, content in contents.items():
        other.put(key, content)
    made = manifest(contents, layout, columns, of=bucket.name, lies_in=other.name)
    other.put(DELIVERY, json.dumps(made).encode())
    return other, f"{other.uri}/{DELIVERY}"


def deliver_to(
    folder: Path, contents: Sequence[bytes], layout: str = "CSV", columns: Sequence[str] = COLUMNS, **changed: Any
) -> str:
    """Put an inventory of the bucket `footage` into a folder; returns the manifest's path."""
    files = {f"of/footage/daily/data/{n}": content for n, content in enumerate(contents)}
    for key, content in files.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content)
    path = folder / DELIVERY
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**manifest(files, layout, columns), **changed}))
    return str(path)
