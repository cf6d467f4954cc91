"""A backfill: discover, plan, register in the ledger, page by page. Running it again adds nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import func, update

from common import catalog, ledger
from common.database import engine, session_scope
from common.domain import Lane, MaskwatchError, Reason, TimeRange
from common.partitions import ensure_partitions
from common.planning import TimePattern, resolve_local, zone
from common.settings import Settings
from common.storage import open_source
from common.tables import Backfill
from producer.discover import NAMED, Page, discover


@dataclass(slots=True)
class BackfillReport:
    """What a backfill found, in objects."""

    id: int
    source: str
    location: str
    camera: str | None
    listed: int = 0
    new: int = 0
    known: int = 0
    superseded: int = 0
    #: Of the new ones: those that could only be quarantined.
    quarantined: int = 0
    outside_range: int = 0
    others: int = 0
    others_named: list[str] = field(default_factory=list)
    erased: int = 0
    elsewhere: int = 0
    first_elsewhere: str | None = None
    #: False when the location shows the figures of another pipeline.
    shown: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if type(value) is int and name != "id"}


def submit(
    settings: Settings,
    source: str,
    *,
    location_name: str,
    camera_name: str | None = None,
    time_pattern: str | None = None,
    bounds: tuple[datetime | None, datetime | None] = (None, None),
    on_page: Callable[[BackfillReport], None] = lambda report: None,
) -> BackfillReport:
    """Register everything below `source` that was taken within `bounds` (half-open; naive: the location's
    clock). Each page is one transaction: a crash keeps the pages before it.

    Raises `MaskwatchError` for an unknown location or camera, a source that can't be listed, and a time
    pattern that fits none of the first page of pictures and videos (a typo must not quarantine an archive).
    """
    pattern = TimePattern(time_pattern) if time_pattern else None
    store, prefix = open_source(source, settings)
    with session_scope() as session:
        location = catalog.get_location(session, location_name)
        camera = catalog.get_camera(session, location, camera_name) if camera_name else None
        pipeline = catalog.ensure_pipeline(session, settings.pipeline.spec())
        session.flush()
    where = zone(location.time_zone)
    within = _range(bounds, where)
    pages = discover(store, prefix, pattern=pattern, where=where, within=within)
    # Listed before anything is written, up to the first picture: a bucket that isn't there leaves no trace, and
    # a pattern that fits nothing is noticed.
    report = BackfillReport(0, source, location_name, camera_name)
    page = next(pages, None)
    while page is not None and not page.planned:
        _add(report, page, ledger.Registered())
        page = next(pages, None)
    if pattern and page and page.planned and all(p.reason is Reason.TIME_PATTERN_MISMATCH for p in page.planned):
        raise MaskwatchError(
            f"the time pattern {time_pattern!r} matches none of the first {len(page.planned)} pictures and videos "
            f"below {source} (the first is {page.planned[0].info.key!r}); nothing was enqueued"
        )
    with session_scope() as session:
        row = Backfill(
            source=source,
            location_id=location.id,
            camera_id=camera.id if camera else None,
            pipeline_id=pipeline.id,
            since=within.start,
            until=within.end,
            time_pattern=time_pattern,
        )
        session.add(row)
        session.flush()
        current = catalog.get_location(session, location_name)
        if current.promoted_pipeline_id is None:
            catalog.promote(session, current, pipeline)
        report.id, report.shown = row.id, current.promoted_pipeline_id == pipeline.id
    while page is not None:
        ensure_partitions(engine(), (item.best_known_time for item in page.planned))
        with session_scope() as session:
            registered = ledger.register(
                session,
                page.planned,
                location=location,
                camera=camera,
                pipeline=pipeline,
                lane=Lane.BACKFILL,
                backfill_id=report.id,
            )
            _add(report, page, registered)
            session.execute(
                update(Backfill).where(Backfill.id == report.id).values(counts=report.counts(), cursor=page.last_key)
            )
        on_page(report)
        page = next(pages, None)
    with session_scope() as session:
        session.execute(
            update(Backfill)
            .where(Backfill.id == report.id)
            .values(finished_at=func.clock_timestamp(), counts=report.counts())
        )
    return report


def _range(bounds: tuple[datetime | None, datetime | None], where: ZoneInfo) -> TimeRange:
    try:
        return TimeRange(*(None if bound is None else resolve_local(bound, where)[0] for bound in bounds))
    except ValueError as error:
        raise MaskwatchError(f"--since and --until: {error}") from error


def _add(report: BackfillReport, page: Page, registered: ledger.Registered) -> None:
    report.listed += len(page.planned) + len(page.others) + page.outside_range
    report.new += registered.new
    report.known += registered.known
    report.superseded += registered.superseded
    report.quarantined += registered.quarantined
    report.erased += registered.erased
    report.elsewhere += registered.elsewhere
    report.first_elsewhere = report.first_elsewhere or registered.first_elsewhere
    report.outside_range += page.outside_range
    report.others += len(page.others)
    room = NAMED - len(report.others_named)
    report.others_named += [info.uri.encode("utf-8", "replace").decode() for info in page.others[:room]]
