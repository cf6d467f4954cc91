"""Bad input: each kind says what was wrong and what to do, ends in the ledger with its reason, and the rest
goes on."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from sqlalchemy.orm import Session

from common.settings import get_settings
from producer import dispatch
from tests.faults import faulty_s3
from tests.ledger_rows import rows, scalar, states, take
from tests.photos import empty_jpeg, face_jpeg, jpeg, portrait
from tests.services import Bucket, Services, forget_settings, locate, maskwatch
from workers.jobs.run import run_jobs


def work_off() -> None:
    """Dispatch, and do in this process what a worker would do, until nothing is pending."""
    settings = get_settings()
    dispatch.reconcile(settings)
    from common import ledger
    from common.database.sessions import session_scope

    while True:
        with session_scope() as session:
            ledger.wake_retries(session, limit=100)
            jobs = [ref for isolated in (True, False) for ref in take(session, 50, isolated=isolated)]
        if not jobs:
            return
        run_jobs(jobs, worker="test/1", settings=settings)


def reasons(session: Session) -> dict[str, tuple[str, str | None]]:
    """Key → (state, reason) of every job."""
    query = "SELECT m.key, j.state, j.reason FROM jobs j JOIN media_objects m ON m.id = j.media_object_id"
    return {row.key: (row.state, row.reason) for row in rows(session, query)}


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes can't hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_images_end_in_the_ledger_and_the_rest_goes_on(
    services: Services, session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWATCH_STORAGE__MAX_OBJECT_BYTES", "200000")
    forget_settings()
    locate()
    whole = face_jpeg()
    objects = {
        "good-1.jpg": whole,
        "empty.jpg": b"",
        "text.jpg": b"this is no picture\n" * 20,
        "page.png": b"<!doctype html><title>404</title>",
        "truncated.jpg": whole[: len(whole) // 2],
        "claims.png": png_that_claims(100_000, 100_000),
        "large.bmp": b"BM" + b"\0" * 300_000,
        "really-a-png.jpg": png(),
        "good-2.jpg": empty_jpeg(),
    }
    for key, content in objects.items():
        bucket.put(key, content)
    bucket.put("notes.txt", b"no picture, and none by its name")
    done = maskwatch("backfill", bucket.uri, "--location", "lobby")
    assert done.returncode == 0 and "notes.txt" in done.stderr
    work_off()
    assert reasons(session) == {
        "good-1.jpg": ("succeeded", None),
        "good-2.jpg": ("succeeded", None),
        "really-a-png.jpg": ("succeeded", None),  # its content decides what a file is, not its name
        "empty.jpg": ("quarantined", "empty_file"),
        "text.jpg": ("quarantined", "unreadable_image"),
        "page.png": ("quarantined", "unreadable_image"),
        "truncated.jpg": ("quarantined", "truncated_image"),
        "claims.png": ("quarantined", "image_too_large"),
        "large.bmp": ("quarantined", "object_too_large"),
    }
    details = [row.detail for row in rows(session, "SELECT detail FROM jobs WHERE state = 'quarantined'")]
    assert all(bucket.uri in detail and "\n" not in detail for detail in details)
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 3
    listed = json.loads(maskwatch("jobs", "list", "--state", "quarantined", "--json").stdout)
    assert {entry["reason"] for entry in listed} >= {"empty_file", "truncated_image", "image_too_large"}
    # What was put right is a new version, and is analysed.
    bucket.put("truncated.jpg", whole)
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    work_off()
    assert scalar(session, "SELECT count(*) FROM jobs WHERE state = 'succeeded'") == 4


@pytest.mark.parametrize("allowed", [1, 2])
def test_a_image_of_more_faces_than_allowed_is_named(
    services: Services, session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    monkeypatch.setenv("MASKWATCH_WORKER__MAX_FACES", str(allowed))
    forget_settings()
    locate()
    pair = Image.new("RGB", (512, 256))
    for left in (0, 256):
        pair.paste(portrait(256), (left, 0))
    bucket.put("pair.jpg", jpeg(pair))
    bucket.put("one.jpg", face_jpeg())
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    work_off()
    succeeded = ("succeeded", None)
    assert reasons(session) == {
        "one.jpg": succeeded,
        "pair.jpg": ("quarantined", "image_too_large") if allowed == 1 else succeeded,
    }
    assert scalar(session, "SELECT count(*) FROM faces") == (1 if allowed == 1 else 3)
    if allowed == 1:
        detail = scalar(session, "SELECT detail FROM jobs WHERE state = 'quarantined'")
        assert "2 faces" in detail and "MASKWATCH_WORKER__MAX_FACES" in detail


def png() -> bytes:
    import io

    buffer = io.BytesIO()
    portrait(128).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_missing_bucket(services: Services, session: Session) -> None:
    locate()
    done = maskwatch("backfill", "s3://no-such-bucket/2026/", "--location", "lobby")
    assert done.returncode == 1
    assert done.stderr == (
        "error: the bucket of s3://no-such-bucket/2026/ does not exist; check the name and the endpoint\n"
    )
    assert scalar(session, "SELECT count(*) FROM backfills") == scalar(session, "SELECT count(*) FROM jobs") == 0


def test_denied_vanished_and_throttled_keys(
    services: Services, session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWATCH_LEDGER__RETRY_BASE_SECONDS", "0.01")
    for key in ("fine.jpg", "secret.jpg", "gone.jpg", "busy.jpg"):
        bucket.put(key, face_jpeg())
    faults = {"secret.jpg": 403, "gone.jpg": 404, "busy.jpg": 503}
    with faulty_s3(services.endpoints.s3_endpoint_url, faults) as url:
        monkeypatch.setenv("MASKWATCH_STORAGE__ENDPOINT_URL", url)
        forget_settings()
        locate()
        assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
        # One round: what is throttled waits.
        refs = _dispatch_by_hand(session)
        run_jobs(refs, worker="test/1", settings=get_settings())
        assert reasons(session) == {
            "fine.jpg": ("succeeded", None),
            "secret.jpg": ("quarantined", "access_denied"),
            "gone.jpg": ("quarantined", "object_gone"),
            "busy.jpg": ("retry_wait", "storage_unavailable"),
        }
        detail = scalar(session, "SELECT detail FROM jobs WHERE reason = 'access_denied'")
        assert f"{bucket.uri}/secret.jpg" in detail and "s3:GetObject" in detail
        # The grant comes, the throttling ends; an operator asks for the rest.
        faults.clear()
        (denied,) = [row.id for row in rows(session, "SELECT id FROM jobs WHERE reason = 'access_denied'")]
        assert maskwatch("jobs", "retry", str(denied)).returncode == 0
        session.execute(_due_now())
        session.commit()
        work_off()
    found = reasons(session)
    assert found["secret.jpg"] == found["busy.jpg"] == ("succeeded", None)
    assert found["gone.jpg"] == ("quarantined", "object_gone")


def _dispatch_by_hand(session: Session) -> list:  # type: ignore[type-arg]
    from tests.ledger_rows import dispatch as take

    session.rollback()
    return take(session)


def _due_now():  # type: ignore[no-untyped-def]
    from sqlalchemy import text

    return text("UPDATE jobs SET next_run_at = clock_timestamp() WHERE state = 'retry_wait'")


def test_an_object_that_changed_after_planning(services: Services, session: Session, bucket: Bucket) -> None:
    locate()
    bucket.put("a.jpg", face_jpeg(1))
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    bucket.put("a.jpg", face_jpeg(2))
    work_off()
    found = rows(session, "SELECT state, reason FROM jobs ORDER BY id")
    assert found == [("source_changed", "source_changed"), ("succeeded", None)]
    etags = rows(session, "SELECT etag, superseded_at IS NULL AS current FROM media_objects ORDER BY id")
    assert [row.current for row in etags] == [False, True] and etags[0].etag != etags[1].etag
    assert scalar(session, "SELECT count(DISTINCT job_id) FROM faces") == 1


def test_an_unknown_location_and_time_zone(services: Services, session: Session, bucket: Bucket) -> None:
    bucket.put("a.jpg", face_jpeg())
    done = maskwatch("backfill", bucket.uri, "--location", "loby")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "unknown location 'loby'" in done.stderr and "maskwatch locations add loby" in done.stderr
    done = maskwatch("locations", "add", "lobby", "--time-zone", "Berlin")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Europe/Berlin" in done.stderr
    locate(zone="Europe/Berlin")
    done = maskwatch("locations", "add", "lobby", "--time-zone", "UTC")
    assert done.returncode == 1 and "already registered in the time zone Europe/Berlin" in done.stderr
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--camera", "dor")
    assert done.returncode == 1 and "maskwatch cameras add dor --location lobby" in done.stderr
    assert scalar(session, "SELECT count(*) FROM jobs") == 0


def test_a_time_pattern_that_matches_nothing_enqueues_nothing(
    services: Services, session: Session, bucket: Bucket
) -> None:
    locate()
    bucket.put("2026-03-01.jpg", face_jpeg())
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--time-pattern", "%Y/%m/%d.jpg")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "matches none of the first 1 pictures" in done.stderr and "2026-03-01.jpg" in done.stderr
    assert scalar(session, "SELECT count(*) FROM jobs") == scalar(session, "SELECT count(*) FROM backfills") == 0


def test_keys_that_a_time_pattern_does_not_fit(services: Services, session: Session, bucket: Bucket) -> None:
    locate(zone="Europe/Berlin")
    for key in ("2026/03/01/08-00.jpg", "2026/03/29/02-30.jpg", "latest.jpg"):
        bucket.put(key, face_jpeg())
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--time-pattern", "%Y/%m/%d/%H-%M.jpg")
    assert done.returncode == 0 and "2 have no time" in done.stderr
    work_off()
    assert reasons(session) == {
        "2026/03/01/08-00.jpg": ("succeeded", None),
        "2026/03/29/02-30.jpg": ("quarantined", "nonexistent_local_time"),
        "latest.jpg": ("quarantined", "time_pattern_mismatch"),
    }
    # A pattern that fits gives them their second chance; what has succeeded stays as it is.
    again = maskwatch("backfill", bucket.uri, "--location", "lobby", "--time-pattern", "%Y/%m/%d/*.jpg")
    assert again.returncode == 0
    work_off()
    assert reasons(session)["2026/03/29/02-30.jpg"] == ("succeeded", None)
    assert scalar(session, "SELECT count(*) FROM frame_counts") == 2


def test_since_and_until_go_by_the_pattern(services: Services, session: Session, bucket: Bucket) -> None:
    locate(zone="Europe/Berlin")
    for day in (1, 2, 3):
        bucket.put(f"2026-03-0{day}.jpg", face_jpeg(day))
    command = ("backfill", bucket.uri, "--location", "lobby", "--time-pattern", "%Y-%m-%d.jpg", "--json")
    done = maskwatch(*command, "--since", "2026-03-02T00:00+01:00", "--until", "2026-03-03T00:00+01:00")
    assert json.loads(done.stdout)["outside_range"] == 2
    assert set(reasons(session)) == {"2026-03-02.jpg"}
    done = maskwatch(*command, "--since", "yesterday")
    assert done.returncode == 1 and "'yesterday' is not a time" in done.stderr and done.stderr.count("\n") == 1


def test_exif_time_is_taken_with_its_offset(services: Services, session: Session, bucket: Bucket) -> None:
    locate(zone="Asia/Kolkata")
    for key, tags in (
        ("offset.jpg", {0x9003: "2021:06:01 10:00:00", 0x9011: "+02:00"}),
        ("naive.jpg", {0x9003: "2021:06:01 10:00:00"}),
        ("nonsense.jpg", {0x9003: "0000:00:00 00:00:00"}),
    ):
        exif = Image.Exif()
        exif.get_ifd(0x8769).update(tags)
        bucket.put(key, jpeg(portrait(128), exif=exif))
    assert maskwatch("backfill", bucket.uri, "--location", "lobby").returncode == 0
    work_off()
    found = {
        row.key: (str(row.observed_at), row.observed_at_source)
        for row in rows(session, "SELECT key, observed_at, observed_at_source FROM media_objects")
    }
    assert found["offset.jpg"] == ("2021-06-01 08:00:00+00:00", "exif")
    assert found["naive.jpg"] == ("2021-06-01 04:30:00+00:00", "exif")
    assert found["nonsense.jpg"][1] == "last_modified"


def test_a_database_that_is_down(services: Services, tmp_path: Path) -> None:
    url = f"postgresql+psycopg://u:s3cret@/maskwatch?host={tmp_path}"
    done = maskwatch("status", env={"MASKWATCH_DATABASE__URL": url})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the database does not answer" in done.stderr and "s3cret" not in done.stderr
    doctor = maskwatch("doctor", env={"MASKWATCH_DATABASE__URL": url})
    assert doctor.returncode == 1 and "PROBLEM" in doctor.stdout and "s3cret" not in doctor.stdout


def test_redis_that_is_down_loses_nothing(services: Services, session: Session, bucket: Bucket, tmp_path: Path) -> None:
    locate()
    bucket.put("a.jpg", face_jpeg())
    down = {"MASKWATCH_BROKER__URL": f"redis+socket://{tmp_path}/none.sock?virtual_host=0"}
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", env=down)
    assert done.returncode == 0 and "the broker does not answer" in done.stderr
    assert states(session) == {"pending": 1}
    done = maskwatch("status", env=down)
    assert done.returncode == 1 and "the broker does not answer" in done.stderr and "pending" in done.stdout
    work_off()
    assert states(session) == {"succeeded": 1}


def test_one_half_of_a_configuration_is_refused(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKWATCH_DATABASE__URL")
    for command in (("status",), ("summary",), ("locations", "list")):
        done = maskwatch(*command)
        assert done.returncode == 1 and done.stdout == ""
        assert "MASKWATCH_BROKER__URL is set and MASKWATCH_DATABASE__URL is not: set both" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_database_alone_will_do_for_those_who_only_read(
    services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    locate()
    monkeypatch.delenv("MASKWATCH_BROKER__URL")
    # Where an embedded stack would leave its state, were one started in place of the configured database.
    monkeypatch.setenv("MASKWATCH_STATE_DIR", str(tmp_path / "state"))
    listed = maskwatch("locations", "list")
    assert listed.returncode == 0 and "lobby" in listed.stdout
    assert maskwatch("summary").returncode == 0
    assert not (tmp_path / "state").exists()


def test_jobs_that_are_not_there_or_not_in_quarantine(services: Services, session: Session) -> None:
    done = maskwatch("jobs", "show", "99")
    assert done.returncode == 1 and "there is no job 99" in done.stderr
    done = maskwatch("jobs", "retry", "99")
    assert done.returncode == 1 and "not in quarantine" in done.stderr
    done = maskwatch("jobs", "retry")
    assert done.returncode == 1 and "--all" in done.stderr
