"""Backfills that are stopped, paused, taken up and cancelled; archives; the two lanes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import backfills
from common.database.sessions import engine
from common.domain import ArchivedError, JobRef, Lane, MaskwatchError, ObjectInfo
from common.messaging.queues import Queue, decode_refs, list_of, queue_length, redis_client
from common.settings import Settings, get_settings
from common.storage.opening import open_bucket
from common.storage.s3 import S3Store
from producer import listing, submit
from producer.dispatch import dispatch, reconcile
from producer.submit import BackfillReport, Restore
from tests.ledger_rows import claim, planned, register, register_many, rows, scalar, states, take
from tests.services import Bucket, locate, maskwatch
from workers.jobs.attempts import settle


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of three objects, so that a few are a listing of several."""
    monkeypatch.setattr(
        submit, "plan_pages", lambda objects, rules, batch=3: listing.plan_pages(objects, rules, batch=3)
    )


def fill(bucket: Bucket, count: int = 10, *, folders: int = 1) -> list[str]:
    """Put that many objects into so many folders; returns their keys."""
    keys = sorted(f"{number % folders}/{number:03}.jpg" for number in range(count))
    for key in keys:
        bucket.put(key, key.encode())
    return keys


def backfill(bucket: Bucket, **options: Any) -> BackfillReport:
    return submit.submit(get_settings(), bucket.uri, location_name="lobby", **options)


class StoppedError(Exception):
    """As if the process were killed here."""


def stop_after(batches: int) -> Callable[[BackfillReport], None]:
    def on_page(report: BackfillReport) -> None:
        if report.listed >= 3 * batches:
            raise StoppedError

    return on_page


# --- stopped and taken up ---------------------------------------------------------------------------------


def test_a_listing_that_was_stopped_goes_on_behind_its_cursor(
    session: Session, bucket: Bucket, listed: list[str]
) -> None:
    locate()
    fill(bucket)
    with pytest.raises(StoppedError):
        backfill(bucket, on_page=stop_after(2))
    assert scalar(session, "SELECT count(*) FROM jobs") == 6
    listed.clear()
    report = backfill(bucket)
    assert listed == ["", "0/005.jpg"], "the check of the time pattern, and then what was left"
    assert (report.resumed, report.listed, report.new, report.known) == (True, 10, 10, 0)
    assert scalar(session, "SELECT count(*) FROM backfills") == 1
    assert states(session) == {"pending": 10}
    assert scalar(session, "SELECT counts ->> 'listed' FROM backfills") == "10"
    # One that was listed to its end is not taken up: what came since is found.
    assert (backfill(bucket).id, backfill(bucket).resumed) == (2, False)


def test_another_question_is_another_backfill(session: Session, bucket: Bucket) -> None:
    locate("door")
    fill(bucket)
    with pytest.raises(StoppedError):
        backfill(bucket, on_page=stop_after(1))
    other = backfill(bucket, bounds=(datetime(2020, 1, 1, tzinfo=UTC), None))
    assert not other.resumed and backfill(bucket, camera_name="door").id != other.id
    assert backfill(bucket).resumed


def test_folders_are_listed_at_once_and_nothing_is_listed_twice(session: Session, bucket: Bucket) -> None:
    locate()
    keys = fill(bucket, 40, folders=10)
    bucket.put("beside.jpg", b"no folder's")
    bucket.put("zz.jpg", b"behind them all")
    with pytest.raises(StoppedError):
        backfill(bucket, threads=3, on_page=stop_after(4))
    report = backfill(bucket, threads=3)
    assert (report.listed, report.new) == (42, 42)
    assert [row.key for row in rows(session, 'SELECT key FROM media_objects ORDER BY key COLLATE "C"')] == sorted(
        [*keys, "beside.jpg", "zz.jpg"]
    )
    assert scalar(session, "SELECT count(*) FROM backfill_parts") == 10


