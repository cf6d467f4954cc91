"""Cameras on a schedule: the slots that are due, and the polls that look for footage.

A slot is a row with a unique key, so that two schedulers, or one that was restarted, neither miss nor double it. A poll
lists what can be new, and ends all slots that were due when it began; it holds a lease and a token, as a job does. When
its process is killed, the poll is continued from its cursor.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

from croniter import CroniterError, croniter
from sqlalchemy import CursorResult, text
from sqlalchemy.orm import Session

from common.domain import MaskwatchError, first_line
from common.timestamps import zone

#: Most slots noted per camera and tick: after a long outage, noting all of them takes a few ticks.
SLOTS_AT_ONCE = 5000

#: Ended slots are kept this long: for people who ask when a camera was polled, and so that no producer, not even one
#: that was paused for hours, can note a slot again after it was deleted.
KEPT_DAYS = 7

#: Most slots deleted per camera and call. A camera has at most one slot per second, so a call every 100 s keeps up.
PRUNED_PER_CAMERA = 100

#: Most slots deleted per call, so that the transaction stays short.
PRUNED_AT_ONCE = 5000

#: Seconds until a failed poll is tried again.
TRY_AGAIN = 60.0


class PollLostError(Exception):
    """Another process has taken over the poll, or the camera was changed: this process may write nothing."""


@dataclass(frozen=True, slots=True)
class Poll:
    """A poll of a camera's source that this process holds."""

    camera_id: int
    token: uuid.UUID
    began: datetime
    cursor: str | None
    is_full_scan: bool
    #: How long a batch may take before another process takes over.
    lease_seconds: float


def check_schedule(every_seconds: float | None, cron: str | None) -> None:
    """Raise `MaskwatchError` for an invalid schedule, with examples of valid ones."""
    if every_seconds is not None and cron is not None:
        raise MaskwatchError("a camera has one schedule: give --every or --cron, not both")
    if cron is not None:
        try:
            croniter(cron).get_next()
        except (CroniterError, ValueError) as error:
            raise MaskwatchError(
                f"{cron!r} is no cron expression with a next time ({error}); valid: '*/5 * * * *' for every five "
                "minutes, '0 6 * * 1-5' for six o'clock on workdays"
            ) from error
    if every_seconds is not None and every_seconds < 1:
        raise MaskwatchError("a camera is polled at most once a second: give --every 1s or more")


