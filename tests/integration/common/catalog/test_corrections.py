"""What was said wrongly is put right: afterwards all is as if it had been said rightly from the beginning."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import corrections, places
from common.database.tables import Backfill, Camera, Location, Pipeline
from common.domain import FrameFaces, Lane, MaskStatus, MaskwatchError, ObjectInfo, VideoInfo
from common.ledger import ClaimedJob, StaleJobError, circuit_breaker, registration
from common.models.pipeline import pipeline_spec
from common.planning import plan_object
from common.settings import get_settings
from common.timestamps import TimePattern, observed_from_file, recording_start, zone
from tests.ledger_rows import coverage_by_both, face, rows, scalar, states, take
from tests.mutants import UNFENCED_SUCCESS, planted
from tests.pipelines import default_spec
from tests.services import maskwatch, wait_until
from workers.jobs import recording
from workers.jobs.recording import record_chunk, record_image, record_probe
from workers.summaries.aggregation import summarize

PATTERN = "%Y-%m-%d/%H%M%S*"
UPLOADED = datetime(2026, 11, 1, 9, 30, tzinfo=UTC)

#: By the clock on the wall: a night in which Berlin skips the hour from two, one in which it has it twice, a plain day.
SKIPPED = datetime(2026, 3, 29, 2, 30)
WALL = [
    datetime(2026, 3, 29, 1, 50),
    SKIPPED,
    datetime(2026, 3, 29, 3, 10),
    datetime(2026, 10, 25, 1, 10),
    datetime(2026, 10, 25, 2, 40),
    datetime(2026, 6, 5, 12, 0),
    datetime(2026, 6, 5, 12, 29),
    datetime(2026, 6, 5, 23, 59, 59),
    datetime(2026, 6, 4, 0, 0),
]

#: With a time in their key.
KEYED = [f"{at:%Y-%m-%d/%H%M%S}{suffix}" for at in WALL for suffix in ("a.jpg", "b.jpg", ".mp4")]
#: Without: the picture's or the container's own time, or the upload's.
OTHERS = [
    # A picture whose time the wrong zone skips counts at its upload's, and is not read again.
    *(f"exif/{at:%Y-%m-%dT%H%M%S}.jpg" for at in WALL if at != SKIPPED),
    *(f"made/{at:%Y-%m-%dT%H%M%S}.mp4" for at in WALL),
    "plain.jpg",
    "plain.mp4",
]


def add(session: Session, name: str, time_zone: str, pattern: str | None = PATTERN) -> tuple[Location, Camera]:
    """A location and a camera of the same name, whose keys have this pattern."""
    location = places.add_location(session, name, time_zone)
    location.promoted_pipeline_id = places.ensure_pipeline(session, pipeline_spec(get_settings())).id
    camera = places.add_camera(session, location, "gate")
    camera.time_pattern = pattern
    session.commit()
    return location, camera


def enqueue(
    session: Session,
    folder: str,
    keys: list[str],
    location: Location,
    camera: Camera,
    pattern: str | None = PATTERN,
    pipeline: Pipeline | None = None,
) -> None:
    reading = TimePattern(pattern) if pattern else None
    infos = [ObjectInfo("s3://footage", f"{folder}/{key}", "e1", 1000, UPLOADED) for key in keys]
    planned = [plan_object(info, reading, zone(location.time_zone)) for info in infos]
    ledger.register(
        session,
        [item for item in planned if item],
        location=location,
        camera=camera,
        pipeline=pipeline or places.ensure_pipeline(session, pipeline_spec(get_settings())),
        lane=Lane.LIVE,
    )
    session.commit()


def claim(session: Session, limit: int = 1000) -> list[ClaimedJob]:
    refs = take(session, limit)
    found = ledger.claim(session, refs, worker="w/1", lease_seconds=600)
    session.commit()
    return found


def finish(session: Session, job: ClaimedJob) -> None:
    """What a worker makes of a job; faces by the key, so that the same footage shows the same."""
    where, name = zone(job.time_zone), job.key.partition("/")[2]
    count = sum(name.encode()) % 3
    statuses = [list(MaskStatus)[(count + n) % 3] for n in range(count + 1)]
    own = TimePattern("%Y-%m-%dT%H%M%S*").match(name)
    if job.kind.value == "image":
        seen = observed_from_file(job.key_time, own, job.last_modified, where)
        record_image(session, job, [face(status) for status in statuses], seen)
    elif job.kind.value == "probe":
        made = own.replace(tzinfo=UTC) if own else None
        seen = recording_start(job.key_time, made, job.last_modified, 5400)
        info = VideoInfo("mp4", "h264", 64, 48, 1.0, 0, 5400.0, made)
        record_probe(session, job, info, seen, [(0, 2_700_000), (2_700_000, 5_400_000)])
    else:
        seconds = range(job.range_start_ms // 1000, job.range_end_ms // 1000, 300)
        frames = [
            FrameFaces(second, 300.0, tuple(face(status) for status in statuses), tuple(range(len(statuses))))
            for second in seconds
        ]
        record_chunk(session, job, frames, None)


def work(session: Session) -> list[str]:
    """Do all there is to do; returns the keys of what was done."""
    done = []
    while jobs := claim(session):
        for job in jobs:
            finish(session, job)
            session.commit()
            done.append(job.key)
    summarize()
    return done


def told(session: Session, location: str) -> dict[str, list[Any]]:
    """All that an analyst sees of a location, but for ids and for which of the folders it is."""
    where = "FROM {} JOIN locations l ON l.id = {}.location_id WHERE l.name = :location"
    tables = {
        "hours": "SELECT hour, frames, seconds, faces, with_mask, without_mask, uncertain "
        + where.format("compliance_hourly", "compliance_hourly"),
        "summed": "SELECT date_trunc('hour', observed_at, time_zone), count(*) "
        + where.format("faces", "faces")
        + " GROUP BY 1",
        "faces": "SELECT substr(m.key, 3), f.observed_at, offset_seconds, status, track_id FROM faces f"
        " JOIN media_objects m ON m.id = media_object_id JOIN locations l ON l.id = f.location_id"
        " AND l.id = m.location_id WHERE l.name = :location",
        "counts": "SELECT substr(m.key, 3), jobs.kind, hour, frames, seconds FROM frame_counts c JOIN jobs"
        " ON jobs.id = job_id JOIN media_objects m ON m.id = media_object_id JOIN locations l"
        " ON l.id = c.location_id WHERE l.name = :location",
        "objects": "SELECT substr(key, 3), observed_at, observed_at_source, observed_at_ambiguous "
        + where.format("media_objects", "media_objects"),
        # Chunks that were withdrawn are of no plan.
        "jobs": "SELECT substr(m.key, 3), jobs.kind, range_start_ms, state, reason FROM jobs JOIN media_objects m"
        " ON m.id = media_object_id JOIN locations l ON l.id = m.location_id WHERE l.name = :location"
        " AND NOT (jobs.kind = 'chunk' AND state = 'cancelled')",
    }
    return {name: sorted(rows(session, query, location=location), key=repr) for name, query in tables.items()}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are some."""
    monkeypatch.setattr(corrections, "BATCH", 5)


