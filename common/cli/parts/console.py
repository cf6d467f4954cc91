"""The output of commands: tables and progress bars for people, JSON for machines.

Results go to standard output, everything else (notes, progress) to standard error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

#: Wide where no terminal sets a width: a log or a pipe should not cut cells off.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)

#: Decorator of every command that machines read.
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


#: Characters that a terminal acts upon, or that reverse a line: control characters except newline and tab, and
#: the marks of writing direction (Unicode Standard Annex 9). Keys and file names may contain them.
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with characters that a terminal would act upon escaped, as \\x1b."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def as_json(value: Any) -> str:
    """A JSON document; datetimes as ISO 8601."""
    return json.dumps(value, default=_plain, indent=2, ensure_ascii=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(as_json(value))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table for people. Cells are data: markup in them is not interpreted."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text("–" if cell is None else visible(str(cell))) for cell in row))
    out.print(table)


def print_blocks(columns: Sequence[str], blocks: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Figures for people: a heading, and below it a table, for each block.

    The first column is text, the others are numbers, aligned to the right; a column is equally wide in all blocks.
    Plain text, so that a narrow terminal wraps it and cuts nothing off.
    """
    lines = [columns, *(row for rows in blocks.values() for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]

    def aligned(line: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        return "  ".join(("", line[0].ljust(widths[0]), *numbers))

    texts = ["\n".join([heading, aligned(columns), *map(aligned, rows)]) for heading, rows in blocks.items()]
    click.echo("\n\n".join(texts))


def print_line(words: str) -> None:
    """A sentence between tables, broken at the width of the terminal."""
    out.print(words, highlight=False)


def note(message: str) -> None:
    """A line for people, on standard error."""
    click.echo(visible(message), err=True)


def note_unreadable(unreadable: Sequence[tuple[str, str]]) -> None:
    """Print the files and boxes that could not be used, as (name, reason), on standard error."""
    if unreadable:
        note(f"{len(unreadable)} could not be used and were left out:")
    for name, reason in unreadable:
        note(f"  {name}: {reason}")


class Bar:
    """A progress bar of one thing, in `bar`."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def show(self, done: int, total: int | None = None, detail: str | None = None) -> None:
        """Set how much is done, and the total if it is known (None keeps the earlier total)."""
        fields: dict[str, Any] = {} if detail is None else {"detail": detail}
        self._bars.update(self._task, completed=done, total=total, **fields)

    def advance(self, some: int = 1) -> None:
        """Add to how much is done."""
        self._bars.advance(self._task, some)


@contextmanager
def bar(description: str, total: int | None = None, *, detail: str = "", in_bytes: bool = False) -> Iterator[Bar]:
    """A progress bar on standard error; silent if that is no terminal.

    `detail` stands behind the figures. `in_bytes`: the figures are bytes, shown with their rate.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if in_bytes:
        columns += [DownloadColumn(), TransferSpeedColumn()]
    else:
        more = [TextColumn("{task.fields[detail]}")] if detail else []
        columns += [MofNCompleteColumn(), *more, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        yield Bar(bars, bars.add_task(description, total=total, detail=detail))