def slots(
    every_seconds: float | None, cron: str | None, *, since: datetime, after: datetime, until: datetime, where: ZoneInfo
) -> Iterator[datetime]:
    """The slots in (after, until] of a schedule that began at `since`; a cron expression is on the location's clock."""
    if cron is not None:
        times = croniter(cron, max(since, after).astimezone(where), ret_type=datetime)
        for slot in iter(lambda: times.get_next(datetime), None):
            if slot > until:
                return
            yield slot
    elif every_seconds is not None:
        step = timedelta(seconds=every_seconds)
        number = max(0, (after - since) // step)
        while (slot := since + number * step) <= until:
            if slot > after:
                yield slot
            number += 1


def note_slots(session: Session) -> int:
    """Note the slots that have come due; returns how many are new."""
    cameras = session.execute(
        text(
            """
            SELECT c.id, c.every_seconds, c.cron, c.scheduled_since, l.time_zone, clock_timestamp() AS now,
                   (
                       SELECT max(slot)
                       FROM camera_slots s
                       WHERE s.camera_id = c.id AND s.slot >= c.scheduled_since
                   ) AS last
            FROM cameras c
            JOIN locations l ON l.id = c.location_id
            WHERE c.scheduled_since IS NOT NULL
              AND c.disabled_at IS NULL
              AND c.removed_at IS NULL
            ORDER BY c.id
            """
        )
    ).all()
    noted = 0
    for row in cameras:
        after = row.last or row.scheduled_since - timedelta(microseconds=1)
        try:
            due = slots(
                row.every_seconds,
                row.cron,
                since=row.scheduled_since,
                after=after,
                until=row.now,
                where=zone(row.time_zone),
            )
            new = list(islice(due, SLOTS_AT_ONCE))
        except (MaskwatchError, CroniterError, ValueError, ArithmeticError) as error:
            # Another version may have stored a schedule or a zone that this one can't read. Other cameras go on.
            _note_problem(session, row.id, f"its schedule can't be read: {first_line(error)}")
            continue
        if new:
            noted += len(
                session.execute(
                    text(
                        """
                        INSERT INTO camera_slots (camera_id, slot)
                        SELECT :camera, unnest(CAST(:slots AS timestamptz[]))
                        ON CONFLICT DO NOTHING
                        RETURNING slot
                        """
                    ),
                    {"camera": row.id, "slots": new},
                ).all()
            )
    return noted


def _note_problem(session: Session, camera_id: int, problem: str) -> None:
    session.execute(
        text("UPDATE cameras SET problem = :problem WHERE id = :id AND problem IS DISTINCT FROM :problem"),
        {"id": camera_id, "problem": problem},
    )


#: A camera's slots end in their order, so the oldest are deleted first; a camera whose oldest slot is kept is skipped.
#: The latest ended slot is kept: `note_slots` counts from there, and `list_cameras` shows when it ended.
_PRUNE = """
WITH past AS (
    SELECT oldest.camera_id, oldest.slot
    FROM cameras
    CROSS JOIN LATERAL (
        SELECT camera_id, slot, finished_at, lead(finished_at) OVER (ORDER BY slot) AS next_finished_at
        FROM (
            SELECT camera_id, slot, finished_at
            FROM camera_slots
            WHERE camera_id = cameras.id
            ORDER BY slot
            LIMIT :per_camera + 1
        ) AS first
    ) AS oldest
    WHERE (
        SELECT finished_at
        FROM camera_slots
        WHERE camera_id = cameras.id
        ORDER BY slot
        LIMIT 1
    ) < clock_timestamp() - make_interval(days => :days)
    AND oldest.finished_at < clock_timestamp() - make_interval(days => :days)
    AND oldest.next_finished_at IS NOT NULL
    LIMIT :at_once
), held AS (
    SELECT camera_id, slot
    FROM camera_slots
    JOIN past USING (camera_id, slot)
    FOR UPDATE OF camera_slots SKIP LOCKED
)
DELETE FROM camera_slots
USING held
WHERE camera_slots.camera_id = held.camera_id
AND camera_slots.slot = held.slot
"""


def prune_slots(session: Session) -> int:
    """Delete at most `PRUNED_AT_ONCE` slots that ended more than `KEPT_DAYS` days ago; returns how many."""
    limits = {"days": KEPT_DAYS, "per_camera": PRUNED_PER_CAMERA, "at_once": PRUNED_AT_ONCE}
    deleted = session.execute(text(_PRUNE), limits)
    assert isinstance(deleted, CursorResult)
    return deleted.rowcount


#: A camera with a slot that is due, and that no process is polling.
_IS_DUE = """
disabled_at IS NULL
  AND removed_at IS NULL
  AND scheduled_since IS NOT NULL
  AND (look_until IS NULL OR look_until < clock_timestamp())
  AND EXISTS (SELECT FROM camera_slots s WHERE s.camera_id = cameras.id AND finished_at IS NULL)
"""

_DUE = f"SELECT id FROM cameras WHERE {_IS_DUE} ORDER BY look_until NULLS FIRST, id"  # noqa: S608


def due_cameras(session: Session) -> list[int]:
    """Cameras with a slot that is due, and that no process is polling."""
    return list(session.execute(text(_DUE)).scalars())


_BEGIN = f"""
UPDATE cameras
SET look_token = gen_random_uuid(),
    look_until = clock_timestamp() + make_interval(secs => :lease),
    look_began = coalesce(look_began, clock_timestamp()),
    look_is_sweep = coalesce(
        look_is_sweep,
        swept_at IS NULL OR swept_at < clock_timestamp() - make_interval(secs => sweep_seconds)
    )
WHERE id = :id AND {_IS_DUE}
RETURNING look_token, look_began, look_cursor, look_is_sweep
"""  # noqa: S608


def begin_poll(session: Session, camera_id: int, *, lease_seconds: float) -> Poll | None:
    """Begin a poll, or take over one whose lease has run out; None if nothing is due, or another process holds it."""
    row = session.execute(text(_BEGIN), {"id": camera_id, "lease": lease_seconds}).first()
    if row is None:
        return None
    return Poll(camera_id, row.look_token, row.look_began, row.look_cursor, row.look_is_sweep, lease_seconds)


def advance_poll(session: Session, poll: Poll, cursor: str) -> None:
    """Store that everything up to the cursor is registered, and renew the lease. Raises `PollLostError` if this process
    no longer holds the poll."""
    _held(
        session,
        poll,
        "look_cursor = :cursor, look_until = clock_timestamp() + make_interval(secs => :lease)",
        {"cursor": cursor, "lease": poll.lease_seconds},
    )


def end_poll(session: Session, poll: Poll) -> int:
    """End a poll and the slots that were due when it began; returns how many slots. Raises as `advance_poll`."""
    _held(
        session,
        poll,
        f"{_NO_POLL}, problem = NULL, swept_at = CASE WHEN look_is_sweep THEN look_began ELSE swept_at END",
        {},
    )
    ended = session.execute(
        text(
            """
            UPDATE camera_slots
            SET looks = looks + 1, finished_at = clock_timestamp()
            WHERE camera_id = :id AND finished_at IS NULL AND slot <= :began
            RETURNING slot
            """
        ),
        {"id": poll.camera_id, "began": poll.began},
    )
    return len(ended.all())


def fail_poll(session: Session, poll: Poll, problem: str) -> None:
    """Store that a poll failed: its slots stay due, and it is continued later. Raises as `advance_poll`."""
    _held(
        session,
        poll,
        "problem = :problem, look_token = NULL, look_until = clock_timestamp() + make_interval(secs => :wait)",
        {"problem": problem, "wait": TRY_AGAIN},
    )


#: After this, the next poll begins from the start.
_NO_POLL = "look_token = NULL, look_until = NULL, look_began = NULL, look_cursor = NULL, look_is_sweep = NULL"


def interrupt_poll(session: Session, camera_id: int) -> None:
    """End a running poll of this camera, whose settings have changed: its process is refused at the next batch."""
    session.execute(text(f"UPDATE cameras SET {_NO_POLL} WHERE id = :id"), {"id": camera_id})  # noqa: S608


def _held(session: Session, poll: Poll, assignments: str, parameters: dict[str, Any]) -> None:
    row = session.execute(
        text(f"UPDATE cameras SET {assignments} WHERE id = :id AND look_token = :token RETURNING id"),  # noqa: S608
        {"id": poll.camera_id, "token": poll.token, **parameters},
    ).first()
    if row is None:
        raise PollLostError(f"this process no longer holds the poll of camera {poll.camera_id}")


_PROBLEMS = """
SELECT count(*)
FROM cameras
WHERE problem IS NOT NULL
  AND disabled_at IS NULL
  AND removed_at IS NULL
"""


def count_problems(session: Session) -> int:
    """How many cameras could not be polled when it was last tried."""
    return session.scalar(text(_PROBLEMS)) or 0


def newest_known(session: Session, camera_id: int, bucket: str, prefix: str) -> tuple[str, datetime] | None:
    """The key and time of a camera's newest footage below a prefix, by the times in its keys; None before there is
    any."""
    row = session.execute(
        text(
            """
            SELECT key, observed_at
            FROM media_objects
            WHERE camera_id = :camera
              AND bucket = :bucket
              AND starts_with(key, :prefix)
              AND observed_at_source = 'key_pattern'
              AND superseded_at IS NULL
            ORDER BY observed_at DESC
            LIMIT 1
            """
        ),
        {"camera": camera_id, "bucket": bucket, "prefix": prefix},
    ).first()
    return None if row is None else (row.key, row.observed_at)
