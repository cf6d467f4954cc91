"""What lies in a source: listed batch by batch, planned by the pure rules, nothing written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from zoneinfo import ZoneInfo

from common.domain import ObjectInfo, TimeRange
from common.planning import PlannedObject, plan_object
from common.storage.store import ObjectStore, is_storable
from common.timestamps import TimePattern, hour_of

#: Objects per batch, which is registered in one transaction: with more, nothing gets quicker.
BATCH = 2000

#: Rows of an inventory that are read for a batch at most, however few are wanted: a pause is noticed between two.
ROWS = 200_000

#: Parts that a listing is divided into at most; more than threads that list, so that none waits for a long one.
PARTS = 64


@dataclass(slots=True)
class Page:
    """A batch of a listing, sorted into what becomes of it."""

    planned: list[PlannedObject] = field(default_factory=list)
    #: Objects of kinds that Maskwatch does not analyse.
    others: list[ObjectInfo] = field(default_factory=list)
    outside_range: int = 0
    last_key: str = ""
    #: What was read for it, rows of an inventory that are no objects of the source included.
    rows: int = 0

    def __len__(self) -> int:
        return len(self.planned) + len(self.others) + self.outside_range

    @property
    def size_bytes(self) -> int:
        """Of what is to be analysed."""
        return sum(item.info.size_bytes for item in self.planned)


@dataclass(frozen=True, slots=True)
class Rules:
    """How listed objects are planned."""

    pattern: TimePattern | None
    where: ZoneInfo
    within: TimeRange
    #: Only what was seen in these hours of the place, by the instants they begin; None: in any.
    hours: frozenset[datetime] | None = None

    def wanted(self, item: PlannedObject) -> bool:
        """Whether an object was taken when it should have been."""
        at = item.best_known_time
        if at not in self.within:
            return False
        return self.hours is None or hour_of(at, self.where) in self.hours


def list_range(store: ObjectStore, prefix: str, after: str = "", until: str | None = None) -> Iterator[ObjectInfo]:
    """Objects below a prefix whose keys come after one, up to and with another, in key order."""
    for objects in store.list_pages(prefix, after):
        for info in objects:
            if until is not None and info.key > until:
                return
            yield info


def plan_pages(objects: Iterable[ObjectInfo | None], rules: Rules, *, batch: int = BATCH) -> Iterator[Page]:
    """Objects planned, in batches of that many listed ones; None is only counted as read."""
    page = Page()
    for info in objects:
        page.rows += 1
        if info is None:
            if page.rows >= ROWS:
                yield page
                page = Page()
            continue
        if not is_storable(info.key):
            page.others.append(info)
        else:
            page.last_key = info.key
            item = plan_object(info, rules.pattern, rules.where)
            if item is None:
                page.others.append(info)
            elif not rules.wanted(item):
                page.outside_range += 1
            else:
                page.planned.append(item)
        if len(page) >= batch:
            yield page
            page = Page()
    if page.rows:
        yield page


def divide(store: ObjectStore, prefix: str) -> list[tuple[str, str | None]]:
    """Ranges of keys (after, up to and with) that together are all keys below a prefix, by its folders: at most
    `PARTS`, one where it has none."""
    folders = store.list_folders(prefix, 1000)
    # One folder holds it all, as a year does its months: what matters is further down.
    while len(folders) == 1 and (deeper := store.list_folders(folders[0], 1000)):
        folders = deeper
    step = -(-len(folders) // PARTS) or 1
    bounds = folders[step::step]
    return list(zip(["", *bounds], [*bounds, None], strict=True))
