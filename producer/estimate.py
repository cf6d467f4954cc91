"""A dry run: what a backfill would find, make and cost. Lists everything and writes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select

from common import ledger
from common.catalog import places
from common.database.sessions import session_scope
from common.database.tables import Pipeline
from common.domain import MediaKind, ObjectInfo, SampleMode
from common.models.pipeline import pipeline_spec
from common.reporting.cost_model import CostModel, Origin, Rate, measured
from common.settings import Settings
from common.storage.opening import open_source
from common.timestamps import TimePattern, zone
from producer.inventory import open_inventory
from producer.listing import Page, Rules, list_range, plan_pages
from producer.submit import check_time_pattern, range_of

#: AWS's prices for restoring archived data: US dollars per GB and per 1,000 requests, by class and tier. List
#: prices of us-east-1 (aws.amazon.com/s3/pricing; its knowledge center, "s3-manage-data-retrieval"), without the
#: storage of the copies. Other regions differ by some percent.
RESTORE_PRICES = {
    ("GLACIER", "Bulk"): (0.0, 0.0),
    ("GLACIER", "Standard"): (0.01, 0.05),
    ("GLACIER", "Expedited"): (0.03, 10.0),
    ("DEEP_ARCHIVE", "Bulk"): (0.0025, 0.025),
    ("DEEP_ARCHIVE", "Standard"): (0.02, 0.10),
}


@dataclass(slots=True)
class Found:
    """How much lies in a source, and how much of it a backfill would enqueue."""

    listed: int = 0
    others: int = 0
    outside_range: int = 0
    #: Analysed or enqueued already, with this pipeline.
    known: int = 0
    #: Would be quarantined: no time can be read from their keys.
    unplaced: int = 0
    images: int = 0
    videos: int = 0
    image_bytes: int = 0
    video_bytes: int = 0
    #: Objects and bytes in archives, by storage class; also counted above only if they are to be restored.
    archived: Counter[str] = field(default_factory=Counter)
    archived_bytes: Counter[str] = field(default_factory=Counter)
    first_seen: datetime | None = None
    last_seen: datetime | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The result of a dry run. A figure that can't be known yet is None."""

    source: str
    #: The manifest of the inventory that was read instead of a listing.
    inventory: str | None
    location: str
    found: Found
    cost_model: CostModel
    footage_hours: float | None
    jobs: int | None
    face_rows: int | None
    worker_hours: float | None
    #: The number of worker processes that `hours` is computed for.
    workers: int
    hours: float | None
    cost: float | None
    #: US dollars, by the tier asked for (bulk if none is); 0 where nothing is archived.
    restore_cost: float | None

    def as_dict(self) -> dict[str, Any]:
        found, rates = self.found, self.cost_model
        return {
            "source": self.source,
            "inventory": self.inventory,
            "location": self.location,
            "objects": found.images + found.videos,
            "bytes": found.image_bytes + found.video_bytes,
            **{name: getattr(found, name) for name in Found.__slots__},
            **{
                name: getattr(self, name)
                for name in (
                    "footage_hours", "jobs", "face_rows", "worker_hours", "workers", "hours", "cost", "restore_cost",
                )
            },
            "throughput": {
                name: {"value": getattr(rates, name).value, "origin": getattr(rates, name).origin}
                for name in CostModel.__slots__
            },
        }  # fmt: skip


def estimate(
    settings: Settings,
    source: str,
    *,
    location_name: str,
    time_pattern: str | None = None,
    bounds: tuple[datetime | None, datetime | None] = (None, None),
    inventory_uri: str | None = None,
    restore_tier: str | None = None,
    workers: int = 1,
    price_per_hour: float | None = None,
    on_page: Callable[[int], None] = lambda listed: None,
) -> Estimate:
    """List everything below `source` as `submit` would, and estimate its jobs and cost. Raises as `submit` does."""
    pattern = TimePattern(time_pattern) if time_pattern else None
    store, prefix = open_source(source, settings)
    inventory = open_inventory(inventory_uri, store.bucket, settings) if inventory_uri else None
    spec = pipeline_spec(settings)
    with session_scope() as session:
        location = places.get_location(session, location_name)
        pipeline_id = session.scalar(select(Pipeline.id).where(Pipeline.fingerprint == spec.fingerprint))
        rates = measured(session, pipeline_id, location_name)
    where = zone(location.time_zone)
    rules = Rules(pattern, where, range_of(bounds, where))

    def objects() -> Iterator[ObjectInfo | None]:
        return inventory.objects(prefix) if inventory else list_range(store, prefix)

    check_time_pattern(plan_pages(objects(), rules, batch=settings.storage.list_page_size), time_pattern, source)
    found = Found()
    for page in plan_pages(objects(), rules):
        with session_scope() as session:
            known = ledger.known_keys(session, page.planned, pipeline_id)
        _count(found, page, known, restoring=restore_tier is not None)
        on_page(found.listed)
    named = inventory.uri if inventory else None
    return _estimated(settings, source, named, location_name, found, rates, restore_tier, workers, price_per_hour)


