"""When footage was seen: time patterns of keys, local times and zones, and the choice between several times. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

from common.domain import MaskwatchError, ObservedAt, ObservedAtSource, PermanentJobError, Reason

#: Instants outside [FIRST, END) can't be stored: the schema makes no partition for them (migration 0003).
FIRST = datetime(1970, 1, 1, tzinfo=UTC)
END = datetime(2200, 1, 1, tzinfo=UTC)

#: A clock that lost its power begins with one of these years and runs on: those of Unix, of FAT and DOS, and of many
#: recorders. (MP4 and Macintosh count from 1904, before `FIRST`.)
CLOCK_STARTS = (1970, 1980, 2000)
#: For so long after such a year began, a time says that a clock was not set.
RUNS_ON = timedelta(days=7)
#: No zone is further away from UTC.
LARGEST_OFFSET = timedelta(hours=14)

#: How much later than the upload a time may be: the clocks of a camera and of a store differ, and so do their zones.
AHEAD = timedelta(days=1)


#: strptime directive → regular expression.
_DIRECTIVES = {
    "Y": r"\d{4}", "y": r"\d{2}", "m": r"\d{1,2}", "d": r"\d{1,2}", "H": r"\d{1,2}", "I": r"\d{1,2}",
    "M": r"\d{1,2}", "S": r"\d{1,2}", "f": r"\d{1,6}", "j": r"\d{1,3}", "p": r"[AaPp][Mm]",
    "b": r"[A-Za-z]{3}", "B": r"[A-Za-z]{3,9}", "z": r"Z|[+-]\d{2}:?\d{2}",
}  # fmt: skip


#: Directives that are plain numbers, and the unit of each.
_UNITS = {"Y": "year", "m": "month", "d": "day", "H": "hour", "M": "minute", "S": "second"}


class LocalTimeError(ValueError):
    """A local time that its zone skips (clocks set forward), or that no calendar reaches."""


class TimePattern:
    """A pattern for the time in a key: literal text, strptime directives, and `*` for any text without a slash. The
    pattern is matched against the end of the key, from a slash or the start.

    A directive that appears twice must match the same text both times.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._regex = _compile(pattern)
        names = self._regex.groupindex.keys()
        #: The pattern's directives if all are plain numbers, as in nearly all patterns; else empty. Without this fast
        #: path, strptime would take longer than all the rest of planning.
        self._numbers = [name for name in _UNITS if name in names] if {*"Ymd"} <= names <= {*_UNITS, "f"} else []
        self._units = [_UNITS[name] for name in self._numbers]

    def match(self, key: str) -> datetime | None:
        """The time in this key (naive, or aware where the pattern has %z); None if it doesn't match."""
        found = self._regex.search(key)
        if found is None:
            return None
        try:
            if self._numbers:
                numbers = dict(zip(self._units, map(int, found.group(*self._numbers)), strict=True))
                if "f" in self._regex.groupindex:
                    numbers["microsecond"] = int(found["f"].ljust(6, "0"))
                return datetime(**numbers)  # type: ignore[arg-type]  # noqa: DTZ001
            values = found.groupdict()
            return datetime.strptime(  # noqa: DTZ007 - the caller knows the zone
                " ".join(values.values()), " ".join(f"%{name}" for name in values)
            )
        except ValueError:
            return None  # matches but is no time: month 13, 30 February

    def key_before(self, key: str, local: datetime, prefix: str) -> str | None:
        """A key that sorts before all keys of this time or later below `prefix`, in a source whose keys are like this
        one; None if its keys can't be relied on to sort by time.

        The key is put together from what all of them share: the prefix, the pattern's literal text, and the time. It
        ends with the last unit of time before something that differs between keys of one time, such as `*`.
        """
        found = self._regex.search(key)
        if found is None or found.start() > len(prefix) or "z" in found.groupdict():
            return None  # folders before the pattern, and offsets, may differ
        result, between = "", key[: found.start()] + ("/" if found.start() else "")
        units, known = "YmdHMSf", 0
        for token in _tokens(self.pattern.removeprefix("/")):
            name = token.removeprefix("%")
            if token == "%%" or not token.startswith(("%", "*")):
                between += name
            elif token == "*" or name not in units[: known + 1]:
                break
            else:
                text = local.strftime(token)
                if len(found[name]) != len(text):
                    break  # numbers without zeros in front
                result, between = result + between + text, ""
                known = max(known, units.index(name) + 1)
        return result if known >= 3 else None


def _tokens(pattern: str) -> list[str]:
    """A pattern's directives, wildcards and literal text, in their order."""
    return re.findall(r"%.|\*|[^%*]+|%", pattern, flags=re.DOTALL)


def _compile(pattern: str) -> re.Pattern[str]:
    regex = ""
    names: list[str] = []
    for token in _tokens(pattern):
        if token == "*":
            regex += "[^/]*"
        elif token == "%%":
            regex += "%"
        elif token.startswith("%"):
            name = token[1:]
            if name not in _DIRECTIVES:
                known = " ".join(f"%{directive}" for directive in _DIRECTIVES)
                raise MaskwatchError(f"unknown directive {token!r} in the time pattern {pattern!r}; known: {known}")
            regex += f"(?P={name})" if name in names else f"(?P<{name}>{_DIRECTIVES[name]})"
            names.append(name)
        else:
            regex += re.escape(token)
    has_date = {"j"} <= set(names) or ({"d"} <= set(names) and bool({"m", "b", "B"} & set(names)))
    if not ({"Y", "y"} & set(names)) or not has_date:
        raise MaskwatchError(f"the time pattern {pattern!r} must hold a date: a year, a month and a day, or %Y and %j")
    return re.compile(rf"(?:^|/){regex.removeprefix('/')}\Z")


