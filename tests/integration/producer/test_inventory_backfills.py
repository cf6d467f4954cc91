"""Backfills that read an S3 Inventory: stopped and taken up, what has changed since, bad input, dry runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.database.tables import Base
from common.domain import MaskwatchError
from common.settings import get_settings
from common.storage.opening import open_bucket
from producer import estimate, listing, submit
from producer.submit import BackfillReport, Restore
from tests import inventories
from tests.inventories import DELIVERY, VERSIONED, csv_file, data_file, deliver, rows_of
from tests.ledger_rows import claim, rows, scalar, states, take
from tests.services import Bucket, kill_tree, locate, maskwatch, wait_until
from workers.jobs.attempts import settle

LAYOUTS = ("CSV", "Parquet")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three objects, so that a few are an inventory of several."""
    monkeypatch.setattr(
        submit, "plan_pages", lambda objects, rules, batch=3: listing.plan_pages(objects, rules, batch=3)
    )


def fill(bucket: Bucket, count: int = 10) -> list[str]:
    """Put that many pictures into a bucket, and others beside them; returns the pictures' keys."""
    keys = [f"cam 1/{number:03}+.jpg" for number in range(count)]
    for key in keys:
        bucket.put(key, key.encode())
        bucket.put(key.replace("cam 1", "cam 2"), b"another folder's")
    bucket.put("cam 1/notes.txt", b"-")
    return keys


def mixed(bucket: Bucket) -> list[dict[str, Any]]:
    """Rows of a bucket in no order of keys: its two folders take turns."""
    found = rows_of(bucket)
    half = len(found) // 2
    return [row for pair in zip(found[:half], found[half:], strict=False) for row in pair] + found[2 * half :]


def backfill(bucket: Bucket, manifest: str | None, **options: Any) -> BackfillReport:
    source = f"{bucket.uri}/cam 1/"
    return submit.submit(get_settings(), source, location_name="lobby", inventory_uri=manifest, **options)


def content_of(bucket: Bucket, key: str) -> bytes:
    content: bytes = bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    return content


def keys_of(session: Session) -> list[str]:
    """Of the jobs there are."""
    query = 'SELECT m.key FROM jobs j JOIN media_objects m ON m.id = j.media_object_id ORDER BY m.key COLLATE "C"'
    return [row.key for row in rows(session, query)]


class StoppedError(Exception):
    """As if the process were killed here."""


def stop_after(batches: int) -> Callable[[BackfillReport], None]:
    def on_page(report: BackfillReport) -> None:
        if report.listed >= 3 * batches:
            raise StoppedError

    return on_page


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inventory_says_what_a_listing_says(session: Session, bucket: Bucket, layout: str) -> None:
    locate()
    keys = fill(bucket)
    _, manifest = deliver(bucket, [mixed(bucket)], layout=layout)
    report = backfill(bucket, manifest)
    assert (report.listed, report.new, report.others, report.inventory) == (11, 10, 1, manifest)
    assert keys_of(session) == keys
    by_inventory = rows(session, "SELECT key, etag, size_bytes, last_modified, storage_class FROM media_objects")
    listed = backfill(bucket, None)
    assert (listed.new, listed.known, listed.inventory) == (0, 10, None)
    session.execute(text("TRUNCATE media_objects CASCADE"))
    session.commit()
    backfill(bucket, None)
    by_listing = rows(session, "SELECT key, etag, size_bytes, last_modified, storage_class FROM media_objects")
    assert sorted(by_inventory) == sorted(by_listing)


# --- stopped and taken up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inventory_that_was_stopped_goes_on_behind_its_cursor(session: Session, bucket: Bucket, layout: str) -> None:
    locate()
    keys = fill(bucket)
    in_file = mixed(bucket)
    _, manifest = deliver(bucket, [in_file], layout=layout)
    with pytest.raises(StoppedError):
        backfill(bucket, manifest, on_page=stop_after(2))
    ours = [place for place, row in enumerate(in_file, 1) if row["Key"].startswith("cam 1/")]
    assert scalar(session, "SELECT cursor FROM backfill_parts") == str(ours[5]), "rows, those of others included"
    # The control of what follows: the rows are in no order that a key could be a cursor of.
    registered = scalar(session, "SELECT max(key) FROM media_objects")
    assert registered != keys[5]

    report = backfill(bucket, manifest)
    assert (report.resumed, report.listed, report.new, report.known, report.others) == (True, 11, 10, 0, 1)
    assert keys_of(session) == keys, "each once"
    assert scalar(session, "SELECT counts ->> 'listed' FROM backfills") == "11"
    assert scalar(session, "SELECT count(*) FROM backfills") == 1
    assert not backfill(bucket, manifest).resumed, "it was read to its end"