def test_one_folder_that_holds_everything_is_divided_further_down(bucket: Bucket) -> None:
    for month in range(1, 5):
        bucket.put(f"2026/{month:02}/a.jpg", b"x")
    store = open_bucket(bucket.uri)
    assert listing.divide(store, "") == [
        ("", "2026/02/"),
        ("2026/02/", "2026/03/"),
        ("2026/03/", "2026/04/"),
        ("2026/04/", None),
    ]
    assert listing.divide(store, "2026/01/") == [("", None)]
    assert [info.key for info in listing.list_range(store, "", "2026/02/", "2026/03/")] == ["2026/02/a.jpg"]


def test_two_processes_do_not_list_the_same_backfill(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    with pytest.raises(StoppedError):
        backfill(bucket, on_page=stop_after(1))
    with backfills.listing(engine(), 1), pytest.raises(MaskwatchError, match="being listed by another process"):
        backfill(bucket)
    assert backfill(bucket).new == 10


def test_a_bucket_that_denies_listing_half_way_is_gone_on_with(
    session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate()
    fill(bucket)
    denied = True
    pages = S3Store.list_pages

    def list_pages(self: S3Store, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        for page in pages(self, prefix, start_after):
            yield page[:7] if denied else page
            if denied:
                raise MaskwatchError("listing is denied (AccessDenied): grant s3:ListBucket to these keys")

    monkeypatch.setattr(S3Store, "list_pages", list_pages)
    with pytest.raises(MaskwatchError, match="grant s3:ListBucket"):
        backfill(bucket)
    assert scalar(session, "SELECT count(*) FROM jobs") == 6, "whole batches"
    denied = False
    report = backfill(bucket)
    assert (report.resumed, report.new) == (True, 10)


# --- paused, resumed, cancelled ---------------------------------------------------------------------------


def test_a_paused_backfill_sends_nothing_and_lists_no_further(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)

    def pause(report: BackfillReport) -> None:
        if report.listed == 3:
            assert maskwatch("backfills", "pause", "1").returncode == 0

    with pytest.raises(MaskwatchError, match=r"is paused, nothing is lost.*backfills resume 1"):
        backfill(bucket, on_page=pause)
    reconcile(get_settings())
    assert dispatch(get_settings()) == 0
    with pytest.raises(MaskwatchError, match="is paused"):
        backfill(bucket)
    again = maskwatch("backfills", "pause", "1")
    assert again.returncode == 1 and "paused already" in again.stderr
    (shown,) = json.loads(maskwatch("backfills", "list", "--json").stdout)
    assert (shown["state"], shown["jobs"]) == ("paused", {"pending": 3})

    resumed = maskwatch("backfills", "resume", "1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["new"] == 10
    assert dispatch(get_settings()) == 10
    twice = maskwatch("backfills", "resume", "1")
    assert twice.returncode == 1 and "backfill 1 is not paused" in twice.stderr
    assert [row.action for row in rows(session, "SELECT action FROM operator_actions ORDER BY id")] == [
        "pause",
        "resume",
    ]


def test_other_footage_of_the_source_goes_on_beside_a_paused_backfill(session: Session, bucket: Bucket) -> None:
    locate("door")
    fill(bucket)
    backfill(bucket)
    session.execute(text("UPDATE backfills SET paused_at = clock_timestamp()"))
    session.execute(text("UPDATE jobs SET backfill_id = NULL WHERE id <= 2"))
    session.execute(text("UPDATE jobs SET alone = true WHERE id > 8"))
    session.commit()
    reconcile(get_settings())
    assert dispatch(get_settings()) == 2
    assert [row.id for row in rows(session, "SELECT id FROM jobs WHERE state = 'queued' ORDER BY id")] == [1, 2]


def test_a_cancelled_backfill_is_over_and_another_one_does_what_it_left(session: Session, bucket: Bucket) -> None:
    locate()
    fill(bucket)
    with pytest.raises(StoppedError):
        backfill(bucket, on_page=stop_after(2))
    refs = take(session, 2)
    session.commit()
    (job, other) = claim(session, refs)
    ledger.succeed(session, other, planned("x").observed_at)  # type: ignore[arg-type]
    session.commit()
    done = maskwatch("backfills", "cancel", "1")
    assert done.returncode == 0 and "5 job(s)" in done.stderr
    assert states(session) == {"cancelled": 5, "succeeded": 1}
    with pytest.raises(ledger.StaleJobError):
        ledger.succeed(session, job, planned("x").observed_at)  # type: ignore[arg-type]
    session.rollback()
    for command in ("pause", "resume"):
        refused = maskwatch("backfills", command, "1")
        assert refused.returncode == 1 and "was cancelled at" in refused.stderr
    nobody = maskwatch("backfills", "cancel", "7")
    assert nobody.returncode == 1 and "there is no backfill 7" in nobody.stderr

    report = backfill(bucket)
    assert (report.id, report.resumed, report.new, report.known) == (2, False, 9, 1)
    assert states(session) == {"pending": 9, "succeeded": 1}
    assert scalar(session, "SELECT count(*) FROM jobs WHERE backfill_id = 2") == 9


def test_a_job_cancelled_by_itself_stays_cancelled(session: Session, bucket: Bucket) -> None:
    """The control of the test above: it is the backfill's cancelling that another backfill takes back."""
    locate()
    fill(bucket, 3)
    backfill(bucket)
    ledger.cancel(session, [1, 2], by="Ada")
    session.commit()
    assert backfill(bucket).new == 0
    assert states(session) == {"cancelled": 2, "pending": 1}


# --- lanes ------------------------------------------------------------------------------------------------


def messages(lane: Lane) -> list[list[JobRef]]:
    """What waits in a lane, the next one first."""
    with redis_client() as client:
        found = client.lrange(list_of(Queue.MEDIA, lane), 0, -1)
    return [decode_refs(json.loads(base64.b64decode(json.loads(item)["body"]))[0][0]) for item in reversed(found)]


@pytest.fixture
def tight(configure: Callable[..., Settings]) -> Settings:
    """Four messages of one job per lane, and every other message of a busy live lane for backfills."""
    settings = configure(dispatch__queue_cap=4, worker__group_size=1, dispatch__backfill_share=0.5)
    reconcile(settings)
    return settings


def test_live_footage_has_a_lane_of_its_own(session: Session, tight: Settings) -> None:
    register_many(session, 10)
    assert dispatch(tight) == 4
    register(session, planned("live.jpg"), lane=Lane.LIVE)
    assert dispatch(tight) == 1, "however full the other lane is"
    assert [len(messages(lane)) for lane in Lane] == [1, 4]
    with redis_client() as client:
        assert queue_length(client, Queue.MEDIA) == 5


def test_backfills_go_on_beside_more_live_footage_than_can_be_done(session: Session, tight: Settings) -> None:
    register(session, *(planned(f"live{n}.jpg") for n in range(40)), lane=Lane.LIVE)
    register(session, *(planned(f"old{n}.jpg") for n in range(40)))
    lanes = dict(rows(session, "SELECT id, lane FROM jobs"))
    dispatch(tight)
    taken: list[int] = []
    with redis_client() as client:
        for _ in range(15):
            # Workers take two at a time, and never get down to the other lane.
            taken += [lanes[ref.id] for refs in messages(Lane.LIVE)[:2] for ref in refs]
            client.ltrim(Queue.MEDIA.value, 0, -3)
            dispatch(tight)
            assert queue_length(client, Queue.MEDIA, Lane.LIVE) <= 6, "bounded"
    assert taken.count(Lane.BACKFILL) > 3, taken
    assert taken.count(Lane.LIVE) > taken.count(Lane.BACKFILL)


def test_without_a_share_backfills_would_starve(session: Session, tight: Settings) -> None:
    """The control of the test above."""
    tight.dispatch.backfill_share = 1e-9
    register(session, *(planned(f"live{n}.jpg") for n in range(40)), lane=Lane.LIVE)
    register(session, *(planned(f"old{n}.jpg") for n in range(40)))
    dispatch(tight)
    with redis_client() as client:
        for _ in range(10):
            client.ltrim(Queue.MEDIA.value, 0, -3)
            dispatch(tight)
    queued = rows(session, "SELECT count(*) AS count FROM jobs WHERE state <> 'pending' AND lane = 1")
    assert queued[0].count == 4, "those of its own lane, which nobody takes"


# --- archives ---------------------------------------------------------------------------------------------


def put_archived(bucket: Bucket, key: str, storage_class: str = "GLACIER") -> None:
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"frozen", StorageClass=storage_class)


def read(session: Session, key: str = "a.jpg") -> None:
    """One attempt at the pending job, as a worker makes it."""
    (job,) = claim(session, taken(session))
    settle(job, lambda: read_whole(job.bucket, job.key, job.etag), get_settings())


def read_whole(bucket: str, key: str, etag: str) -> None:
    open_bucket(bucket).read(key, etag, 1000)


def taken(session: Session) -> list[JobRef]:
    ledger.wake_retries(session, limit=100)
    found = take(session, 9)
    session.commit()
    return found


def test_what_lies_in_an_archive_is_counted_and_left(session: Session, bucket: Bucket) -> None:
    locate()
    bucket.put("now.jpg", b"at hand")
    put_archived(bucket, "a.jpg")
    put_archived(bucket, "b.jpg", "DEEP_ARCHIVE")
    put_archived(bucket, "c.jpg", "GLACIER_IR")  # can be read at once
    done = maskwatch("backfill", bucket.uri, "--location", "lobby")
    assert done.returncode == 0 and "2 are archived in S3; to restore them: --restore" in done.stderr
    assert states(session) == {"pending": 2, "quarantined": 2}
    (row, _) = rows(session, "SELECT reason, detail FROM jobs WHERE state = 'quarantined' ORDER BY id")
    assert row.reason == "archived" and "GLACIER" in row.detail and "--restore" in row.detail
    assert [row[0] for row in rows(session, "SELECT storage_class FROM media_objects ORDER BY key")] == [
        "GLACIER",
        "DEEP_ARCHIVE",
        "GLACIER_IR",
        None,
    ]


def test_a_restored_object_is_analysed_when_it_is_back(
    session: Session, bucket: Bucket, configure: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(storage__restore_check_seconds=0.01)
    locate()
    put_archived(bucket, "a.jpg")
    arrived = False
    whole = S3Store.read

    def slow(self: S3Store, key: str, etag: str, max_bytes: int) -> bytes:
        # The server here restores at once.
        if not arrived:
            raise ArchivedError(f"{key} lies in an archive and is not restored")
        return whole(self, key, etag, max_bytes)

    monkeypatch.setattr(S3Store, "read", slow)
    report = backfill(bucket, restore=Restore("Bulk", 3))
    assert (report.archived, report.restoring, states(session)) == (1, 1, {"retry_wait": 1})
    assert 'ongoing-request="false"' in bucket.client.head_object(Bucket=bucket.name, Key="a.jpg")["Restore"]
    for _ in range(3):
        session.execute(text("SELECT pg_sleep(0.02)"))
        read(session)
        assert states(session) == {"retry_wait": 1}
    assert rows(session, "SELECT failures, crashes, reason FROM jobs") == [(0, 0, "archived")]
    arrived = True
    session.execute(text("SELECT pg_sleep(0.02)"))
    (job,) = claim(session, taken(session))
    read_whole(job.bucket, job.key, job.etag)


def test_an_object_that_does_not_come_back_is_quarantined(
    session: Session, bucket: Bucket, configure: Callable[..., Settings]
) -> None:
    settings = configure(storage__restore_check_seconds=0.01, storage__restore_wait_seconds=0.01)
    locate()
    put_archived(bucket, "a.jpg")
    backfill(bucket)
    # Asked for and forgotten: the server here would have it back at once.
    ledger.restore_requested(session, bucket.uri, ["a.jpg"], check_seconds=0.01)
    session.commit()
    session.execute(text("SELECT pg_sleep(0.1)"))
    read(session)
    (row,) = rows(session, "SELECT state, reason, detail FROM jobs")
    assert (row.state, row.reason) == ("quarantined", "archived") and "has not ended in time" in row.detail
    assert settings.storage.restore_wait_seconds < 1


def test_what_others_have_restored_is_found_by_the_next_backfill(
    session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate()
    put_archived(bucket, "a.jpg")
    backfill(bucket)
    assert states(session) == {"quarantined": 1}
    assert backfill(bucket).new == 0
    listed = S3Store._listed

    def with_status(self: S3Store, entry: Any) -> ObjectInfo:
        # S3 tells it where a listing asks; the server here doesn't.
        until = {"IsRestoreInProgress": False, "RestoreExpiryDate": datetime(2030, 1, 1, tzinfo=UTC)}
        return listed(self, {**entry, "RestoreStatus": until})

    monkeypatch.setattr(S3Store, "_listed", with_status)
    assert backfill(bucket).new == 1
    assert states(session) == {"pending": 1}


# --- what else an archive holds ---------------------------------------------------------------------------


def test_the_same_bytes_under_several_keys_are_told(session: Session, bucket: Bucket) -> None:
    locate()
    for key in ("a.jpg", "b.jpg", "c.jpg"):
        bucket.put(key, b"the same")
    bucket.put("d.jpg", b"another")
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--json")
    assert json.loads(done.stdout)["same_bytes"] == 2
    assert states(session) == {"pending": 4}, "each is footage of its own"


def test_of_a_versioned_bucket_the_current_versions_are_analysed(session: Session, bucket: Bucket) -> None:
    locate()
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"})
    for content in (b"old", b"new"):
        bucket.put("a.jpg", content)
    bucket.put("gone.jpg", b"x")
    bucket.client.delete_object(Bucket=bucket.name, Key="gone.jpg")
    assert backfill(bucket).listed == 1
    etag = bucket.client.head_object(Bucket=bucket.name, Key="a.jpg")["ETag"].strip('"')
    assert scalar(session, "SELECT etag FROM media_objects") == etag


@pytest.mark.parametrize(("pays", "sent"), [(False, None), (True, b"requester")])
def test_who_reads_a_bucket_of_others_can_pay_for_it(
    bucket: Bucket, configure: Callable[..., Settings], pays: bool, sent: bytes | None
) -> None:
    bucket.put("a.jpg", b"x")
    store = S3Store(bucket.uri, configure(storage__requester_pays=pays).storage)
    payers: list[bytes | None] = []
    store._client.meta.events.register(
        "before-send.s3", lambda request, **_: payers.append(request.headers.get("x-amz-request-payer"))
    )
    (info,) = next(store.list_pages(""))
    store.list_folders("", 10)
    store.stat("a.jpg")
    store.read("a.jpg", info.etag, 10)
    store.read_range("a.jpg", info.etag, 0, 1)
    assert payers == [sent] * 5


def test_a_pattern_that_puts_footage_into_the_future_is_refused(session: Session, bucket: Bucket) -> None:
    locate()
    bucket.put("2091-03-01.jpg", b"x")
    with pytest.raises(MaskwatchError, match=r"gives none of the first 1 .* '2091-03-01.jpg' .*2091-03-01.*modified"):
        backfill(bucket, time_pattern="%Y-%m-%d.jpg")
    assert scalar(session, "SELECT count(*) FROM backfills") == 0
    bucket.put("2021-03-01.jpg", b"x")
    report = backfill(bucket, time_pattern="%Y-%m-%d.jpg")
    assert (report.new, report.quarantined) == (2, 1)
    assert scalar(session, "SELECT reason FROM jobs WHERE state = 'quarantined'") == "future_time"


def test_a_location_can_not_be_taken_away_under_a_backfill(session: Session, bucket: Bucket) -> None:
    """No command removes a location, and a DELETE in SQL is refused with the name of the constraint."""
    locate()
    fill(bucket, 30, folders=3)
    with pytest.raises(StoppedError):
        backfill(bucket, on_page=stop_after(1))
    with pytest.raises(IntegrityError, match=r"backfills.*location"):
        session.execute(text("DELETE FROM locations"))
    session.rollback()
    backfill(bucket)
    assert scalar(session, "SELECT count(*) FROM jobs") == 30
    assert "remove" not in maskwatch("locations", "--help").stdout
