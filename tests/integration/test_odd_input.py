"""Odd names, settings and circumstances: one clear line or a reason in the ledger, never a traceback."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.database import partitions
from common.database.sessions import engine
from common.settings import get_settings
from producer import dispatch
from tests.ledger_rows import rows, scalar, states
from tests.photos import face_jpeg
from tests.services import Bucket, Services, locate, maskwatch, running


def backfill(source: str, *options: str) -> dict:  # type: ignore[type-arg]
    done = maskwatch("backfill", source, "--location", "lobby", "--json", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def test_file_names_that_the_ledger_cannot_hold_are_counted_and_named(
    services: Services, session: Session, tmp_path: Path
) -> None:
    locate()
    (tmp_path / "fine.jpg").write_bytes(face_jpeg())
    (tmp_path / 'it\'s "odd" %s; -- \n.jpg').write_bytes(face_jpeg(1))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(face_jpeg(2))
    deep = tmp_path
    for _ in range(12):
        deep = deep / ("d" * 200)
    # Deeper than a path may name at once, so made on the way down.
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(12):
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
        Path("long.jpg").write_bytes(face_jpeg(3))
    finally:
        os.chdir(here)
    report = backfill(str(tmp_path))
    assert (report["new"], report["others"]) == (2, 2)
    assert states(session) == {"pending": 2}
    assert backfill(f"file://{tmp_path}/../{tmp_path.name}")["new"] == 0  # the same files by another way


def test_folders_deeper_than_calls_may_nest(services: Services, session: Session, tmp_path: Path) -> None:
    locate()
    depth = sys.getrecursionlimit() + 100
    here = Path.cwd()
    # Made, and removed, on the way: neither a path nor a call reaches that deep at once.
    os.chdir(tmp_path)
    try:
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")
        Path("a.jpg").write_bytes(face_jpeg())
        report = backfill(str(tmp_path))
        assert report["listed"] == 1
    finally:
        Path("a.jpg").unlink(missing_ok=True)
        while Path.cwd() != tmp_path:
            os.chdir("..")
            Path("d").rmdir()
        os.chdir(here)


def test_keys_that_name_no_sensible_year(services: Services, session: Session, bucket: Bucket) -> None:
    locate()
    for year in ("0001", "2025", "9999"):
        bucket.put(f"{year}/12/31/a.jpg", face_jpeg())
    assert backfill(bucket.uri, "--time-pattern", "%Y/%m/%d/*.jpg")["quarantined"] == 2
    found = rows(session, "SELECT reason, count(*) FROM jobs GROUP BY 1 ORDER BY 1")
    assert found == [("time_pattern_mismatch", 2), (None, 1)]


def test_a_pattern_is_checked_on_the_first_page_that_has_images(
    services: Services, session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASKWATCH_STORAGE__LIST_PAGE_SIZE", "2")
    locate()
    for number in range(5):
        bucket.put(f"0{number}.txt", b"no picture")
    bucket.put("9.jpg", face_jpeg())
    done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--time-pattern", "%Y/%m/%d.jpg")
    assert done.returncode == 1 and "matches none of the first 1 pictures" in done.stderr
    report = backfill(bucket.uri)
    assert (report["listed"], report["others"], report["new"]) == (6, 5, 1)


@pytest.mark.parametrize(
    ("environment", "arguments", "named"),
    [
        ({"MASKWATCH_DATABASE__URL": "garbage:s3cret"}, ["status"], "MASKWATCH_DATABASE__URL is no URL"),
        ({"MASKWATCH_DATABASE__URL": "mysql://u:s3cret@h/d"}, ["status"], "postgresql+psycopg://"),
        ({"MASKWATCH_BROKER__URL": "garbage:s3cret"}, ["status"], "MASKWATCH_BROKER__URL is no URL"),
        ({"MASKWATCH_WORKER__PROCESSES": "s3cret"}, ["status"], "MASKWATCH_WORKER__PROCESSES"),
        ({"AWS_PROFILE": "nope"}, ["backfill", "s3://footage", "--location", "lobby"], "nope"),
        ({"MASKWATCH_STORAGE__ENDPOINT_URL": "foo"}, ["backfill", "s3://footage", "--location", "lobby"], "foo"),
        ({}, ["backfill", "s3://Bad_Bucket!/x", "--location", "lobby"], "Bad_Bucket!"),
        ({}, ["backfill", "x" * 300, "--location", "lobby"], "there is no folder"),
        ({}, ["backfill", "y" * 3000, "--location", "lobby"], "too long"),
        ({}, ["backfill", ".", "--location", "lobby", "--since", "0001-01-01"], "--since"),
        ({}, ["backfill", ".", "--location", "lobby", "--since", "2026-01-02", "--until", "2026-01-01"], "not after"),
        ({}, ["locations", "add", "x", "--time-zone", "CET"], "CET"),
        ({}, ["locations", "add", " ", "--time-zone", "UTC"], "needs a name"),
        ({}, ["run", ".", "--location", "new-one", "--since", "garbage"], "garbage"),
        ({}, ["run", ".", "--location", "new-one", "--time-pattern", "%Q"], "%Q"),
    ],
)
def test_settings_and_arguments_that_cannot_be_meant(
    services: Services, session: Session, environment: dict[str, str], arguments: list[str], named: str
) -> None:
    locate(zone="Europe/Berlin")
    done = maskwatch(*arguments, env=environment)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ") and named in lines[-1] and "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr + done.stdout
    assert scalar(session, "SELECT count(*) FROM locations") == 1 and scalar(session, "SELECT count(*) FROM jobs") == 0


def test_an_id_that_no_job_can_have(services: Services) -> None:
    done = maskwatch("jobs", "show", "99999999999999999999")
    assert done.returncode == 2 and "not in the range" in done.stderr


FACE = (
    "INSERT INTO faces (observed_at, job_id, media_object_id, location_id, pipeline_id, x1, y1, x2, y2, size_px,"
    " p_face, p_with_mask, p_without_mask, status)"
    " VALUES ('2019-05-01', 1, 1, 1, 1, 0, 0, 9, 9, 9, 1, 1, 0, 'with_mask')"
)


def test_a_long_query_over_faces_does_not_stop_the_reconciler(services: Services, session: Session) -> None:
    session.execute(text(FACE))
    session.commit()
    with Session(session.bind) as analyst:
        analyst.execute(text("SELECT count(*) FROM faces"))  # and its transaction stays open
        assert dispatch.reconcile(get_settings())["partitions"] == 0
        with Redis.from_url(services.endpoints.redis_url) as client:
            assert client.get("maskwatch.epoch") is not None
    assert dispatch.reconcile(get_settings())["partitions"] == 1
    assert rows(session, "SELECT tableoid::regclass::text FROM faces") == [("faces_2019_05",)]
    assert partitions.split_default(engine()) == []


def test_a_worker_without_the_pinned_model_gives_its_jobs_back_and_stops(
    services: Services, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    locate()
    bucket.put("a.jpg", face_jpeg())
    bucket.put("b.jpg", face_jpeg(1))
    backfill(bucket.uri)
    # As if the jobs were planned with weights that are not installed here.
    session.execute(
        text("UPDATE pipelines SET spec = jsonb_set(spec, '{classifier,sha256}', to_jsonb(repeat('0', 64)))")
    )
    session.commit()
    dispatch.reconcile(get_settings())
    assert dispatch.dispatch(get_settings()) == 2
    log = tmp_path / "worker.log"
    with running("worker", log=log) as worker:
        assert worker.wait(90) == 0
    assert get_settings().pipeline.classifier in log.read_text() and "given back" in log.read_text()
    assert rows(session, "SELECT state, attempt, failures FROM jobs") == [("pending", 0, 0)] * 2