def test_a_cursor_that_is_ahead_of_what_was_registered_loses_objects(session: Session, bucket: Bucket) -> None:
    """The control of the test above: it is the cursor that a part is taken up from."""
    locate()
    fill(bucket)
    _, manifest = deliver(bucket, [mixed(bucket)])
    with pytest.raises(StoppedError):
        backfill(bucket, manifest, on_page=stop_after(1))
    session.execute(text("UPDATE backfill_parts SET cursor = cursor::int + 6"))
    session.commit()
    assert backfill(bucket, manifest).new < 10


#: A reader that takes its time behind its first batch, so that a kill comes in the middle.
SLOWLY = """
import time
from common.cli import main
from producer import listing as discover, submit

def slowly(objects, rules, batch=3):
    for page in discover.plan_pages(objects, rules, batch=3):
        yield page
        time.sleep(0.2 if batch == 3 else 0)

submit.plan_pages = slowly
main()
"""


def test_a_process_that_is_killed_in_the_middle_of_a_file_loses_nothing(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 60)
    found = mixed(bucket)
    _, manifest = deliver(bucket, [found[:90], found[90:]], layout="Parquet")
    command = ["backfill", f"{bucket.uri}/cam 1/", "--location", "lobby", "--inventory", manifest, "--json"]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *command], env=os.environ, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: scalar(session, "SELECT count(*) FROM jobs") >= 6, what="the second batch")
    finally:
        kill_tree(process)
    assert 6 <= scalar(session, "SELECT count(*) FROM jobs") < 60, "it was killed too late"
    done = maskwatch(*command)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["resumed"], told["listed"], told["new"], told["inventory"]) == (True, 61, 60, manifest)
    assert keys_of(session) == keys


def test_data_files_are_read_at_once_and_nothing_is_read_twice(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 30)
    found = mixed(bucket)
    _, manifest = deliver(bucket, [found[start::5] for start in range(5)])
    with pytest.raises(StoppedError):
        backfill(bucket, manifest, threads=3, on_page=stop_after(3))
    report = backfill(bucket, manifest, threads=3)
    assert (report.listed, report.new, report.known) == (31, 30, 0)
    assert keys_of(session) == keys
    assert scalar(session, "SELECT count(DISTINCT manifest_file) FROM backfill_parts") == 5


