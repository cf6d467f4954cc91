"""S3 buckets, and the meaning of their errors: for a person who lists, and for a job that reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from common.domain import (
    ArchivedError,
    MaskwatchError,
    ObjectInfo,
    PermanentJobError,
    Reason,
    SourceChangedError,
    TransientJobError,
    first_line,
)
from common.settings import StorageSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
from common.storage.store import check, whole


class S3Store:
    """One S3 bucket. Credentials, region and profile come from the usual AWS variables and roles."""

    def __init__(self, bucket: str, settings: StorageSettings) -> None:
        self.bucket = bucket
        self._name = bucket.removeprefix("s3://")
        self._page_size = settings.list_page_size
        self._client = client(settings.endpoint_url, settings.connect_timeout_seconds, settings.read_timeout_seconds)
        # A bucket whose owner pays ignores this.
        self._payer: dict[str, Any] = {"RequestPayer": "requester"} if settings.requester_pays else {}

    def list_pages(self, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._name,
            Prefix=prefix,
            StartAfter=start_after,
            # Tells which archived objects can be read for now; servers without an archive ignore it.
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
            # Only a few pages: millions of objects may lie beside the folders.
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
                check(found, etag, max_bytes)
                return body.read()

    def read_range(self, key: str, etag: str, start: int, stop: int) -> bytes:
        with _reading_errors(self.bucket, key):
            answer = self._client.get_object(
                Bucket=self._name, Key=key, IfMatch=f'"{etag}"', Range=f"bytes={start}-{stop - 1}", **self._payer
            )
            with answer["Body"] as body:
                # Some servers ignore IfMatch.
                if (found := answer["ETag"].strip('"')) != etag:
                    raise SourceChangedError(f"{self.bucket}/{key} changed: planned ETag {etag}, found {found}")
                # Others ignore Range, and send the object from its first byte on.
                if not answer.get("ContentRange", "").startswith(f"bytes {start}-{stop - 1}/"):
                    raise TransientJobError(
                        Reason.STORAGE_UNAVAILABLE,
                        f"reading {self.bucket}/{key}: the server answered a request for the bytes "
                        f"[{start:,}, {stop:,}) with another range",
                    )
                data = body.read()
        return whole(data, f"{self.bucket}/{key}", start, stop)


@lru_cache(maxsize=8)
def client(endpoint_url: str | None, connect_timeout: float, read_timeout: float) -> S3Client:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        # "standard" adds jitter and retries throttling; what still fails is retried by the ledger.
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
                f"listing {uri} is denied ({code}): grant s3:ListBucket to these keys; for a requester-pays bucket, "
                "set MASKWATCH_STORAGE__REQUESTER_PAYS"
            ) from error
        raise MaskwatchError(f"listing {uri} failed: {first_line(error)}") from error
    except NoCredentialsError as error:
        raise MaskwatchError(
            f"no AWS credentials for {uri}: set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    except BotoCoreError as error:
        raise MaskwatchError(f"listing {uri} failed: {first_line(error)}") from error


#: An error code that comes with status 403, but that no grant fixes.
_SKEWED = "RequestTimeTooSkewed"


_CLOCK = f"the clocks of this machine and of the server are many minutes apart ({_SKEWED}): set them, best by NTP"


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
