"""S3 Inventories: what their rows say of objects, and errors that name what is wrong."""

from __future__ import annotations

import errno
import gzip
import io
import json
import subprocess
import sys
import tempfile
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.domain import MaskwatchError, ObjectInfo
from common.settings import Settings
from common.storage.store import MAX_KEY_BYTES
from producer import inventory
from producer.inventory import Inventory, open_inventory
from tests.inventories import COLUMNS, NOON, VERSIONED, csv_file, data_file, deliver_to, parquet_file, row

LAYOUTS = ("CSV", "Parquet")

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda key: key[-1] != "/")


def opened(manifest: str, bucket: str = "s3://footage") -> Inventory:
    return open_inventory(manifest, bucket, Settings())


def objects(manifest: str, prefix: str = "") -> list[ObjectInfo | None]:
    return list(opened(manifest).objects(prefix))


# --- rows ---------------------------------------------------------------------------------------------------


@given(keys=st.lists(KEYS, min_size=1, max_size=5))
@example(keys=["a+b", "a b", "a%2Bb", "100%", "%", "a\nb", "a\r\nb.jpg", 'a"b,c', "Zürich/猫.jpg", "\U0001f637.png"])
@example(keys=["x" * MAX_KEY_BYTES])
def test_every_key_comes_back_as_it_was_and_both_formats_say_the_same(keys: list[str]) -> None:
    rows = [row(key, Size=n, ETag=f"{n:032x}") for n, key in enumerate(keys)]
    with tempfile.TemporaryDirectory() as folder:
        found = {
            layout: objects(deliver_to(Path(folder, layout), [data_file(layout, rows)], layout)) for layout in LAYOUTS
        }
    assert found["CSV"] == [ObjectInfo("s3://footage", key, f"{n:032x}", n, NOON, None) for n, key in enumerate(keys)]
    assert found["Parquet"] == found["CSV"]


def test_keys_in_csv_are_encoded_as_forms_are(tmp_path: Path) -> None:
    """Not by our own encoder: as S3 writes them."""
    line = b'"footage","a+folder/1%2B1%25.jpg","7","2026-03-02T12:00:00.123Z","e1","STANDARD"\n'
    (info,) = objects(deliver_to(tmp_path, [gzip.compress(line)]))
    assert info == ObjectInfo("s3://footage", "a folder/1+1%.jpg", "e1", 7, NOON)


def test_keys_in_parquet_are_not_encoded(tmp_path: Path) -> None:
    (info,) = objects(deliver_to(tmp_path, [parquet_file([row("a+b%2B.jpg")])], "Parquet"))
    assert info is not None and info.key == "a+b%2B.jpg"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (pa.timestamp("ns"), {"use_deprecated_int96_timestamps": True}),
        (pa.timestamp("ns"), {}),
        (pa.timestamp("us"), {}),
        (pa.timestamp("ms", "UTC"), {}),
        (pa.string(), {}),
    ],
    ids=str,
)
def test_times_of_parquet_are_instants_in_whatever_type(tmp_path: Path, kind: pa.DataType, options: Any) -> None:
    file = parquet_file([row("a.jpg")], times=kind, **options)
    (info,) = objects(deliver_to(tmp_path, [file], "Parquet"))
    assert info is not None and info.last_modified == NOON and info.last_modified.utcoffset() is not None


def test_a_time_finer_than_ours_is_cut(tmp_path: Path) -> None:
    file = parquet_file([row("a.jpg", LastModifiedDate=1_772_452_800_123_000_999)], times=pa.timestamp("ns"))
    (info,) = objects(deliver_to(tmp_path, [file], "Parquet"))
    assert info is not None and info.last_modified == NOON