def test_an_inventory_is_paused_and_resumed(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket)
    found = mixed(bucket)
    _, manifest = deliver(bucket, [found[:12], found[12:]])

    def pause(report: BackfillReport) -> None:
        if report.listed == 3:
            assert maskwatch("backfills", "pause", "1").returncode == 0

    with pytest.raises(MaskwatchError, match=r"is paused, nothing is lost.*backfills resume 1"):
        backfill(bucket, manifest, on_page=pause)
    (shown,) = json.loads(maskwatch("backfills", "list", "--json").stdout)
    assert (shown["state"], shown["source"]) == ("paused", manifest)
    resumed = maskwatch("backfills", "resume", "1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    told = json.loads(resumed.stdout)
    assert (told["new"], told["known"], told["inventory"]) == (10, 0, manifest)
    assert keys_of(session) == keys


def test_another_inventory_is_another_backfill(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    other, manifest = deliver(bucket, [mixed(bucket)])
    later = DELIVERY.replace("2026-11-01", "2026-11-02")
    other.client.copy_object(Bucket=other.name, Key=later, CopySource=f"{other.name}/{DELIVERY}")
    with pytest.raises(StoppedError):
        backfill(bucket, manifest, on_page=stop_after(1))
    reports = [backfill(bucket, each) for each in (None, f"{other.uri}/{later}", manifest)]
    assert [(report.id, report.resumed) for report in reports] == [(2, False), (3, False), (1, True)]
    assert scalar(session, "SELECT count(*) FROM jobs") == 10


def test_a_manifest_that_was_replaced_is_not_gone_on_with(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    other, manifest = deliver(bucket, [mixed(bucket)])
    with pytest.raises(StoppedError):
        backfill(bucket, manifest, on_page=stop_after(1))
    other.put("of/footage/daily/data/new", content_of(other, "of/footage/daily/data/0"))
    other.put(DELIVERY, content_of(other, DELIVERY).replace(b"daily/data/0", b"daily/data/new"))
    with pytest.raises(MaskwatchError, match=r"no longer names of/footage/daily/data/0: cancel the backfill"):
        backfill(bucket, manifest)


# --- what has changed since -------------------------------------------------------------------------------


def work(session: Session) -> None:
    """One attempt at every pending job, as a worker makes it, which finds something to do in what it read."""
    pending = take(session, 100)
    session.commit()
    for job in claim(session, pending):

        def attempt(job: ledger.ClaimedJob = job) -> None:
            open_bucket(job.bucket).read(job.key, job.etag, 1000)

        settle(job, attempt, get_settings())


def test_what_was_deleted_since_is_quarantined_as_gone_and_the_rest_goes_on(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 4)
    _, manifest = deliver(bucket, [rows_of(bucket)])
    bucket.client.delete_object(Bucket=bucket.name, Key=keys[1])
    assert backfill(bucket, manifest).new == 4
    work(session)
    found = rows(
        session,
        "SELECT m.key, j.state, j.reason FROM jobs j JOIN media_objects m ON m.id = j.media_object_id"
        " WHERE j.state = 'quarantined'",
    )
    assert found == [(keys[1], "quarantined", "object_gone")]
    assert states(session)["quarantined"] == 1 and sum(states(session).values()) == 4
    assert backfill(bucket, manifest).new == 0, "and the same inventory changes nothing"


def test_what_was_replaced_since_is_planned_anew_as_after_a_listing(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 2)
    _, manifest = deliver(bucket, [rows_of(bucket)])
    bucket.put(keys[0], b"another picture")
    assert backfill(bucket, manifest).new == 2
    work(session)
    found = rows(
        session,
        "SELECT j.state, m.superseded_at IS NULL AS current, j.backfill_id FROM jobs j"
        " JOIN media_objects m ON m.id = j.media_object_id WHERE m.key = :key ORDER BY j.id",
        key=keys[0],
    )
    assert found == [("source_changed", False, 1), ("pending", True, 1)]


def test_an_inventory_that_is_older_than_what_is_known_withdraws_nothing(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 2)
    in_file = rows_of(bucket)
    bucket.put(keys[0], b"another picture")
    # S3 counts in seconds: a picture that is replaced within one is as old as the one before it.
    for row in in_file:
        row["LastModifiedDate"] = row["LastModifiedDate"].replace(year=2025)
    _, manifest = deliver(bucket, [in_file])
    backfill(bucket, None)
    before = rows(session, "SELECT etag, superseded_at FROM media_objects ORDER BY id")
    report = backfill(bucket, manifest)
    assert (report.new, report.known, report.superseded) == (0, 2, 0)
    assert rows(session, "SELECT etag, superseded_at FROM media_objects ORDER BY id") == before


def test_earlier_versions_are_not_enqueued(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 3)
    current = [{**row, "IsLatest": True, "IsDeleteMarker": False} for row in rows_of(bucket)]
    earlier = [{**row, "IsLatest": False, "ETag": "f" * 32} for row in current]
    _, manifest = deliver(bucket, [[*earlier, *current, *earlier]], columns=VERSIONED)
    assert backfill(bucket, manifest).new == 3
    assert keys_of(session) == keys
    assert scalar(session, "SELECT count(*) FROM media_objects WHERE etag = :etag", etag="f" * 32) == 0


def test_what_lies_in_an_archive_is_counted_and_asked_for(session: Session, bucket: Bucket) -> None:
    locate()
    for key, storage_class in (("cam 1/a.jpg", "GLACIER"), ("cam 1/b.jpg", "STANDARD")):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"x", StorageClass=storage_class)
    _, manifest = deliver(bucket, [rows_of(bucket)])
    report = backfill(bucket, manifest)
    assert (report.new, report.archived, report.restoring) == (2, 1, 0)
    assert scalar(session, "SELECT reason FROM jobs WHERE state = 'quarantined'") == "archived"
    report = backfill(bucket, manifest, restore=Restore("Bulk", 7))
    assert (report.archived, report.restoring) == (1, 1)


# --- data files that are broken ---------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_a_data_file_that_is_broken_is_gone_on_with_once_it_is_put_right(
    session: Session, bucket: Bucket, threads: int
) -> None:
    locate()
    keys = fill(bucket)
    found = mixed(bucket)
    other, manifest = deliver(bucket, [found[:7], found[7:14], found[14:]])
    second = "of/footage/daily/data/1"
    good = data_file("CSV", found[7:14])
    other.put(second, good[: len(good) // 2])
    with pytest.raises(MaskwatchError, match=rf"{other.uri}/{second} is not the file that the manifest names.* MD5 is"):
        backfill(bucket, manifest, threads=threads)
    broken = "SELECT cursor FROM backfill_parts WHERE manifest_file = :file"
    assert scalar(session, broken, file=second) is None
    assert 0 < scalar(session, "SELECT count(*) FROM jobs") < 10
    other.put(second, good)
    report = backfill(bucket, manifest, threads=threads)
    assert (report.resumed, report.new, report.known) == (True, 10, 0)
    assert keys_of(session) == keys


def test_a_bad_row_stops_it_there_with_its_number(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    found = rows_of(bucket)[-10:]
    found[7]["Size"] = "many"
    other, manifest = deliver(bucket, [found])
    with pytest.raises(MaskwatchError, match=rf"^{other.uri}/of/footage/daily/data/0, row 8: the Size 'many' is no"):
        backfill(bucket, manifest)
    assert scalar(session, "SELECT count(*) FROM jobs") == 6, "whole batches before it"
    found[7]["Size"] = 7
    files = {"of/footage/daily/data/0": csv_file(found)}
    other.put("of/footage/daily/data/0", files["of/footage/daily/data/0"])
    other.put(DELIVERY, json.dumps(inventories.manifest(files, of=bucket.name, lies_in=other.name)).encode())
    report = backfill(bucket, manifest)
    assert (report.resumed, report.new, report.known) == (True, 10, 0)


# --- dry runs ---------------------------------------------------------------------------------------------


def everything(session: Session) -> dict[str, int]:
    return {table.name: scalar(session, f"SELECT count(*) FROM {table.name}") for table in Base.metadata.sorted_tables}


def test_a_dry_run_of_an_inventory_names_it_and_writes_nothing(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    bucket.put("cam 1/since.jpg", b"x")
    found = [row for row in mixed(bucket) if row["Key"] != "cam 1/since.jpg"]
    _, manifest = deliver(bucket, [found[:9], found[9:]])
    source = f"{bucket.uri}/cam 1/"
    before = everything(session)
    command = ("backfill", source, "--location", "lobby", "--dry-run", "--inventory", manifest)
    done = maskwatch(*command, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["inventory"], told["source"]) == (manifest, source)
    assert (told["listed"], told["images"], told["others"], told["known"]) == (11, 10, 1, 0)
    assert everything(session) == before
    shown = maskwatch(*command)
    assert shown.returncode == 0 and f"read from the inventory {manifest}" in " ".join(shown.stderr.split())
    listed = estimate.estimate(get_settings(), source, location_name="lobby")
    assert (listed.found.images, listed.inventory) == (11, None), "the control: a listing sees what came since"
    backfill(bucket, manifest)
    again = estimate.estimate(get_settings(), source, location_name="lobby", inventory_uri=manifest)
    assert (again.found.known, again.jobs) == (10, 0)


# --- bad input --------------------------------------------------------------------------------------------


def no_manifest(bucket: Bucket, other: Bucket) -> Sequence[str]:
    other.client.delete_object(Bucket=other.name, Key=DELIVERY)
    return "can't read the inventory's manifest", f"{DELIVERY} is gone", "manifest.json in the folder of a delivery"


def no_bucket(bucket: Bucket, other: Bucket) -> Sequence[str]:
    for entry in other.client.list_objects_v2(Bucket=other.name)["Contents"]:
        other.client.delete_object(Bucket=other.name, Key=entry["Key"])
    other.client.delete_bucket(Bucket=other.name)
    return "can't read the inventory's manifest", other.uri


def no_json(bucket: Bucket, other: Bucket) -> Sequence[str]:
    other.put(DELIVERY, b"<html>")
    return f"{DELIVERY} is not a manifest of an S3 Inventory", "Invalid JSON"


def no_inventory(bucket: Bucket, other: Bucket) -> Sequence[str]:
    other.put(DELIVERY, b'{"name": "maskwatch"}')
    return f"{DELIVERY} is not a manifest of an S3 Inventory", "sourceBucket Field required"


def another_bucket(bucket: Bucket, other: Bucket) -> Sequence[str]:
    content = content_of(other, DELIVERY)
    other.put(DELIVERY, content.replace(f'"{bucket.name}"'.encode(), b'"elsewhere"'))
    return "lists s3://elsewhere, but the SOURCE lies in", bucket.uri


def no_data_file(bucket: Bucket, other: Bucket) -> Sequence[str]:
    other.client.delete_object(Bucket=other.name, Key="of/footage/daily/data/0")
    return "can't read the inventory's data file", "data/0 is gone"


def no_columns(bucket: Bucket, other: Bucket) -> Sequence[str]:
    content = content_of(other, DELIVERY)
    other.put(DELIVERY, content.replace(b"ETag", b"ObjectOwner"))
    return "lacks ETag, which the ledger needs", "configuration"


@pytest.mark.parametrize(
    "fault", [no_manifest, no_bucket, no_json, no_inventory, another_bucket, no_data_file, no_columns]
)
def test_bad_input_is_one_sentence_and_leaves_no_trace(
    session: Session, bucket: Bucket, fault: Callable[[Bucket, Bucket], Sequence[str]]
) -> None:
    locate()
    fill(bucket, 2)
    other, manifest = deliver(bucket, [rows_of(bucket)])
    named = fault(bucket, other)
    for more in ((), ("--dry-run",)):
        done = maskwatch("backfill", f"{bucket.uri}/cam 1/", "--location", "lobby", "--inventory", manifest, *more)
        said = " ".join(done.stderr.split())
        assert done.returncode == 1 and said.startswith("error: ") and "Traceback" not in said
        assert all(words in said for words in named), said
    assert scalar(session, "SELECT count(*) FROM backfills") == 0


def test_a_prefix_that_no_row_lies_below(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket, 2)
    _, manifest = deliver(bucket, [rows_of(bucket)])
    done = maskwatch("backfill", f"{bucket.uri}/cam1/", "--location", "lobby", "--inventory", manifest)
    said = " ".join(done.stderr.split())
    assert done.returncode == 1 and f"is an object below {bucket.uri}/cam1/; check the prefix" in said
    assert scalar(session, "SELECT count(*) FROM backfills") == 0


def test_a_pattern_that_fits_nothing_is_refused(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    _, manifest = deliver(bucket, [mixed(bucket)])
    with pytest.raises(MaskwatchError, match="matches none of the first"):
        backfill(bucket, manifest, time_pattern="%Y-%m-%d.jpg")
    assert scalar(session, "SELECT count(*) FROM backfills") == 0


def test_gaps_and_an_inventory_exclude_each_other(bucket: Bucket) -> None:
    done = maskwatch(
        "backfill", "--gaps", "--location", "lobby", "--camera", "c", "--inventory", "s3://i/manifest.json"
    )
    assert done.returncode == 2 and "--inventory" in done.stderr


def test_a_missing_pyarrow_is_named_in_one_line(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket, 2)
    _, manifest = deliver(bucket, [rows_of(bucket)], layout="Parquet")
    code = "import sys; sys.modules['pyarrow'] = None; from common.cli import main; main()"
    command = ["backfill", f"{bucket.uri}/cam 1/", "--location", "lobby", "--inventory", manifest]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "error: this command needs pyarrow, which is not installed: pip install 'maskwatch[inventory]'"
    )
    assert scalar(session, "SELECT count(*) FROM backfills") == 0