#: What was said, what is right, by zones; pictures half an hour apart fall into other hours, whatever the offset.
ZONES = [
    ("UTC", "Europe/Berlin"),
    ("Europe/Berlin", "UTC"),
    ("UTC", "Asia/Kolkata"),
    ("Asia/Kolkata", "Europe/Berlin"),
    ("Europe/Berlin", "America/New_York"),
]


@pytest.mark.parametrize(("said", "right"), ZONES)
def test_a_time_zone(session: Session, said: str, right: str) -> None:
    wrong, of_wrong = add(session, "lobby", said)
    oracle, of_oracle = add(session, "oracle", right)
    for keys, pattern in ((KEYED, PATTERN), (OTHERS, None)):
        enqueue(session, "a", keys, wrong, of_wrong, pattern)
        enqueue(session, "b", keys, oracle, of_oracle, pattern)
    work(session)
    assert told(session, "lobby") != told(session, "oracle"), "control: it matters"
    done = corrections.correct_zone(session, wrong, right, by="test")
    session.commit()
    again = work(session)
    assert told(session, "lobby") == told(session, "oracle")
    assert not any(key.endswith(".jpg") and "03-29" not in key for key in again), "pictures move"
    assert done.objects == len(KEYED) + len(OTHERS) and done.moved
    if "Kolkata" not in said + right:
        assert not any("06-0" in key for key in again), "where hours stay whole, so do videos"


