"""Mutants: the product with one mechanism taken away, as a mistake would take it.

The product has no switch for them. Statements are rewritten on their way to Postgres, in this process (`planted`) or in
processes that a test starts (`planted_in_processes`); other code is replaced in processes by `injected`. A rewrite that
fits no statement is an error: the statement has changed, and the mutant would prove nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

from sqlalchemy import Engine, event

from tests import ROOT


@dataclass(frozen=True)
class Rewrite:
    """In the statements that contain `of`, or whose parameters do, `pattern` (a regular expression) becomes `by`."""

    of: str
    pattern: str
    by: str


_FENCE = r"jobs\.token = (sent\.token|%\(token\)s(::UUID)?) AND jobs\.state = %\(was\)s(::VARCHAR)?"

#: Any message runs its job, whatever the job's token and state are.
UNFENCED_CLAIM = Rewrite(of="SET state = 'running'", pattern=_FENCE, by="true")
#: Any worker that once held a job ends it with its rows.
UNFENCED_SUCCESS = Rewrite(of="SET state = 'succeeded'", pattern=_FENCE, by="true")
UNFENCED = (UNFENCED_CLAIM, UNFENCED_SUCCESS)


def rewrite_statements(
    engine: Engine | type[Engine], rewrites: Sequence[Rewrite], fits: Callable[[Rewrite], object]
) -> Callable[[], None]:
    """Rewrite the statements of an engine, or of all engines of this process, until the function that is returned is
    called. `fits` is called with each rewrite that changes a statement."""

    def rewrite(_: Any, __: Any, statement: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
        for each in rewrites:
            if each.of in statement or each.of in str(parameters):
                statement, times = re.subn(each.pattern, each.by, statement)
                if times:
                    fits(each)
        return statement, parameters

    event.listen(engine, "before_cursor_execute", rewrite, retval=True)
    return lambda: event.remove(engine, "before_cursor_execute", rewrite)


def check_fit(rewrites: Collection[Rewrite], fitted: Collection[Rewrite]) -> None:
    """Fail for a rewrite that never changed a statement."""
    unfit = {*rewrites} - {*fitted}
    assert not unfit, f"no statement of the product fits these rewrites any more: {unfit}"


@contextmanager
def planted(*rewrites: Rewrite) -> Iterator[None]:
    """Rewrite the statements of this process until the end of the block. Fails if one of the rewrites never fitted."""
    fitted = set[Rewrite]()
    stop = rewrite_statements(Engine, rewrites, fitted.add)
    try:
        yield
    finally:
        stop()
    check_fit(rewrites, fitted)


@contextmanager
def planted_in_processes(folder: Path, *rewrites: Rewrite) -> Iterator[dict[str, str]]:
    """The environment of processes whose statements are rewritten, and those of their children. Fails at the end of the
    block if one of the rewrites never fitted in any of them. `folder` must be empty or new."""
    notes = folder / "fitted"
    notes.mkdir(parents=True)
    code = f"from tests.mutants import Rewrite, plant_here\nplant_here({str(notes)!r}, {list(rewrites)!r})"
    yield injected(folder, code)
    check_fit(rewrites, [each for number, each in enumerate(rewrites) if (notes / str(number)).exists()])


def plant_here(notes: str, rewrites: Sequence[Rewrite]) -> None:
    """Rewrite the statements of this process as long as it lives, and note in a folder which rewrites fitted."""
    rewrite_statements(Engine, rewrites, lambda fitted: Path(notes, str(rewrites.index(fitted))).touch())


def injected(folder: Path, *code: str) -> dict[str, str]:
    """The environment of processes that run this Python code at their start, and so do their children."""
    folder.mkdir(parents=True, exist_ok=True)
    # Python imports a module of this name by itself. It may raise nothing: that would only be printed.
    (folder / "sitecustomize.py").write_text(
        f"import os\ntry:\n{indent(dedent(chr(10).join(code)), '    ')}\nexcept BaseException:\n"
        "    import traceback\n    traceback.print_exc()\n    os._exit(70)\n"
    )
    # The folder of `tests` too: an installation of the product does not include it.
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}
