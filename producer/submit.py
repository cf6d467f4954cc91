"""A backfill: list, plan and register objects in the ledger, batch by batch. Running it again adds nothing; after its
process was killed, it goes on where it was."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import select
from sqlalchemy.orm import Session

from common import ledger
from common.catalog import backfills
from common.catalog import places as catalog
from common.database.partitions import ensure_partitions
from common.database.sessions import engine, session_scope, transact
from common.database.tables import Backfill, BackfillPart, Camera, Location, Pipeline
from common.domain import Lane, MaskwatchError, ObjectInfo, PermanentJobError, Reason, TimeRange, TransientJobError
from common.ledger import circuit_breaker
from common.ledger.audit import operator
from common.models.pipeline import pipeline_spec
from common.reporting.coverage import coverage, failed_jobs
from common.settings import Settings
from common.storage.opening import open_source
from common.storage.store import ObjectStore
from common.timestamps import TimePattern, resolve_local, zone
from producer.inventory import Inventory, open_inventory
from producer.listing import Page, Rules, divide, list_range, plan_pages

#: How many objects that are not analysed are named in a report.
NAMED = 5


@dataclass(slots=True)
class BackfillReport:
    """What a backfill found, in objects."""

    id: int
    source: str
    location: str
    camera: str | None
    #: The manifest of the inventory that was read instead of a listing.
    inventory: str | None = None
    listed: int = 0
    new: int = 0
    known: int = 0
    superseded: int = 0
    #: How many of the new ones were quarantined at once.
    quarantined: int = 0
    outside_range: int = 0
    others: int = 0
    others_named: list[str] = field(default_factory=list)
    erased: int = 0
    elsewhere: int = 0
    first_elsewhere: str | None = None
    #: In an archive, and not restored.
    archived: int = 0
    #: How many of the archived ones S3 was asked to restore.
    restoring: int = 0
    first_not_restored: str | None = None
    #: Size of what is to be analysed.
    bytes: int = 0
    #: How many have the ETag and the size of another object of this backfill.
    same_bytes: int = 0
    #: False when the location shows the figures of another pipeline.
    shown: bool = True
    #: True when an earlier call had begun it.
    resumed: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Restore:
    """How archived objects are restored: S3's tier, and how many days the copy is kept."""

    tier: str
    days: int


@dataclass(frozen=True, slots=True)
class Places:
    """The location, camera and pipeline that a backfill's footage is counted for."""

    location: Location
    camera: Camera | None
    pipeline: Pipeline


def submit(
    settings: Settings,
    source: str,
    *,
    location_name: str,
    camera_name: str | None = None,
    time_pattern: str | None = None,
    bounds: tuple[datetime | None, datetime | None] = (None, None),
    inventory_uri: str | None = None,
    restore: Restore | None = None,
    threads: int = 1,
    on_page: Callable[[BackfillReport], None] = lambda report: None,
) -> BackfillReport:
    """Register everything below `source` that was taken within `bounds` (half-open; naive: the location's
    clock), from a listing or an inventory. Each batch is one transaction: a crash keeps the batches before it, and
    the same call goes on behind them.

    Raises `MaskwatchError` for an unknown location or camera, a source that can't be listed, an inventory that can't
    be read or has nothing below it, and a time pattern that fits none of the first pictures and videos (a typo must not
    quarantine an archive).
    """
    pattern = TimePattern(time_pattern) if time_pattern else None
    store, prefix = open_source(source, settings)
    inventory = open_inventory(inventory_uri, store.bucket, settings) if inventory_uri else None
    with session_scope() as session:
        location = catalog.get_location(session, location_name)
        camera = catalog.get_camera(session, location, camera_name) if camera_name else None
        pipeline = catalog.ensure_pipeline(session, pipeline_spec(settings))
        session.flush()
    places = Places(location, camera, pipeline)
    where = zone(location.time_zone)
    within = range_of(bounds, where)
    rules = Rules(pattern, where, within)
    # The first images are listed before anything is written: a missing bucket leaves no trace, and a pattern that fits
    # nothing is noticed.
    objects = inventory.objects(prefix) if inventory else list_range(store, prefix)
    check_time_pattern(plan_pages(objects, rules, batch=settings.storage.list_page_size), time_pattern, source)
    wanted = Backfill(
        source=source,
        inventory=inventory.uri if inventory else None,
        location_id=location.id,
        camera_id=camera.id if camera else None,
        pipeline_id=pipeline.id,
        since=within.start,
        until=within.end,
        time_pattern=time_pattern,
    )
    parts: list[dict[str, Any]] = (
        [{"manifest_file": file} for file in inventory.files]
        if inventory
        else [{"begins_after": after, "ends_with": end} for after, end in divide(store, prefix)]
    )
    with session_scope() as session:
        ledger.check_places(session, location, camera)
        wanted.source_id = circuit_breaker.ensure(session, store.bucket)
        found = backfills.find_unfinished(session, wanted)
        if found is None:
            session.add(wanted)
            session.flush()
            backfills.add_parts(session, wanted.id, parts)
        backfill = found or wanted
        current = catalog.get_location(session, location_name)
        if current.promoted_pipeline_id is None:
            catalog.promote(session, current, pipeline)
        report = BackfillReport(
            backfill.id, source, location_name, camera_name, wanted.inventory, resumed=found is not None
        )
        report.shown = current.promoted_pipeline_id == pipeline.id
    Lister(settings, backfill, places, store, prefix, inventory, rules, restore, report, on_page).run(threads)
    return report