@lru_cache(maxsize=256)
def zone(name: str) -> ZoneInfo:
    """The IANA time zone of that name. Raises `MaskwatchError`, with an example, for any other name.

    Cached, because the list of names is read from the disk each time (5 ms).
    """
    # Only places and UTC, because names such as "CET" mean something else to Postgres than to Python.
    if name not in available_timezones() or ("/" not in name and name != "UTC"):
        close = [known for known in sorted(available_timezones()) if f"/{name.lower()}" in known.lower()][:3]
        hint = ", ".join(close) if close else "Europe/Berlin, Asia/Kolkata, UTC"
        raise MaskwatchError(f"unknown time zone {name!r}; expected an IANA name such as {hint}")
    return ZoneInfo(name)


def resolve_local(local: datetime, where: ZoneInfo) -> tuple[datetime, bool]:
    """The instant (UTC) of a local time, and whether that local time occurred twice (the first is taken).

    An aware datetime is converted as it is. Raises `LocalTimeError` for a time the clocks skipped.
    """
    try:
        if local.tzinfo is not None:
            return local.astimezone(UTC), False
        first, second = local.replace(tzinfo=where, fold=0), local.replace(tzinfo=where, fold=1)
        instant = first.astimezone(UTC)
        if first.utcoffset() == second.utcoffset():
            return instant, False
        # The clocks change: if forward, converting back gives another local time; if back, the same one.
        back = instant.astimezone(where).replace(tzinfo=None)
    except OverflowError as error:
        raise LocalTimeError(f"the time {local.isoformat(sep=' ')} is out of range") from error
    if back != local:
        raise LocalTimeError(f"the local time {local.isoformat(sep=' ')} does not exist in {where.key}")
    return instant, True


def hour_of(instant: datetime, where: ZoneInfo) -> datetime:
    """The instant at which the local hour of an instant begins."""
    local = instant.astimezone(where)
    return (instant - timedelta(minutes=local.minute, seconds=local.second, microseconds=local.microsecond)).astimezone(
        UTC
    )


def is_storable(instant: datetime) -> bool:
    """Whether footage seen at this instant can be stored."""
    return FIRST <= instant < END


def why_no_time(instant: datetime) -> str | None:
    """Why no camera can have seen something at this instant, or why its clock was not set; None for a time."""
    if not is_storable(instant):
        return f"{_shown(instant)} is not between {FIRST.year} and {END.year - 1}"
    for year in CLOCK_STARTS:
        began = datetime(year, 1, 1, tzinfo=UTC)
        if began - LARGEST_OFFSET <= instant < began + RUNS_ON + LARGEST_OFFSET:
            return f"{_shown(instant)} is what a clock shows that was not set: it began with the year {year}"
    return None


def _shown(instant: datetime) -> str:
    # Not strftime, which writes the year 2 as "2".
    return instant.isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")


def recording_start(
    planned: ObservedAt | None, created_at: datetime | None, last_modified: datetime, duration_seconds: float | None
) -> ObservedAt:
    """When a recording began: the key's time, else the container's creation time (aware), else LastModified minus the
    duration, because a camera uploads a recording when it ends.

    The creation time is ignored if it is none (`why_no_time`), or is ahead of the upload. Raises `PermanentJobError`
    if LastModified is none, too.
    """
    if planned is not None:
        return planned
    if created_at is not None and _fits(created_at, last_modified):
        return ObservedAt(created_at.astimezone(UTC), ObservedAtSource.CREATION_TIME)
    return _uploaded(last_modified, timedelta(seconds=duration_seconds or 0))


def is_ahead(instant: datetime, last_modified: datetime) -> bool:
    """Whether an instant is later than the upload. An upload that is no time itself says nothing: some programs unpack
    archives with times of 1980."""
    return why_no_time(last_modified) is None and instant > last_modified + AHEAD


def _fits(instant: datetime, last_modified: datetime) -> bool:
    """Whether what a file says is a time, and not ahead of the file's upload."""
    return why_no_time(instant) is None and not is_ahead(instant, last_modified)


def _uploaded(last_modified: datetime, lasted: timedelta = timedelta()) -> ObservedAt:
    """LastModified as the last source of a time. Raises `PermanentJobError` if it is none, too."""
    why = why_no_time(last_modified) or why_no_time(last_modified - lasted)
    if why is not None:
        raise PermanentJobError(
            Reason.NO_TIME,
            f"nothing says when it was taken: neither key nor file has a time, and its upload is none: {why}; read the "
            "time from its key (--time-pattern), or upload it again",
        )
    return ObservedAt(last_modified - lasted, ObservedAtSource.LAST_MODIFIED)


def observed_from_file(
    planned: ObservedAt | None, taken_at: datetime | None, last_modified: datetime, where: ZoneInfo
) -> ObservedAt:
    """When an image was taken: the key's time, else EXIF's (naive: local to `where`), else LastModified.

    EXIF's time is ignored if it is none (`why_no_time`), is ahead of the upload, or is skipped by the zone. Raises
    `PermanentJobError` if LastModified is none, too.
    """
    if planned is not None:
        return planned
    if taken_at is not None:
        try:
            instant, ambiguous = resolve_local(taken_at, where)
        except LocalTimeError:
            return _uploaded(last_modified)
        if _fits(instant, last_modified):
            return ObservedAt(instant, ObservedAtSource.EXIF, ambiguous)
    return _uploaded(last_modified)
