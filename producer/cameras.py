"""Polls cameras for new footage, when one of their slots is due."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

from sqlalchemy.orm import Session

from common import ledger
from common.catalog import schedule
from common.catalog.schedule import Poll, PollLostError
from common.database.partitions import ensure_partitions
from common.database.sessions import engine, session_scope, transact
from common.database.tables import Camera, Location, Pipeline
from common.domain import Lane, MaskwatchError, ObjectInfo, TimeRange, first_line
from common.observability.logs import get_logger
from common.settings import Settings
from common.storage.opening import open_source
from common.storage.store import ObjectStore
from common.timestamps import TimePattern, zone
from producer.listing import Page, Rules, list_range, plan_pages

log = get_logger(__name__)

#: How many cameras one producer polls at once; each poll may wait for a slow S3 server.
THREADS = 4


def tick(settings: Settings) -> list[int]:
    """Record the slots that have come due; returns the cameras to poll."""
    with session_scope() as session:
        noted = schedule.note_slots(session)
        waiting = schedule.due_cameras(session)
    if noted:
        log.info("slots are due", slots=noted)
    return waiting


class Poller:
    """Polls cameras in threads of its own, so that dispatching does not wait for a listing."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="poll")
        self._polling: set[int] = set()
        self._lock = threading.Lock()

    def poll(self, camera_ids: list[int], settings: Settings) -> None:
        """Start polling those of the cameras that no thread here is polling, as far as threads are free."""
        for camera_id in camera_ids:
            with self._lock:
                if camera_id in self._polling or len(self._polling) >= THREADS:
                    continue
                self._polling.add(camera_id)
            self._threads.submit(self._run, camera_id, settings)

    def _run(self, camera_id: int, settings: Settings) -> None:
        try:
            poll_camera(camera_id, settings)
        except Exception:
            # The camera's slots stay due, and the lease of this poll runs out.
            log.exception("a camera's poll ended with an error", camera=camera_id)
        finally:
            with self._lock:
                self._polling.discard(camera_id)


def poll_camera(camera_id: int, settings: Settings) -> int | None:
    """Enqueue the new objects of a camera, and end its slots; returns how many objects are new. None if no slot is due,
    another producer polls the camera, or the poll failed."""
    with session_scope() as session:
        poll = schedule.begin_poll(session, camera_id, lease_seconds=settings.dispatch.poll_lease_seconds)
    if poll is None:
        return None
    try:
        return _enqueue_new(poll, settings)
    except PollLostError as error:
        log.warning(str(error))
    except Exception as error:
        known = isinstance(error, MaskwatchError)
        problem = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        log.error("a camera's poll failed, and is tried again", camera=camera_id, detail=problem, exc_info=not known)
        try:
            with session_scope() as session:
                schedule.fail_poll(session, poll, problem)
        except PollLostError:
            pass
    return None


def _enqueue_new(poll: Poll, settings: Settings) -> int:
    with session_scope() as session:
        camera = session.get_one(Camera, poll.camera_id)
        location = session.get_one(Location, camera.location_id)
        pipeline = session.get_one(Pipeline, camera.pipeline_id)
    assert camera.source is not None, "a camera on a schedule has a source"
    store, prefix = open_source(camera.source, settings)
    pattern = TimePattern(camera.time_pattern) if camera.time_pattern else None
    new = listed = 0
    rules = Rules(pattern, zone(location.time_zone), TimeRange())

    def register(page: Page, session: Session) -> ledger.Registered:
        schedule.advance_poll(session, poll, page.last_key or poll.cursor or "")
        return ledger.register(
            session, page.planned, location=location, camera=camera, pipeline=pipeline, lane=Lane.LIVE
        )

    for page in plan_pages(_new_objects(poll, camera, location, pattern, store, prefix), rules):
        ensure_partitions(engine(), (item.best_known_time for item in page.planned))
        new += transact(partial(register, page)).new
        listed += len(page)
    with session_scope() as session:
        ended = schedule.end_poll(session, poll)
    log.info("polled a camera", camera=camera.name, sweep=poll.is_full_scan, listed=listed, new=new, slots=ended)
    return new


def _new_objects(
    poll: Poll, camera: Camera, location: Location, pattern: TimePattern | None, store: ObjectStore, prefix: str
) -> Iterator[ObjectInfo]:
    """The objects that can be new: in a full scan all of them. Else, if keys sort by time, those that are at most
    `look_back_seconds` older than the newest known object."""
    after = poll.cursor or ""
    if not poll.is_full_scan and pattern is not None:
        with session_scope() as session:
            newest = schedule.newest_known(session, camera.id, store.bucket, prefix)
        if newest is not None:
            key, seen = newest
            since = min(seen, datetime.now(UTC)) - timedelta(seconds=camera.look_back_seconds)
            local = since.astimezone(zone(location.time_zone)).replace(tzinfo=None)
            # In keys, a clock change (of half an hour or an hour) looks like lateness: the look-back covers both.
            after = max(after, pattern.key_before(key, local, prefix) or "")
    return list_range(store, prefix, after)