def take_up(
    settings: Settings,
    backfill_id: int,
    *,
    restore: Restore | None = None,
    threads: int = 1,
    on_page: Callable[[BackfillReport], None] = lambda report: None,
) -> BackfillReport:
    """List the rest of a backfill; nothing is left if it was listed to its end."""
    with session_scope() as session:
        backfill = backfills.get(session, backfill_id)
        location = session.get_one(Location, backfill.location_id)
        camera = session.get_one(Camera, backfill.camera_id) if backfill.camera_id is not None else None
        pipeline = session.get_one(Pipeline, backfill.pipeline_id)
        shown = location.promoted_pipeline_id == pipeline.id
    store, prefix = open_source(backfill.source, settings)
    inventory = open_inventory(backfill.inventory, store.bucket, settings) if backfill.inventory else None
    pattern = TimePattern(backfill.time_pattern) if backfill.time_pattern else None
    rules = Rules(pattern, zone(location.time_zone), backfills.within(backfill))
    camera_name = camera.name if camera else None
    report = BackfillReport(
        backfill.id, backfill.source, location.name, camera_name, backfill.inventory, shown=shown, resumed=True
    )
    places = Places(location, camera, pipeline)
    Lister(settings, backfill, places, store, prefix, inventory, rules, restore, report, on_page).run(threads)
    return report


def check_time_pattern(pages: Iterator[Page], time_pattern: str | None, source: str) -> None:
    """List up to the first page with images or videos. Raises `MaskwatchError` if the pattern fits none of them."""
    page = next((page for page in pages if page.planned), None)
    if time_pattern is None or page is None or not all(item.reason in ledger.UNPLACED for item in page.planned):
        return
    first = page.planned[0]
    what = (
        f"matches none of the first {len(page.planned)} pictures and videos below {source} (the first is "
        f"{first.info.key!r})"
        if all(item.reason is Reason.TIME_PATTERN_MISMATCH for item in page.planned)
        else f"gives none of the first {len(page.planned)} pictures and videos below {source} a time: {first.detail}"
    )
    raise MaskwatchError(f"the time pattern {time_pattern!r} {what}; nothing was enqueued")


