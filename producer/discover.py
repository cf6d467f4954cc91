"""What lies in a source: listed page by page, planned by the pure rules, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

from common.domain import TimeRange
from common.planning import PlannedObject, TimePattern, plan_object
from common.storage import ObjectInfo, ObjectStore, is_storable

#: How many objects that are not analysed are named in a report.
NAMED = 5


@dataclass(slots=True)
class Page:
    """One page of a listing, sorted into what becomes of it."""

    planned: list[PlannedObject] = field(default_factory=list)
    #: Objects of kinds that Maskwatch does not analyse.
    others: list[ObjectInfo] = field(default_factory=list)
    outside_range: int = 0
    last_key: str = ""


def discover(
    store: ObjectStore, prefix: str, *, pattern: TimePattern | None, where: ZoneInfo, within: TimeRange
) -> Iterator[Page]:
    """Pages of planned objects below a prefix, in key order."""
    for objects in store.list_pages(prefix):
        page = Page()
        for info in objects:
            if not is_storable(info.key):
                page.others.append(info)
                continue
            page.last_key = info.key
            item = plan_object(info, pattern, where)
            if item is None:
                page.others.append(info)
            elif item.best_known_time not in within:
                page.outside_range += 1
            else:
                page.planned.append(item)
        yield page