def test_a_location(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    yard, other = add(session, "yard", "Asia/Kolkata")
    other.name = "other"
    oracle, of_oracle = add(session, "oracle", "Asia/Kolkata")
    bystander = places.add_camera(session, wrong, "bystander")
    enqueue(session, "c", KEYED[3:6], wrong, bystander)
    for keys, pattern in ((KEYED, PATTERN), (OTHERS, None)):
        enqueue(session, "a", keys, wrong, camera, pattern)
        enqueue(session, "b", keys, oracle, of_oracle, pattern)
    work(session)
    stays = scalar(session, "SELECT count(*) FROM faces WHERE camera_id = :id", id=bystander.id)
    corrections.correct_camera(session, camera, to=yard, by="test")
    session.commit()
    work(session)
    assert told(session, "yard") == told(session, "oracle")
    assert scalar(session, "SELECT count(*) FROM faces WHERE location_id = :id", id=wrong.id) == stays > 0
    assert {row[0] for row in told(session, "lobby")["objects"]} == set(KEYED[3:6])


def test_a_time_pattern(session: Session) -> None:
    swapped = "%Y-%d-%m/%H%M%S*"
    wrong, camera = add(session, "lobby", "UTC", swapped)
    oracle, of_oracle = add(session, "oracle", "UTC")
    enqueue(session, "a", KEYED, wrong, camera, swapped)
    enqueue(session, "b", KEYED, oracle, of_oracle)
    work(session)
    unplaced = scalar(session, "SELECT count(*) FROM jobs WHERE reason = 'time_pattern_mismatch'")
    assert unplaced, "control: month 29"
    done = corrections.correct_camera(session, camera, time_pattern=PATTERN, by="test")
    session.commit()
    assert done.placed == unplaced
    work(session)
    assert told(session, "lobby") == told(session, "oracle")
    with pytest.raises(MaskwatchError, match=r"'x/%Y%m%d.jpg' fits none of the 27 keys of camera 'gate'"):
        corrections.correct_camera(session, camera, time_pattern="x/%Y%m%d.jpg", by="test")
    session.rollback()
    assert told(session, "lobby") == told(session, "oracle")


@pytest.mark.parametrize("fence", [True, False])
def test_who_works_on_it_is_refused(session: Session, fence: bool) -> None:
    """The control: without the fence, a worker's rows land where it believed the camera to be."""
    wrong, camera = add(session, "lobby", "UTC")
    oracle, of_oracle = add(session, "oracle", "Asia/Kolkata")
    enqueue(session, "a", KEYED[-6:], wrong, camera)
    held = [job for job in claim(session) if job.kind.value == "image"]
    assert len(held) == 4
    enqueue(session, "b", KEYED[-6:], oracle, of_oracle)
    corrections.correct_zone(session, wrong, "Asia/Kolkata", by="test")
    session.commit()
    for job in held:
        if fence:
            with pytest.raises(StaleJobError):
                finish(session, job)
            session.rollback()
        else:
            with planted(UNFENCED_SUCCESS):
                finish(session, job)
            session.commit()
    work(session)
    assert (told(session, "lobby") == told(session, "oracle")) is fence
    attempts = rows(session, "SELECT DISTINCT outcome, detail FROM job_attempts WHERE outcome = 'released'")
    assert attempts == [("released", "location lobby: time zone UTC → Asia/Kolkata")]
    if fence:
        assert scalar(session, "SELECT max(attempt) FROM jobs") == 1, "nobody is charged"


@pytest.mark.parametrize("checked", [True, False])
def test_what_was_planned_before_is_not_registered_after(
    session: Session, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    with Session(session.bind, expire_on_commit=False) as lister:
        read = lister.get_one(Location, wrong.id), lister.get_one(Camera, camera.id)
        lister.expunge_all()
        lister.rollback()
        if not checked:
            monkeypatch.setattr(registration, "check_places", lambda *_: None)
        corrections.correct_zone(session, wrong, "Asia/Kolkata", by="test")
        session.commit()
        if checked:
            with pytest.raises(MaskwatchError, match=r"'lobby' or its camera was corrected during this listing"):
                enqueue(lister, "a", KEYED[-6:], *read)
            assert scalar(session, "SELECT count(*) FROM media_objects") == 0
        else:
            enqueue(lister, "a", KEYED[-6:], *read)
            assert scalar(session, "SELECT count(*) FROM media_objects WHERE observed_at > :noon", noon=WALL[-4]), (
                "counted in hours that were not"
            )


def test_purged_time_stays_as_it_is(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    keys = ["2026-06-04/233000.jpg", "2026-06-05/003000.jpg", "2026-06-05/103000.jpg", "2026-06-05/103000.mp4"]
    enqueue(session, "a", keys, wrong, camera)
    work(session)
    before = datetime(2026, 6, 5, tzinfo=UTC)
    purge(session, before)
    frozen = rows(session, "SELECT * FROM compliance_hourly WHERE hour < :before", before=before)
    done = corrections.correct_zone(session, wrong, "Asia/Kolkata", by="test")
    session.commit()
    work(session)
    assert done.frozen == 1 and done.unplaced == 1
    assert rows(session, "SELECT * FROM compliance_hourly WHERE hour < :before", before=before) == frozen != []
    assert rows(session, "SELECT m.key, reason FROM jobs JOIN media_objects m ON m.id = media_object_id"
                " WHERE state = 'quarantined'") == [(f"a/{keys[1]}", "purged")]  # fmt: skip
    counted = "SELECT key FROM media_objects m WHERE EXISTS (SELECT FROM faces WHERE media_object_id = m.id)"
    assert {row.key for row in rows(session, counted)} == {f"a/{key}" for key in (keys[0], *keys[2:])}


def test_what_lies_across_the_border_of_purged_time_moves_as_far_as_it_is_kept(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    yard, other = add(session, "yard", "UTC")
    other.name = "other"
    # From half an hour before the border to an hour after it, in two chunks; the second one is kept.
    enqueue(session, "a", ["2026-06-04/233000.mp4"], wrong, camera)
    work(session)
    border = datetime(2026, 6, 5, tzinfo=UTC)
    purge(session, border)
    session.execute(text("DELETE FROM faces WHERE observed_at < :border"), {"border": border})
    session.commit()
    frozen = rows(session, "SELECT * FROM compliance_hourly WHERE hour < :border", border=border)
    kept = scalar(session, "SELECT count(*) FROM faces")
    done = corrections.correct_camera(session, camera, to=yard, by="test")
    session.commit()
    assert done.frozen == 1
    assert work(session) == []
    assert rows(session, "SELECT * FROM compliance_hourly WHERE hour < :border", border=border) == frozen != []
    where = "SELECT location_id, hour < :border AS purged, sum(frames) FROM frame_counts GROUP BY 1, 2 ORDER BY 1"
    assert rows(session, where, border=border) == [(wrong.id, True, 6), (yard.id, False, 12)]
    assert scalar(session, "SELECT count(*) FROM faces WHERE location_id = :id", id=yard.id) == kept > 0
    # What was looked at of the camera in purged time is not forgotten, though it is counted where the camera was.
    assert [row.analysed_seconds > 0 for row in coverage_by_both(session)] == [True, True]
    # Its half of the hour after midnight moves on, too, and what was purged stays once more.
    corrections.correct_zone(session, yard, "America/St_Johns", by="test")
    session.commit()
    assert work(session) == []
    assert rows(session, where, border=border) == [(wrong.id, True, 6), (yard.id, False, 12)]
    assert scalar(session, "SELECT min(hour) FROM frame_counts WHERE hour >= :border", border=border) == (
        border + timedelta(hours=2, minutes=30)
    )
    assert scalar(session, "SELECT count(*) FROM faces") == kept


def test_a_pattern_that_fits_nothing_is_refused_beside_older_versions(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    enqueue(session, "a", KEYED[:3], wrong, camera)
    replace_first(session, wrong, camera)
    work(session)
    before = told(session, "lobby")
    with pytest.raises(MaskwatchError, match=r"fits none of the 3 keys"):
        corrections.correct_camera(session, camera, time_pattern="x/%Y%m%d.jpg", by="test")
    session.rollback()
    assert told(session, "lobby") == before


def test_what_another_pipeline_has_made_without_a_time_in_the_key_stays(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    enqueue(session, "a", ["exif/2026-06-05T120000.jpg"], wrong, camera)
    spec = default_spec(sample_fps=2.0)
    enqueue(
        session,
        "a",
        ["exif/2026-06-05T120000.jpg"],
        wrong,
        camera,
        None,
        pipeline=places.ensure_pipeline(session, spec),
    )
    work(session)
    assert states(session) == {"quarantined": 1, "succeeded": 1}
    faces = scalar(session, "SELECT count(*) FROM faces")
    done = corrections.correct_zone(session, wrong, "Asia/Kolkata", by="test")
    session.commit()
    assert work(session) == [] and (done.moved, done.unplaced) == (1, 0)
    assert states(session) == {"quarantined": 1, "succeeded": 1}
    assert scalar(session, "SELECT count(*) FROM faces") == faces
    at = scalar(session, "SELECT observed_at FROM media_objects")
    assert at == datetime(2026, 6, 5, 6, 30, tzinfo=UTC)


def replace_first(session: Session, location: Location, camera: Camera) -> None:
    """A newer version of the first key."""
    info = ObjectInfo("s3://footage", f"a/{KEYED[0]}", "e2", 1000, UPLOADED + timedelta(hours=1))
    newer = plan_object(info, TimePattern(PATTERN), zone("UTC"))
    assert newer is not None
    pipeline = places.ensure_pipeline(session, pipeline_spec(get_settings()))
    ledger.register(session, [newer], location=location, camera=camera, pipeline=pipeline, lane=Lane.LIVE)
    session.commit()


def purge(session: Session, before: datetime) -> None:
    """Time before that is purged, and its summaries are final."""
    session.execute(text("INSERT INTO operator_actions (action, \"by\") VALUES ('purge', 'test')"))
    session.execute(
        text("INSERT INTO purges (before, action_id, frozen_at) SELECT :before, max(id), now() FROM operator_actions"),
        {"before": before},
    )
    session.commit()


# --- beside others ---


def waits(session: Session) -> bool:
    """Whether somebody waits for a lock."""
    return bool(scalar(session, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock')"))


def correct_beside(session: Session, location: Location, into: list[str]) -> threading.Thread:
    """Correct the zone in a transaction of another connection."""

    def act() -> None:
        with Session(session.bind, expire_on_commit=False) as other:
            place = other.get_one(Location, location.id)
            try:
                corrections.correct_zone(other, place, "Asia/Kolkata", by="other")
                other.commit()
                into.append("corrected")
            except MaskwatchError as error:
                into.append(str(error))

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_given_twice_it_is_done_once(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    enqueue(session, "a", KEYED[-6:], wrong, camera)
    work(session)
    said: list[str] = []
    corrections.correct_zone(session, wrong, "Asia/Kolkata", by="test")
    with Session(session.bind) as look:
        thread = correct_beside(session, wrong, said)
        wait_until(lambda: waits(look), what="its wait")
        session.commit()
        thread.join(30)
    assert said == ["location 'lobby' is in the time zone Asia/Kolkata already"]
    assert scalar(session, "SELECT max(observed_at) FROM media_objects") == datetime(2026, 6, 5, 18, 29, 59, tzinfo=UTC)


def test_a_worker_that_is_just_recording_is_waited_for(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """His rows name the camera, whose row is held by then: that must not be a circle."""
    wrong, camera = add(session, "lobby", "UTC")
    enqueue(session, "a", KEYED[-6:], wrong, camera)
    first, *others = (job for job in claim(session) if job.kind.value == "image")
    said: list[str] = []
    threads: list[threading.Thread] = []
    count = recording._count

    def slowly(worker: Session, frames: Sequence[tuple[ClaimedJob, datetime, float]]) -> int:
        # The job is locked, and nothing is written yet that names the camera.
        threads.append(correct_beside(session, wrong, said))
        with Session(session.bind) as look:
            wait_until(lambda: waits(look), what="the correction's wait")
        return count(worker, frames)

    with Session(session.bind) as worker:
        monkeypatch.setattr(recording, "_count", slowly)
        finish(worker, first)
        worker.commit()
        monkeypatch.undo()
        threads[0].join(30)
        for job in others:
            with pytest.raises(StaleJobError):
                finish(worker, job)
            worker.rollback()
    assert said == ["corrected"]
    assert scalar(session, "SELECT count(*) FROM frame_counts WHERE extract(minute FROM hour) = 30") == 1


def test_a_backfill_that_is_limited_in_time_comes_first(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    pipeline = places.ensure_pipeline(session, pipeline_spec(get_settings()))
    backfill = Backfill(
        source="s3://footage/",
        source_id=circuit_breaker.ensure(session, "s3://footage"),
        location_id=wrong.id,
        camera_id=camera.id,
        pipeline_id=pipeline.id,
        since=UPLOADED,
    )
    session.add(backfill)
    session.commit()
    with pytest.raises(
        MaskwatchError, match=r"time range of backfill 1 was read in the time zone .* backfills cancel 1"
    ):
        corrections.correct_zone(session, wrong, "Asia/Kolkata", by="test")
    session.rollback()
    backfill.since = None
    session.commit()
    yard, other = add(session, "yard", "UTC")
    other.name = "other"
    corrections.correct_camera(session, camera, to=yard, time_pattern="%Y%m%d.jpg", by="test")
    session.commit()
    assert rows(session, "SELECT location_id, time_pattern FROM backfills") == [(yard.id, "%Y%m%d.jpg")]


def test_an_older_version_of_a_key_stays_superseded(session: Session) -> None:
    wrong, camera = add(session, "lobby", "UTC")
    enqueue(session, "a", KEYED[:3], wrong, camera)
    replace_first(session, wrong, camera)
    work(session)
    before = states(session)
    corrections.correct_zone(session, wrong, "America/New_York", by="test")
    session.commit()
    assert states(session) == before
    moved = "SELECT DISTINCT observed_at, superseded_at IS NULL FROM media_objects WHERE key LIKE '%.jpg' ORDER BY 1"
    assert {row[0] for row in rows(session, moved)} == {datetime(2026, 3, 29, 5, 50, tzinfo=UTC)}


def test_the_commands(session: Session) -> None:
    location, camera = add(session, "lobby", "UTC")
    add(session, "yard", "Asia/Kolkata")
    enqueue(session, "a", KEYED[-6:], location, camera)
    # Its container tells an instant, whatever the clocks of the place show.
    enqueue(session, "a", ["made/2026-06-05T120000.mp4"], location, camera, None)
    work(session)
    before = told(session, "lobby")
    correct = ("cameras", "correct", "gate", "--location", "lobby")
    dry = maskwatch(*correct, "--time-zone", "Europe/Berlin", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout) == {
        "objects": 7, "moved": 6, "placed": 0, "unplaced": 0, "frozen": 0, "jobs_again": 0, "shown": True,
        "dry_run": True,
    }  # fmt: skip
    assert told(session, "lobby") == before
    assert scalar(session, "SELECT count(*) FROM operator_actions") == 0
    done = maskwatch(*correct, "--time-zone", "Asia/Kolkata")
    assert done.returncode == 0 and "7 objects: 6 moved\n  2 jobs are done again" in done.stderr, done.stderr
    done = maskwatch("locations", "correct", "lobby", "--time-zone", "UTC")
    assert done.returncode == 0, done.stderr
    work(session)
    assert told(session, "lobby") == before
    assert rows(session, "SELECT action, detail FROM operator_actions ORDER BY id") == [
        ("correct", "location lobby: time zone UTC → Asia/Kolkata"),
        ("correct", "location lobby: time zone Asia/Kolkata → UTC"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give the right value: --to-location, --time-zone or --time-pattern"),
        (("--time-zone", "UTC", "--to-location", "yard"), "--time-zone goes without --to-location"),
        (("--time-zone", "UTC"), "location 'lobby' is in the time zone UTC already"),
        (("--time-zone", "Mars/Olympus"), "unknown time zone 'Mars/Olympus'"),
        (("--to-location", "lobby"), "camera 'gate' is at 'lobby' already"),
        (("--to-location", "moon"), "unknown location 'moon'"),
        (("--to-location", "yard"), "'yard' has a camera 'gate' already"),
        (("--time-pattern", "%H.jpg"), "must hold a date"),
    ],
)
def test_what_can_not_be_is_refused(session: Session, options: tuple[str, ...], message: str) -> None:
    for name in ("lobby", "yard"):
        add(session, name, "UTC")
    done = maskwatch("cameras", "correct", "gate", "--location", "lobby", *options)
    assert done.returncode != 0 and message in done.stderr, done.stderr
