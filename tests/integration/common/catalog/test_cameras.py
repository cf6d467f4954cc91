"""Cameras on a schedule: every slot is polled once, however many producers tick or die; late footage is found."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.catalog import schedule
from common.catalog.schedule import PollLostError, slots
from common.database.sessions import session_scope
from common.domain import MaskwatchError, ObjectInfo
from common.settings import get_settings
from common.storage.s3 import S3Store
from common.timestamps import TimePattern
from producer import cameras, dispatch, listing
from producer.cameras import poll_camera, tick
from tests.ledger_rows import rows, scalar, states
from tests.mutants import Rewrite, planted
from tests.photos import jpeg, portrait
from tests.services import QUICK, Bucket, locate, maskwatch, running, wait_until

PATTERN = "cam/%Y/%m/%d/%H-%M-%S.jpg"
NOW = datetime.now(UTC).replace(microsecond=0)


def key(at: datetime) -> str:
    return f"{at:cam/%Y/%m/%d/%H-%M-%S.jpg}"


def add(bucket: Bucket, *options: str, name: str = "cam", source: str = "/cam/") -> str:
    """Register a camera on a schedule; what the command says."""
    command = ("cameras", "add", name, "--location", "lobby", "--source", f"{bucket.uri}{source}", *options)
    done = maskwatch(*command, "--time-pattern", PATTERN)
    assert done.returncode == 0, done.stderr
    return done.stderr


def due(session: Session, **ago: float) -> None:
    """As if the schedule had begun that long ago."""
    session.rollback()
    session.execute(text("UPDATE cameras SET scheduled_since = :since"), {"since": NOW - timedelta(**ago)})
    session.commit()


# --- slots ------------------------------------------------------------------------------------------------


def test_slots_of_an_interval_are_counted_from_its_beginning() -> None:
    begin = datetime(2026, 3, 2, 12, tzinfo=UTC)
    found = slots(
        300, None, since=begin, after=begin, until=begin + timedelta(minutes=16), where=ZoneInfo("Europe/Berlin")
    )
    assert [slot.minute for slot in found] == [5, 10, 15]


def test_cron_is_on_the_locations_clock_over_its_changes() -> None:
    begin = datetime(2026, 3, 27, 12, tzinfo=UTC)  # clocks are set forward on the 29th
    found = list(
        slots(
            None,
            "0 6 * * *",
            since=begin,
            after=begin,
            until=begin + timedelta(days=4),
            where=ZoneInfo("Europe/Berlin"),
        )
    )
    assert [slot.astimezone(UTC).hour for slot in found] == [5, 4, 4, 4]


@pytest.mark.parametrize("cron", ["every day", "61 * * * *", "0 0 30 2 *"])
def test_a_cron_expression_that_never_comes_is_refused(cron: str) -> None:
    with pytest.raises(MaskwatchError, match=r"no cron expression with a next time.*\*/5"):
        schedule.check_schedule(None, cron)


def test_slots_are_noted_once_however_many_tick(session: Session, bucket: Bucket) -> None:
    locate()
    add(bucket, "--every", "1m")
    due(session, minutes=30)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: tick(get_settings()), range(8)))
    counted, from_first_to_last = rows(
        session, "SELECT count(*), extract(epoch FROM max(slot) - min(slot))::int / 60 + 1 FROM camera_slots"
    )[0]
    assert counted == from_first_to_last >= 31


def end_slots(session: Session, days_ago: float, before: datetime = NOW + timedelta(days=1)) -> None:
    """As if the slots before an instant had ended that long ago."""
    session.rollback()
    session.execute(
        text("UPDATE camera_slots SET looks = 1, finished_at = clock_timestamp() - :ago WHERE slot < :before"),
        {"ago": timedelta(days=days_ago), "before": before},
    )
    session.commit()


def prune(session: Session) -> int:
    deleted = schedule.prune_slots(session)
    session.commit()
    return deleted


SLOTS = "SELECT slot FROM camera_slots ORDER BY camera_id, slot"

#: The mutant deletes every slot that has ended, also the one that the next is counted from.
NONE_STAYS = Rewrite(of="WITH past AS", pattern=r"AND oldest\.next_finished_at IS NOT NULL", by="")


def test_slots_that_ended_long_ago_are_deleted_in_batches(
    session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "PRUNED_PER_CAMERA", 20)
    monkeypatch.setattr(schedule, "PRUNED_AT_ONCE", 30)
    locate()
    for name in ("one", "two"):
        add(bucket, "--every", "1h", name=name, source=f"/{name}/")
    due(session, days=4)
    tick(get_settings())
    noted = [row.slot for row in rows(session, SLOTS)]
    assert len(noted) == 2 * 97
    # Of each camera: 40 that ended long ago, 40 that ended lately, and 17 that are open.
    end_slots(session, 6.9, before=NOW - timedelta(hours=16, minutes=1))
    end_slots(session, 7.1, before=NOW - timedelta(hours=56, minutes=1))
    dispatch.reconcile(get_settings())
    counts = [scalar(session, "SELECT count(*) FROM camera_slots")]
    while prune(session):
        counts.append(scalar(session, "SELECT count(*) FROM camera_slots"))
    assert counts == [194 - deleted for deleted in (30, 60, 80)]
    assert [row.slot for row in rows(session, SLOTS)] == [slot for slot in noted if slot >= NOW - timedelta(hours=56)]


@pytest.mark.parametrize("stays", [True, False])
def test_no_slot_is_noted_again_after_it_was_deleted_because_the_latest_stays(
    session: Session, bucket: Bucket, stays: bool
) -> None:
    locate()
    add(bucket, "--every", "1h")
    due(session, days=3)
    tick(get_settings())
    end_slots(session, 8)
    before = maskwatch("cameras", "list", "--json").stdout
    with nullcontext() if stays else planted(NONE_STAYS):
        assert prune(session) == (72 if stays else 73)
    assert prune(session) == 0
    assert tick(get_settings()) == ([] if stays else [1])
    assert scalar(session, "SELECT count(*) FROM camera_slots WHERE finished_at IS NULL") == (0 if stays else 73)
    assert (maskwatch("cameras", "list", "--json").stdout == before) is stays, "when it was last polled"


# --- polls ------------------------------------------------------------------------------------------------


def test_one_poll_ends_all_slots_that_were_due_and_enqueues_live(session: Session, bucket: Bucket) -> None:
    locate()
    add(bucket, "--every", "1h")
    due(session, hours=30)
    bucket.put(key(NOW), b"x")
    (camera,) = tick(get_settings())
    with ThreadPoolExecutor(3) as threads:
        assert sorted(threads.map(lambda _: poll_camera(camera, get_settings()) or 0, range(3))) == [0, 0, 1]
    assert rows(session, "SELECT looks, count(*) FROM camera_slots GROUP BY 1") == [(1, 31)]
    assert rows(session, "SELECT lane, state FROM jobs") == [(0, "pending")]
    assert tick(get_settings()) == [] and poll_camera(camera, get_settings()) is None


def test_the_earlier_spelling_of_an_option_works_with_a_warning(session: Session, bucket: Bucket) -> None:
    locate()
    said = add(bucket, "--every", "1s", "--sweep", "2d")
    assert "warning: --sweep is now --full-scan; the next version does not know --sweep" in said
    assert rows(session, "SELECT sweep_seconds FROM cameras") == [(2 * 86400,)]
    assert "--sweep" not in maskwatch("cameras", "add", "--help").stdout


def test_a_poll_lists_what_can_be_new_and_a_full_scan_everything(
    session: Session, bucket: Bucket, listed: list[str]
) -> None:
    locate()
    add(bucket, "--every", "1s", "--look-back", "1h", "--full-scan", "1d")
    old, new = NOW - timedelta(days=9), NOW - timedelta(hours=2)
    for at in (old, new):
        bucket.put(key(at), b"x")
    wait_until(lambda: tick(get_settings()), what="a slot")
    listed.clear()
    assert poll_camera(1, get_settings()) == 2
    assert listed == [""], "the first is a full scan"

    late, later = new - timedelta(minutes=30), new - timedelta(days=1)
    for at in (late, later):
        bucket.put(key(at), b"late")
    wait_until(lambda: tick(get_settings()), what="the next slot")
    listed.clear()
    assert poll_camera(1, get_settings()) == 1, "what is not too late"
    assert listed == [key(new - timedelta(hours=1)).removesuffix(".jpg")]

    session.execute(text("UPDATE cameras SET swept_at = swept_at - interval '2 days'"))
    session.commit()
    wait_until(lambda: tick(get_settings()), what="another slot")
    assert poll_camera(1, get_settings()) == 1, "what came later still"
    assert states(session) == {"pending": 4}
    hours = {row[0] for row in rows(session, "SELECT observed_at FROM media_objects")}
    assert hours == {old, new, late, later}, "each in its own time"


def test_a_poll_that_was_killed_is_gone_on_with_by_another(
    session: Session, bucket: Bucket, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cameras, "plan_pages", lambda objects, rules: listing.plan_pages(objects, rules, batch=2))
    locate()
    add(bucket, "--every", "1h")
    due(session, hours=1)
    keys = [key(NOW - timedelta(minutes=n)) for n in range(6)]
    for name in keys:
        bucket.put(name, b"x")
    tick(get_settings())
    advance = schedule.advance_poll

    def killed(session: Session, poll: schedule.Poll, cursor: str) -> None:
        if cursor == sorted(keys)[3]:
            raise SystemExit  # the process that polls dies here
        advance(session, poll, cursor)

    monkeypatch.setattr(schedule, "advance_poll", killed)
    with pytest.raises(SystemExit):
        poll_camera(1, get_settings())
    monkeypatch.setattr(schedule, "advance_poll", advance)
    assert tick(get_settings()) == [], "its lease has not run out"
    assert scalar(session, "SELECT count(*) FROM camera_slots WHERE finished_at IS NOT NULL") == 0
    session.execute(text("UPDATE cameras SET look_until = clock_timestamp() - interval '1 second'"))
    session.commit()
    listed.clear()
    assert poll_camera(1, get_settings()) == 4
    assert listed == [sorted(keys)[1]]
    assert rows(session, "SELECT DISTINCT looks FROM camera_slots") == [(1,)]


def test_who_was_paused_past_his_lease_writes_nothing(session: Session, bucket: Bucket) -> None:
    locate()
    add(bucket, "--every", "1h")
    due(session, hours=1)
    tick(get_settings())
    with session_scope() as mine:
        slow = schedule.begin_poll(mine, 1, lease_seconds=60)
    assert slow is not None
    session.execute(text("UPDATE cameras SET look_until = clock_timestamp() - interval '1 second'"))
    session.commit()
    assert poll_camera(1, get_settings()) == 0
    for write in (lambda s: schedule.advance_poll(s, slow, "x"), lambda s: schedule.end_poll(s, slow)):
        with pytest.raises(PollLostError), session_scope() as mine:
            write(mine)
    assert rows(session, "SELECT DISTINCT looks FROM camera_slots") == [(1,)], "and ends no slot again"


def test_a_bucket_that_denies_costs_no_slot(session: Session, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    locate()
    add(bucket, "--every", "1h")
    due(session, hours=1)
    tick(get_settings())
    pages = S3Store.list_pages

    def denied(self: S3Store, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        raise MaskwatchError("listing is denied (AccessDenied): grant s3:ListBucket to these keys")

    monkeypatch.setattr(S3Store, "list_pages", denied)
    assert poll_camera(1, get_settings()) is None
    (shown,) = json.loads(maskwatch("cameras", "list", "--json").stdout)
    assert "grant s3:ListBucket" in shown["problem"] and shown["slots_due"] == 2
    monkeypatch.setattr(S3Store, "list_pages", pages)
    assert tick(get_settings()) == [], "not at once again"
    session.execute(text("UPDATE cameras SET look_until = clock_timestamp() - interval '1 second'"))
    session.commit()
    assert poll_camera(1, get_settings()) == 0
    (shown,) = json.loads(maskwatch("cameras", "list", "--json").stdout)
    assert (shown["problem"], shown["slots_due"], shown["state"]) == (None, 0, "scheduled")


# --- registering ------------------------------------------------------------------------------------------


def test_cameras_whose_sources_overlap_are_refused(session: Session, bucket: Bucket) -> None:
    locate()
    add(bucket, "--every", "5m")
    inside = maskwatch(
        "cameras", "add", "b", "--location", "lobby", "--source", f"{bucket.uri}/cam/left/", "--every", "5m"
    )
    assert inside.returncode == 1 and "overlaps that of the camera" in inside.stderr
    assert scalar(session, "SELECT count(*) FROM cameras") == 1
    add(bucket, "--cron", "*/5 * * * *", name="b", source="/other/")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--every", "5 minutes"), "is no duration; valid: 30s, 5m, 2h, 1d"),
        (("--every", "5m", "--cron", "* * * * *"), "not both"),
        (("--cron", "0 0 31 2 *"), "no cron expression with a next time"),
        (("--expects", "2h", "--every", "5m"), "at most 1h"),
        ((), "needs a schedule"),
        (("--every", "5m", "--time-pattern", "%H.jpg"), "must hold a date"),
    ],
)
def test_what_can_not_be_is_refused_and_leaves_no_camera(
    session: Session, bucket: Bucket, options: tuple[str, ...], said: str
) -> None:
    locate()
    done = maskwatch("cameras", "add", "cam", "--location", "lobby", "--source", bucket.uri, *options)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert scalar(session, "SELECT count(*) FROM cameras") == 0


def test_a_camera_is_changed_disabled_and_removed_and_keeps_its_history(session: Session, bucket: Bucket) -> None:
    locate()
    add(bucket, "--every", "1h")
    due(session, hours=1)
    bucket.put(key(NOW), b"x")
    tick(get_settings())
    poll_camera(1, get_settings())

    def do(action: str, *options: str) -> str:
        done = maskwatch("cameras", action, "cam", "--location", "lobby", *options)
        return done.stderr if done.returncode == 0 else f"refused: {done.stderr}"

    assert "is polled every 1 s" in do("change", "--every", "1s")
    assert "is disabled" in do("disable") and "disabled already" in do("disable")
    assert tick(get_settings()) == []
    assert "is enabled" in do("enable") and "enabled already" in do("enable")
    assert tick(get_settings()) == [1], "what came meanwhile is polled for"
    assert "is removed" in do("remove") and "refused" in do("enable")
    assert tick(get_settings()) == []
    assert states(session) == {"pending": 1}
    assert scalar(session, "SELECT count(*) FROM media_objects WHERE camera_id = 1") == 1
    assert [row.action for row in rows(session, "SELECT action FROM operator_actions ORDER BY id")] == [
        "change camera",
        "disable camera",
        "enable camera",
        "remove camera",
    ]


@pytest.mark.parametrize(
    ("pattern", "name", "before"),
    [
        ("cam/%Y/%m/%d/%H-%M-%S.jpg", "cam/2026/03/02/12-00-00.jpg", "cam/2026/03/01/06-30-00"),
        ("%Y/%m/%d/%H-%M-%S.jpg", "cam/2026/03/02/12-00-00.jpg", "cam/2026/03/01/06-30-00"),
        ("%Y%m%d-*.jpg", "cam/20260302-7.jpg", "cam/20260301"),
        # What stands between date and time differs: the day is listed from its beginning.
        ("%Y/%m/%d/*-%H-%M-%S.*", "cam/2026/03/02/snap-12-00-00.jpg", "cam/2026/03/01"),
        # The date stands there twice.
        ("%Y/%m/%d/%Y%m%dT%H%M%S.jpg", "cam/2026/03/02/20260302T120000.jpg", "cam/2026/03/01/20260301T063000"),
        ("%Y-%m-%dT%H%M%S.%f.jpg", "cam/2026-03-02T120000.250.jpg", "cam/2026-03-01T063000"),
        ("%Y-%m-%d_%I%M%p.jpg", "cam/2026-03-02_0130PM.jpg", "cam/2026-03-01"),
        ("%d.%m.%Y/%H%M%S.jpg", "cam/02.03.2026/120000.jpg", None),  # does not sort by time
        ("*/%Y/%m/%d.jpg", "cam/a/2026/03/02.jpg", None),  # what comes before the date differs
        ("%Y/%m/%d.jpg", "cam/a/2026/03/02.jpg", None),  # so it does here
        ("%Y/%m/%d.jpg", "cam/2026/3/2.jpg", None),  # numbers without zeros do not sort
        ("%Y-%m-%dT%H-%M-%S%z.jpg", "cam/2026-03-02T12-00-00Z.jpg", None),  # nor do times of different offsets
    ],
)
def test_where_a_poll_begins(pattern: str, name: str, before: str | None) -> None:
    assert TimePattern(pattern).key_before(name, datetime(2026, 3, 1, 6, 30), "cam/") == before


SORTED = ("%Y/%m/%d/%H%M%S.jpg", "%Y/%m/%d/*_%H%M%S.jpg", "%Y/%m/%d/%Y%m%d/%H%M%S*.jpg", "%Y%m%d/*/%H/%M%S.jpg")


@pytest.mark.parametrize("pattern", SORTED)
def test_no_key_of_that_time_or_later_sorts_before_it(pattern: str) -> None:
    draw = random.Random(4)
    begin = datetime(2026, 2, 27, 20)
    made = {}
    for minutes in range(0, 3 * 24 * 60, 7):
        at = begin + timedelta(minutes=minutes)
        name = re.sub(r"\*", lambda _: f"{draw.randrange(4096):x}", f"{at:{pattern}}")
        made[f"cam/{name}"] = at
    newest = max(made, key=made.__getitem__)
    for since in (begin + timedelta(hours=hours) for hours in range(0, 72, 5)):
        before = TimePattern(pattern).key_before(newest, since, "cam/")
        assert before is not None
        assert not [key for key, at in made.items() if at >= since and key <= before]


def test_a_new_source_is_listed_from_its_beginning(session: Session, bucket: Bucket, listed: list[str]) -> None:
    locate()
    add(bucket, "--every", "1s", source="/z/")
    bucket.put("z/" + key(NOW), b"x")
    wait_until(lambda: tick(get_settings()), what="a slot")
    assert poll_camera(1, get_settings()) == 1
    assert maskwatch("cameras", "change", "cam", "--location", "lobby", "--source", f"{bucket.uri}/a/").returncode == 0
    bucket.put("a/" + key(NOW), b"y")
    wait_until(lambda: tick(get_settings()), what="the next slot")
    listed.clear()
    assert poll_camera(1, get_settings()) == 1, "its keys sort before those of the earlier source"
    assert listed == [""]


def test_footage_that_arrives_is_analysed_on_schedule(
    session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two real producers and a real worker."""
    for name, value in {**QUICK, "MASKWATCH_DISPATCH__POLL_SECONDS": "0.3"}.items():
        monkeypatch.setenv(name, value)
    locate()
    add(bucket, "--every", "1s")
    with (
        running("producer", log=tmp_path / "producer.log"),
        running("producer", log=tmp_path / "another.log"),
        running("worker", log=tmp_path / "worker.log"),
    ):
        for number in range(3):
            bucket.put(key(NOW - timedelta(minutes=number)), jpeg(portrait(128)))
            wait_until(lambda: states(session).get("succeeded", 0) == number + 1, what="success")  # noqa: B023
    assert scalar(session, "SELECT max(looks) FROM camera_slots") == 1
    assert scalar(session, "SELECT count(*) FROM jobs WHERE lane = 0") == 3
