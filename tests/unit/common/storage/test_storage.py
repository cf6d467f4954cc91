"""Local folders as a store: listing, pinning, and errors that say what was wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.domain import MaskwatchError, PermanentJobError, Reason, SourceChangedError, TransientJobError
from common.settings import Settings, StorageSettings
from common.storage.local_files import FileStore
from common.storage.opening import open_source
from common.storage.s3 import S3Store
from common.storage.store import split_uri


def key(path: Path) -> str:
    return str(path).removeprefix("/")


@pytest.mark.parametrize("failing", ["iterdir", "is_dir"])
def test_a_folder_that_may_not_be_listed_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    """A fault is injected, because root may list every folder."""
    for name in ("a/1.jpg", "closed/2.jpg", "z/3.jpg", "closed.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    original = getattr(Path, failing)

    def refused(path: Path) -> object:
        if path == tmp_path / "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, failing, refused)
    found = [info.key for page in FileStore().list_pages(key(tmp_path)) for info in page]
    assert found == [key(tmp_path / name) for name in ("a/1.jpg", "closed.jpg", "z/3.jpg")]
    assert str(tmp_path / "closed") in capsys.readouterr().err
    if failing == "iterdir":
        with pytest.raises(MaskwatchError, match=r"may not list .*closed: Permission denied"):
            list(FileStore().list_pages(key(tmp_path / "closed")))


def test_listing_is_in_key_order_paged_and_resumable(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a.jpg", "a-b.jpg", "b/c/2.jpg", "z.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    expected = sorted(key(tmp_path / name) for name in names)
    pages = list(FileStore(page_size=2).list_pages(key(tmp_path)))
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [info.key for page in pages for info in page] == expected
    resumed = [info.key for page in FileStore().list_pages(key(tmp_path), start_after=expected[1]) for info in page]
    assert resumed == expected[2:]
    single = list(FileStore().list_pages(key(tmp_path / "a.jpg")))
    assert [info.uri for page in single for info in page] == [f"file://{tmp_path}/a.jpg"]


def test_a_read_is_pinned_to_what_was_planned(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    store = FileStore()
    info = store.stat(key(path))
    assert store.read(info.key, info.etag, 100) == b"first"
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceChangedError, match=r"a\.jpg"):
        store.read(info.key, info.etag, 100)


def test_a_range_is_pinned_and_whole_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(range(100)))
    store = FileStore()
    info = store.stat(key(path))
    assert store.read_range(info.key, info.etag, 10, 13) == bytes([10, 11, 12])
    assert store.read_range(info.key, info.etag, 90, 100) == bytes(range(90, 100))
    with pytest.raises(TransientJobError, match="got 10 bytes") as short:
        store.read_range(info.key, info.etag, 90, 120)
    assert short.value.reason is Reason.STORAGE_UNAVAILABLE
    path.write_bytes(bytes(101))
    with pytest.raises(SourceChangedError, match=r"a\.mp4"):
        store.read_range(info.key, info.etag, 10, 13)
    path.unlink()
    with pytest.raises(PermanentJobError) as gone:
        store.read_range(info.key, info.etag, 10, 13)
    assert gone.value.reason is Reason.OBJECT_GONE


@contextmanager
def answering(
    monkeypatch: pytest.MonkeyPatch, status: int, headers: Mapping[str, str], body: bytes
) -> Iterator[S3Store]:
    """A bucket of a server that says this to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "test")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield S3Store("s3://b", StorageSettings(endpoint_url=f"http://127.0.0.1:{server.server_address[1]}"))
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_ignores_ranges_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer begins with the first byte of the object, and has as many as were asked for, or more."""
    with (
        answering(monkeypatch, 200, {"ETag": '"e"'}, bytes(range(100))) as store,
        pytest.raises(TransientJobError, match="with another range"),
    ):
        store.read_range("k", "e", 50, 53)


@pytest.mark.parametrize(
    ("code", "reason", "told"),
    [
        (
            "RequestTimeTooSkewed",
            Reason.STORAGE_UNAVAILABLE,
            "clocks of this machine and of the server are many minutes apart",
        ),
        ("AccessDenied", Reason.ACCESS_DENIED, "denied .*: grant s3:"),
    ],
)
def test_a_clock_that_is_off_is_not_taken_for_a_missing_right(
    monkeypatch: pytest.MonkeyPatch, code: str, reason: Reason, told: str
) -> None:
    """S3 answers both with 403."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    with answering(monkeypatch, 403, {"Content-Type": "application/xml"}, body) as store:
        with pytest.raises((PermanentJobError, TransientJobError), match=told) as refused:
            store.read("k", "e", 100)
        assert refused.value.reason is reason
        with pytest.raises(MaskwatchError, match=told):
            list(store.list_pages(""))


def test_reading_errors_have_reasons(tmp_path: Path) -> None:
    store = FileStore()
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    info = store.stat(key(path))
    with pytest.raises(PermanentJobError, match="MAX_OBJECT_BYTES") as large:
        store.read(info.key, info.etag, 4)
    assert large.value.reason is Reason.OBJECT_TOO_LARGE
    path.unlink()
    with pytest.raises(PermanentJobError) as gone:
        store.read(info.key, info.etag, 100)
    assert gone.value.reason is Reason.OBJECT_GONE


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for source in ("photos", "./photos/", str(tmp_path / "photos"), f"file://{tmp_path}/photos"):
        store, prefix = open_source(source, Settings())
        assert (store.bucket, prefix.rstrip("/")) == ("file://", key(tmp_path / "photos"))
    store, prefix = open_source("s3://footage/2026/", Settings())
    assert (store.bucket, prefix) == ("s3://footage", "2026/")
    assert split_uri("s3://footage") == ("s3://footage", "")
    for source, named in (("nowhere", "nowhere"), ("http://x/y", "expected s3://"), ("s3:///x", "names no bucket")):
        with pytest.raises(MaskwatchError, match=named):
            open_source(source, Settings())