def fill_gaps(
    settings: Settings,
    *,
    location_name: str,
    camera_name: str,
    bounds: tuple[datetime | None, datetime | None] = (None, None),
    on_page: Callable[[int], None] = lambda listed: None,
) -> tuple[int, int, int]:
    """Enqueue the objects of a camera's source in hours that lack footage, and retry the failed jobs of these hours;
    returns how many hours lack footage, how many objects are new, and how many jobs are tried again.

    Raises `MaskwatchError` for a camera without a source.
    """
    with session_scope() as session:
        location = catalog.get_location(session, location_name)
        camera = catalog.get_camera(session, location, camera_name)
        if camera.source is None:
            raise MaskwatchError(
                f"camera {camera_name!r} has no source; name one: maskwatch cameras change {camera_name} --location "
                f"{location_name} --source s3://bucket/prefix/ --every 5m"
            )
        holes = [row.hour for row in coverage(session, camera, *bounds) if row.is_hole]
        pipeline = session.get_one(Pipeline, location.promoted_pipeline_id) if holes else None
        again = ledger.retry(session, failed_jobs(session, camera, holes), by=operator()) if holes else []
    if pipeline is None:
        return 0, 0, 0
    pattern = TimePattern(camera.time_pattern) if camera.time_pattern else None
    rules = Rules(pattern, zone(location.time_zone), TimeRange(), frozenset(holes))
    store, prefix = open_source(camera.source, settings)
    new = listed = 0

    def register(page: Page, session: Session) -> ledger.Registered:
        registered = ledger.register(
            session, page.planned, location=location, camera=camera, pipeline=pipeline, lane=Lane.BACKFILL
        )
        if session.scalar(select(Camera.time_pattern).where(Camera.id == camera.id)) != camera.time_pattern:
            raise MaskwatchError(f"the time pattern of {camera_name!r} was changed meanwhile: give the command again")
        return registered

    for page in plan_pages(list_range(store, prefix), rules):
        ensure_partitions(engine(), (item.best_known_time for item in page.planned))
        new += transact(partial(register, page)).new
        listed += len(page)
        on_page(listed)
    return len(holes), new, len(again)


