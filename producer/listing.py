"""Lists a source in batches, and plans its objects. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from zoneinfo import ZoneInfo

from common.domain import ObjectInfo, TimeRange
from common.planning import PlannedObject, plan_object
from common.storage.store import ObjectStore, is_storable
from common.timestamps import TimePattern, hour_of

#: Objects per batch, which is registered in one transaction; larger batches are not quicker.
BATCH = 2000

#: How many rows of an inventory are read for a batch at most, however few of them are wanted: a pause is noticed only
#: between batches.
ROWS = 200_000

#: How many parts a listing is divided into at most; more than threads, so that no thread is idle while another lists
#: a long part.
PARTS = 64


@dataclass(slots=True)
class Page:
    """A batch of a listing, sorted by what is done with its objects."""

    planned: list[PlannedObject] = field(default_factory=list)
    #: Objects of kinds that Maskwatch does not analyse.
    others: list[ObjectInfo] = field(default_factory=list)
    outside_range: int = 0
    last_key: str = ""
    #: How many rows were read, including rows of an inventory that are not objects of the source.
    rows: int = 0

    def __len__(self) -> int:
        return len(self.planned) + len(self.others) + self.outside_range

    @property
    def size_bytes(self) -> int:
        """Size of the objects that are to be analysed."""
        return sum(item.info.size_bytes for item in self.planned)


@dataclass(frozen=True, slots=True)
class Rules:
    """How listed objects are planned."""

    pattern: TimePattern | None
    where: ZoneInfo
    within: TimeRange
    #: Only what was seen in these local hours, given by the instants they begin; None: in any hour.
    hours: frozenset[datetime] | None = None

    def wanted(self, item: PlannedObject) -> bool:
        """Whether an object was taken within the range and the hours."""
        at = item.best_known_time
        if at not in self.within:
            return False
        return self.hours is None or hour_of(at, self.where) in self.hours


def list_range(store: ObjectStore, prefix: str, after: str = "", until: str | None = None) -> Iterator[ObjectInfo]:
    """Objects below a prefix whose keys come after `after`, up to and including `until`, in key order."""
    for objects in store.list_pages(prefix, after):
        for info in objects:
            if until is not None and info.key > until:
                return
            yield info


def plan_pages(objects: Iterable[ObjectInfo | None], rules: Rules, *, batch: int = BATCH) -> Iterator[Page]:
    """Plan the objects, in pages of `batch` listed ones; None only counts as a row that was read."""
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
    """Ranges of keys (after, up to and including) that together cover all keys below a prefix, cut at its folders: at
    most `PARTS`, and one if it has no folders."""
    folders = store.list_folders(prefix, 1000)
    # A single folder, such as a year with its months, is divided by the folders in it.
    while len(folders) == 1 and (deeper := store.list_folders(folders[0], 1000)):
        folders = deeper
    step = -(-len(folders) // PARTS) or 1
    bounds = folders[step::step]
    return list(zip(["", *bounds], [*bounds, None], strict=True))