def _count(found: Found, page: Page, known: set[str], *, restoring: bool) -> None:
    found.listed += len(page)
    found.others += len(page.others)
    found.outside_range += page.outside_range
    for item in page.planned:
        if item.reason in ledger.UNPLACED:
            found.unplaced += 1
            continue
        if item.info.key in known:
            found.known += 1
            continue
        if item.info.archived:
            assert item.info.storage_class is not None
            found.archived[item.info.storage_class] += 1
            found.archived_bytes[item.info.storage_class] += item.info.size_bytes
            if not restoring:
                continue
        if item.kind is MediaKind.IMAGE:
            found.images += 1
            found.image_bytes += item.info.size_bytes
        else:
            found.videos += 1
            found.video_bytes += item.info.size_bytes
        seen = item.best_known_time
        found.first_seen = min(found.first_seen or seen, seen)
        found.last_seen = max(found.last_seen or seen, seen)


def _estimated(
    settings: Settings,
    source: str,
    inventory: str | None,
    location: str,
    found: Found,
    rates: CostModel,
    restore_tier: str | None,
    workers: int,
    price_per_hour: float | None,
) -> Estimate:
    footage = _divided(found.video_bytes, rates.bytes_per_footage_second) if found.videos else 0.0
    # A video's last chunk is shorter than the others: half as long on average.
    chunks = None if footage is None else math.ceil(footage / settings.worker.chunk_seconds + found.videos / 2)
    faces = None
    if footage is not None:
        in_images = _times(found.images, rates.faces_per_image)
        in_videos = _times(footage * settings.pipeline.sample_fps, rates.faces_per_frame)
        faces = None if in_images is None or in_videos is None else round(in_images + in_videos)
    hours = None
    if footage is not None:
        seconds = (
            found.images * _known(rates.seconds_per_image)
            + found.videos * _known(rates.seconds_per_probe)
            + footage * _footage_cost(settings, rates)
        )
        hours = seconds / 3600
    return Estimate(
        source,
        inventory,
        location,
        found,
        rates,
        footage_hours=None if footage is None else footage / 3600,
        jobs=None if chunks is None else found.images + found.videos + chunks,
        face_rows=faces,
        worker_hours=hours,
        workers=workers,
        hours=None if hours is None else hours / workers,
        cost=None if hours is None or price_per_hour is None else hours * price_per_hour,
        restore_cost=_restore_cost(found, restore_tier or "Bulk"),
    )


def _known(rate: Rate) -> float:
    assert rate.value is not None, "how long a job takes is always known, if only by the benchmark"
    return rate.value


def _footage_cost(settings: Settings, rates: CostModel) -> float:
    rate = rates.seconds_per_footage_second
    # The benchmark's rate is per frame. A video's number of keyframes is unknown; at most one per cell is used.
    per_second = settings.pipeline.sample_fps if rate.origin is Origin.BENCHMARK else 1
    if settings.pipeline.sample is SampleMode.KEYFRAMES:
        per_second = min(per_second, 1)
    return _known(rate) * per_second


def _times(amount: float, rate: Rate) -> float | None:
    """The amount at a rate; 0 for an amount of 0, even if the rate is unknown."""
    if not amount:
        return 0.0
    return None if rate.value is None else amount * rate.value


def _divided(amount: float, rate: Rate) -> float | None:
    return None if rate.value is None else amount / rate.value


def _restore_cost(found: Found, tier: str) -> float | None:
    total = 0.0
    for storage_class, count in found.archived.items():
        prices = RESTORE_PRICES.get((storage_class, tier))
        if prices is None:
            return None
        total += found.archived_bytes[storage_class] / 2**30 * prices[0] + count / 1000 * prices[1]
    return total