@dataclass
class Lister:
    """Lists the rest of a backfill, part by part, and registers what it finds."""

    settings: Settings
    backfill: Backfill
    places: Places
    store: ObjectStore
    prefix: str
    inventory: Inventory | None
    rules: Rules
    restore: Restore | None
    report: BackfillReport
    on_page: Callable[[BackfillReport], None]
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, threads: int) -> None:
        """List all open parts. Raises the error that stops it; batches registered until then stay, and are not listed
        again."""
        number = self.backfill.id
        with backfills.listing(engine(), number):
            with session_scope() as session:
                backfills.check_wanted(session, number)
                parts = backfills.open_parts(session, number)
                self._add(backfills.counted(session, number))
            self.on_page(self.report)
            self._list_all(parts, threads)
            with session_scope() as session:
                backfills.finish(session, number)
                self.report.same_bytes = ledger.same_bytes(session, number)

    def _list_all(self, parts: list[BackfillPart], threads: int) -> None:
        if threads == 1 or len(parts) < 2:
            for part in parts:
                self.list_part(part)
            return
        with ThreadPoolExecutor(min(threads, len(parts)), thread_name_prefix="list") as pool:
            futures = [pool.submit(self.list_part, part) for part in parts]
            wait(futures, return_when=FIRST_EXCEPTION)
            pool.shutdown(wait=True, cancel_futures=True)
            for future in futures:
                if not future.cancelled():
                    future.result()

    def list_part(self, part: BackfillPart) -> None:
        """List and register a part, from its cursor to its end."""
        counts = Counter(part.counts)
        for page, cursor in self._pages(part):
            found = self._register(part, page, cursor, counts)
            with self._lock:
                self._add(found)
                self._name(page)
                self.on_page(self.report)
        with session_scope() as session:
            backfills.finish_part(session, part)

    def _pages(self, part: BackfillPart) -> Iterator[tuple[Page, str]]:
        """The part's pages after its cursor, each with the cursor that follows it: a key, or a number of rows."""
        if part.manifest_file is None:
            objects = list_range(self.store, self.prefix, part.cursor or part.begins_after, part.ends_with)
            for page in plan_pages(objects, self.rules):
                yield page, page.last_key or part.begins_after
        else:
            assert self.inventory is not None, "a part with a manifest file belongs to a backfill with an inventory"
            done = int(part.cursor or 0)
            rows = self.inventory.objects_of(part.manifest_file, self.prefix, after=done)
            for page in plan_pages(rows, self.rules):
                done += page.rows
                yield page, str(done)

    def _register(self, part: BackfillPart, page: Page, cursor: str, counts: Counter[str]) -> Counter[str]:
        """Register one page in the ledger; returns what was found in it, and adds it to the part's counts."""
        ensure_partitions(engine(), (item.best_known_time for item in page.planned))
        found = Counter(
            listed=len(page), others=len(page.others), outside_range=page.outside_range, bytes=page.size_bytes
        )
        archived = [item.info for item in page.planned if item.info.archived]
        found["archived"] = len(archived)
        moves = not (archived and self.restore)

        def register(session: Session) -> ledger.Registered:
            backfills.check_wanted(session, self.backfill.id)
            registered = ledger.register(
                session,
                page.planned,
                location=self.places.location,
                camera=self.places.camera,
                pipeline=self.places.pipeline,
                lane=Lane.BACKFILL,
                backfill_id=self.backfill.id,
            )
            if moves:
                backfills.advance(session, part, cursor, counts + found + _counted(registered))
            return registered

        registered = transact(register)
        first = registered.first_elsewhere
        found += _counted(registered)
        if moves:
            counts += found
        if archived and self.restore:
            # Registered first, so that the ledger knows the objects that S3 restores; the cursor moves after S3 was
            # asked.
            found["restoring"] = self._restore(archived, self.restore)
            counts.update(found)
            with session_scope() as session:
                backfills.advance(session, part, cursor, counts)
        with self._lock:
            self.report.first_elsewhere = self.report.first_elsewhere or first
        return found

    def _restore(self, archived: list[ObjectInfo], how: Restore) -> int:
        """Ask S3 to restore a page's archived objects; returns for how many it agreed."""

        def ask(info: ObjectInfo) -> str | None:
            try:
                self.store.restore(info.key, days=how.days, tier=how.tier)
            except (PermanentJobError, TransientJobError) as error:
                return error.detail
            return None

        with ThreadPoolExecutor(16, thread_name_prefix="restore") as pool:
            problems = list(pool.map(ask, archived))
        asked = [info.key for info, problem in zip(archived, problems, strict=True) if problem is None]
        with self._lock:
            self.report.first_not_restored = self.report.first_not_restored or next(filter(None, problems), None)
        with session_scope() as session:
            ledger.restore_requested(
                session, self.store.bucket, asked, check_seconds=self.settings.storage.restore_check_seconds
            )
        return len(asked)

    def _add(self, found: Counter[str]) -> None:
        for name, value in found.items():
            setattr(self.report, name, getattr(self.report, name) + value)

    def _name(self, page: Page) -> None:
        room = NAMED - len(self.report.others_named)
        self.report.others_named += [info.uri.encode("utf-8", "replace").decode() for info in page.others[:room]]


def _counted(registered: ledger.Registered) -> Counter[str]:
    return Counter({name: value for name, value in asdict(registered).items() if isinstance(value, int) and value})


def range_of(bounds: tuple[datetime | None, datetime | None], where: ZoneInfo) -> TimeRange:
    """The range of time between two bounds on the clock of `where`. Raises `MaskwatchError` for an impossible range."""
    try:
        return TimeRange(*(None if bound is None else resolve_local(bound, where)[0] for bound in bounds))
    except ValueError as error:
        raise MaskwatchError(f"--since and --until: {error}") from error


def cancel(backfill_id: int, on_some: Callable[[int], None] = lambda count: None) -> int:
    """Cancel a backfill and all of its jobs that have not ended, some thousand at a time; returns how many."""
    by = operator()
    with session_scope() as session:
        backfills.stop(session, backfill_id, by=by)
    total = 0
    while True:
        with session_scope() as session:
            count = len(backfills.cancel_some(session, backfill_id, by=by))
        if not count:
            return total
        total += count
        on_some(total)