def test_a_time_without_a_zone_is_one_of_utc(tmp_path: Path) -> None:
    line = b'"footage","a.jpg","7","2026-03-02T12:00:00","e1","STANDARD"\n'
    (info,) = objects(deliver_to(tmp_path, [gzip.compress(line)]))
    assert info is not None and info.last_modified == datetime(2026, 3, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_earlier_versions_and_delete_markers_are_no_objects(tmp_path: Path, layout: str) -> None:
    rows = [
        row("a.jpg", VersionId="3", IsLatest=True, IsDeleteMarker=False),
        row("a.jpg", VersionId="2", IsLatest=False, IsDeleteMarker=False, ETag="older"),
        row("b.jpg", VersionId="2", IsLatest=True, IsDeleteMarker=True, Size=None, ETag=None),
        row("b.jpg", VersionId="1", IsLatest=False, IsDeleteMarker=False),
    ]
    found = objects(deliver_to(tmp_path, [data_file(layout, rows, VERSIONED)], layout, VERSIONED))
    assert [info and (info.key, info.etag) for info in found] == [("a.jpg", "e1"), None, None, None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_lies_below_the_prefix_is_an_object_and_no_folder_is(tmp_path: Path, layout: str) -> None:
    keys = ["2025/a.jpg", "2026/", "2026/b.jpg", "2026/c/", "12026/d.jpg"]
    found = objects(deliver_to(tmp_path, [data_file(layout, [row(key) for key in keys])], layout), "2026/")
    assert [info and info.key for info in found] == [None, None, "2026/b.jpg", None, None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_storage_classes_are_told_as_a_listing_tells_them(tmp_path: Path, layout: str) -> None:
    classes = ["STANDARD", "GLACIER", "DEEP_ARCHIVE", "GLACIER_IR", None]
    rows = [row(f"{n}.jpg", StorageClass=name) for n, name in enumerate(classes)]
    found = [info for info in objects(deliver_to(tmp_path, [data_file(layout, rows)], layout)) if info]
    assert [info.storage_class for info in found] == [None, "GLACIER", "DEEP_ARCHIVE", "GLACIER_IR", None]
    assert [info.archived for info in found] == [False, True, True, False, False]
    without = [name for name in COLUMNS if name != "StorageClass"]
    found = [
        info for info in objects(deliver_to(tmp_path, [data_file(layout, rows, without)], layout, without)) if info
    ]
    assert [info.storage_class for info in found] == [None] * 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_file_is_gone_on_with_behind_any_row(tmp_path: Path, layout: str) -> None:
    rows = [row(f"{n % 2}/{n}.jpg") for n in range(9)]
    read = opened(deliver_to(tmp_path, [data_file(layout, rows)], layout))
    (file,) = read.files
    whole = list(read.objects_of(file, "1/"))
    assert [info and info.key for info in whole[:4]] == [None, "1/1.jpg", None, "1/3.jpg"]
    assert [list(read.objects_of(file, "1/", after=done)) for done in range(10)] == [whole[done:] for done in range(10)]


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    columns = ("ETag", "Size", "StorageClass", "Key", "Bucket", "LastModifiedDate")
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")], columns)], "CSV", columns)
    assert objects(path) == [ObjectInfo("s3://footage", "a.jpg", "e1", 7, NOON)]


# --- what it takes ------------------------------------------------------------------------------------------


def test_a_data_file_is_fetched_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_PIECE_BYTES", 7)
    path = deliver_to(tmp_path, [csv_file([row("a.jpg"), row("b.jpg")])])
    assert [info and info.key for info in objects(path)] == ["a.jpg", "b.jpg"]


def test_csv_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_PIECE_BYTES", 2**16)
    content = csv_file([row(f"{n:0200}.jpg") for n in range(20_000)])
    path = deliver_to(tmp_path, [content])
    assert len(gzip.decompress(content)) > 5 * 2**20
    read = opened(path)
    tracemalloc.start()
    try:
        assert sum(1 for info in read.objects("") if info) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_parquet_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_PIECE_BYTES", 2**16)
    rows = [row(f"{n:0200}.jpg") for n in range(50_000)]
    # One group of rows, and nothing that makes it smaller than its text.
    content = parquet_file(rows, use_dictionary=False, compression="none", row_group_size=len(rows))
    path = deliver_to(tmp_path, [content], "Parquet")
    assert len(content) > 10 * 2**20
    del content, rows
    read = opened(path)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        decoded = max(pa.total_allocated_bytes() - before for _ in read.objects(""))
        assert decoded + tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


def test_a_copy_is_gone_when_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = deliver_to(tmp_path / "delivered", [csv_file([row("a.jpg")])])
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    for _ in opened(path).objects(""):
        assert not list((tmp_path / "copies").iterdir()), "it has no name: a kill leaves nothing either"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = deliver_to(tmp_path, [csv_file([row("a.jpg")])])
    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(MaskwatchError, match=r"no room for a copy of file://.*/data/0 in .*: No space left.*TMPDIR"):
        objects(path)


def test_pyarrow_is_needed_for_parquet_alone_and_asked_for_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = deliver_to(tmp_path / "p", [b"nobody looks at it"], "Parquet")
    csv = deliver_to(tmp_path / "c", [csv_file([row("a.jpg")])])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    assert len(objects(csv)) == 1
    with pytest.raises(ModuleNotFoundError, match="pyarrow"):
        opened(parquet)


def test_who_reads_no_inventory_loads_no_pyarrow() -> None:
    code = "import producer.cli.backfill, producer.submit, producer.estimate, sys; print('pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- manifests that are none of ours ------------------------------------------------------------------------


def refused(manifest: str, *, bucket: str = "s3://footage") -> str:
    with pytest.raises(MaskwatchError) as error:
        list(opened(manifest, bucket).objects(""))
    return str(error.value)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    assert f"there is no folder or file {tmp_path}/manifest.json" in refused(f"{tmp_path}/manifest.json")
    assert "can't read the inventory's manifest: reading file://" in refused(str(tmp_path)), "a folder"


@pytest.mark.parametrize("content", ["", "[", "d41d8cd98f00b204e9800998ecf8427e", "[]", "{}", "\xff", "7"])
def test_a_manifest_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.checksum"
    path.write_text(content, encoding="latin-1")
    said = refused(str(path))
    assert said.startswith(f"file://{path} is not a manifest of an S3 Inventory (") and "manifest.json in" in said


def test_a_data_file_in_place_of_a_manifest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_MAX_MANIFEST_BYTES", 9)
    path = tmp_path / "0.csv.gz"
    path.write_bytes(b"0123456789")
    assert f"file://{path} has 10 bytes, too many for a manifest" in refused(str(path))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"files": [{"key": "x", "size": 1}]}, "files.0.MD5checksum"),
        ({"files": "x"}, "files"),
        ({"sourceBucket": 7}, "sourceBucket"),
        ({"fileSchema": None}, "fileSchema"),
    ],
)
def test_a_manifest_that_lacks_something_is_told_what(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    said = refused(deliver_to(tmp_path, [csv_file([row("a.jpg")])], **changed))
    assert f"is not a manifest of an S3 Inventory ({named} " in said


def test_an_inventory_of_another_bucket(tmp_path: Path) -> None:
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")])])
    said = refused(path, bucket="s3://other")
    assert said.endswith("lists s3://footage, but the SOURCE lies in s3://other; name an inventory of that bucket")


def test_an_inventory_for_a_folder(tmp_path: Path) -> None:
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")])])
    assert "--inventory needs a SOURCE in S3" in refused(path, bucket="file://")


def test_orc_is_refused_with_what_to_do(tmp_path: Path) -> None:
    said = refused(deliver_to(tmp_path, [b"ORC"], fileFormat="ORC"))
    assert "is written in ORC, which can't be read: set its configuration to Parquet or CSV" in said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("column", inventory.REQUIRED)
def test_a_column_that_is_missing_is_named(tmp_path: Path, layout: str, column: str) -> None:
    columns = [name for name in COLUMNS if name != column]
    said = refused(deliver_to(tmp_path, [data_file(layout, [row("a.jpg")], columns)], layout, columns))
    assert f" lacks {column}, which the ledger needs: include it in the inventory's configuration" in said


def test_no_row_below_the_prefix(tmp_path: Path) -> None:
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")]), csv_file([row("b.jpg")])])
    with pytest.raises(MaskwatchError, match=r"no row of the inventory file://.* below s3://footage/2026/; check"):
        objects(path, "2026/")
    assert len(objects(path, "b")) == 2, "one in the last file is enough"
    with pytest.raises(MaskwatchError, match="no row of the inventory"):
        objects(deliver_to(tmp_path / "empty", []))


# --- data files that are broken -----------------------------------------------------------------------------


def path_of(manifest: str, file: int = 0) -> Path:
    return Path(manifest).parents[1] / "data" / str(file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_file_that_is_not_the_one_meant_is_not_read(tmp_path: Path, layout: str) -> None:
    good = data_file(layout, [row("a.jpg")])
    path = deliver_to(tmp_path, [good], layout)
    for bad in (good[:-1], b"", data_file(layout, [row("b.jpg")])):
        path_of(path).write_bytes(bad)
        said = refused(path)
        assert f"file://{path_of(path)} is not the file that the manifest names" in said and "its MD5 is" in said
    path_of(path).write_bytes(good)
    assert len(objects(path)) == 1


def test_a_data_file_that_is_not_there(tmp_path: Path) -> None:
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")])])
    path_of(path).unlink()
    said = refused(path)
    assert said.startswith(f"can't read the inventory's data file: file://{path_of(path)} is gone; what was enqueued")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_data_file_that_is_broken_and_was_delivered_so(tmp_path: Path, layout: str) -> None:
    whole = data_file(layout, [row(f"{n}.jpg") for n in range(50)])
    for content in (b"not this format", whole[: len(whole) // 2]):
        path = deliver_to(tmp_path, [content], layout)
        said = refused(path)
        assert f"file://{path_of(path)}, row " in said and "use another delivery" in said


def lines(*lines: str) -> bytes:
    return gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)


GOOD = '"footage","a.jpg","7","2026-03-02T12:00:00.000Z","e1","STANDARD"'


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('"footage","b.jpg","7"', "3 columns, and the manifest names 6"),
        (GOOD + ',"more"', "7 columns, and the manifest names 6"),
        ("", "0 columns"),
        (GOOD.replace('"7"', '"many"'), "the Size 'many' is not a number of bytes"),
        (GOOD.replace('"7"', '""'), "the Size '' is not a number of bytes"),
        (GOOD.replace('"7"', '"-7"'), "the Size '-7' is not a number of bytes"),
        (GOOD.replace('"7"', f'"{2**63}"'), "is not a number of bytes"),
        (GOOD.replace("2026-03-02T", "yesterday"), "the LastModifiedDate 'yesterday12:00:00.000Z' is not a time"),
        (GOOD.replace('"e1"', '""'), "no ETag"),
        (GOOD.replace("a.jpg", ""), "no Key"),
        (GOOD.replace("a.jpg", "%ff.jpg"), "can't decode byte"),
        ('"footage"x', "expected"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, named: str) -> None:
    path = deliver_to(tmp_path, [lines(GOOD, line, GOOD)])
    said = refused(path)
    assert f"file://{path_of(path)}, row 2: " in said and named in said and "use another delivery" in said


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"Size": None}, "the Size None"),
        ({"ETag": None}, "no ETag"),
        ({"LastModifiedDate": None}, "Date None is not a t"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    path = deliver_to(tmp_path, [parquet_file([row("a.jpg"), row("b.jpg", **values)])], "Parquet")
    said = refused(path)
    assert f"file://{path_of(path)}, row 2: " in said and named in said


def test_rows_before_a_bad_one_are_read_and_it_has_its_own_number_when_gone_on_with(tmp_path: Path) -> None:
    read = opened(deliver_to(tmp_path, [lines(GOOD, GOOD, GOOD, "?")]))
    (file,) = read.files
    found = read.objects_of(file, "", after=2)
    assert next(found) is not None
    with pytest.raises(MaskwatchError, match="row 4: "):
        next(found)


def test_a_manifest_that_was_replaced_is_told(tmp_path: Path) -> None:
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")])])
    with pytest.raises(MaskwatchError, match=r"was replaced, and no longer names of/old: cancel the backfill"):
        next(opened(path).objects_of("of/old", ""))


def test_a_copy_of_a_delivery_lies_together_whatever_its_keys_say(tmp_path: Path) -> None:
    """As `aws s3 cp --recursive` of the configuration's folder leaves it."""
    path = deliver_to(tmp_path, [csv_file([row("a.jpg")])])
    moved = tmp_path / "here"
    Path(path).parents[1].rename(moved)
    (manifest,) = moved.glob("*/manifest.json")
    assert json.loads(manifest.read_text())["files"][0]["key"] == "of/footage/daily/data/0"
    assert len(objects(str(manifest))) == 1
