"""The import rules of the design, held by reading the sources: who may know whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What only workers install: the producer, the aggregator and analysts run without. (Pillow comes with
#: matplotlib, for the report's plots.)
HEAVY = {"onnxruntime", "onnx", "torch", "tensorflow", "keras", "cv2", "av", "deface", "fdet", "dlib"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, only_top_level: bool = False) -> Iterator[str]:
    """The modules a file imports, absolute, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if only_top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("import a.b\ndef f():\n    from c import d\n")
    assert set(imports(source)) == {"a.b", "c", "c.d"}
    assert set(imports(source, only_top_level=True)) == {"a.b"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("common", {"producer", "workers"}), ("producer", {"workers"}), ("workers", {"producer"})],
)
def test_sides_do_not_import_each_other(package: str, forbidden: set[str]) -> None:
    # `common/cli` puts the sides together, and is the one place in `common` that names them.
    paths = [path for path in sources(package) if not path.is_relative_to(ROOT / "common" / "cli")]
    broken = {path: found for path in paths if (found := roots(path) & forbidden)}
    assert not broken


def test_domain_imports_only_the_standard_library() -> None:
    assert roots(ROOT / "common" / "domain.py") <= sys.stdlib_module_names


#: The one module of the product that may use the sample footage.
DEMO = "common/cli/demo.py"
#: What the sample footage may import: the standard library, and what `worker` and the base install.
SAMPLE_LIBRARIES = {"common", "numpy", "PIL", "av", "sqlalchemy"}


def names_sample(path: Path) -> bool:
    """Whether a file imports the sample footage, or names one of its modules in a string as `importlib` wants it."""
    strings = (
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return any(re.match(r"common\.sample(\.|:|$)", name) for name in (*imports(path), *strings))


def users_of_sample(root: Path) -> set[Path]:
    """The files of the product, outside the sample footage itself, that use it."""
    files = {
        file for package in ("common", "migrations", "producer", "workers") for file in (root / package).rglob("*.py")
    }
    files -= set((root / "common" / "sample").rglob("*.py"))
    return {file.relative_to(root) for file in files if names_sample(file)}


def test_only_the_demo_uses_the_sample_footage() -> None:
    assert users_of_sample(ROOT) == {DEMO}


@pytest.mark.parametrize(
    "planted",
    [
        "from common.sample import people\n",
        "from common import sample\n",
        "def draw():\n    import common.sample.scenes\n",
        "import importlib\nimportlib.import_module('common.sample.footage')\n",
        "COMMAND = 'common.sample.footage:make_footage'\n",
    ],
)
def test_another_user_of_the_sample_footage_is_found(tmp_path: Path, planted: str) -> None:
    for name, source in (
        ("common/sample/footage.py", "from common.sample import people\n"),
        ("workers/jobs/images.py", planted),
        ("workers/jobs/videos.py", '"""Not common/sample."""\nfrom common import samples\nNAME = "common.samples"\n'),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert users_of_sample(tmp_path) == {Path("workers/jobs/images.py")}


def foreign_to_sample(paths: list[Path]) -> set[str]:
    return {name for path in paths for name in roots(path)} - SAMPLE_LIBRARIES - sys.stdlib_module_names


def test_the_sample_footage_needs_no_library_of_its_own(tmp_path: Path) -> None:
    assert foreign_to_sample(sources("common/sample")) == set()
    planted = tmp_path / "people.py"
    planted.write_text("def photograph():\n    from skimage import data\n")
    assert foreign_to_sample([planted]) == {"skimage"}


def reachable(start: str) -> set[str]:
    """All modules of ours that a module imports, directly or not."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        name = queue.pop()
        path = ROOT / Path(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if name in seen or not file.exists():
            continue
        seen.add(name)
        queue += imports(file)
    return seen


@pytest.mark.parametrize(
    "start",
    [
        "workers.analysis.analyzer",
        "workers.media.images",
        "workers.inference",
        "workers.media.containers",
        "workers.media.sampling",
        "workers.media.frames",
        "workers.media.prefetch",
    ],
)
def test_the_pipeline_knows_neither_queue_nor_database(start: str) -> None:
    modules = reachable(start)
    assert start in modules and "common.domain" in reachable("workers.analysis.analyzer")
    found = {
        name: roots(file) & {"celery", "kombu", "sqlalchemy", "psycopg", "redis"}
        for name in modules
        for file in [(ROOT / Path(*name.split("."))).with_suffix(".py")]
        if file.exists()
    }
    assert not {name: bad for name, bad in found.items() if bad}


@pytest.mark.parametrize(
    "modules",
    [
        "producer.cli.producer producer.cli.backfill producer.cli.backfills producer.tasks",
        "workers.cli.aggregator workers.cli.summarize workers.cli.purge workers.tasks",
        "workers.cli.worker workers.cli.models workers.cli.annotate workers.cli.evaluate workers.cli.train",
        "common.cli.jobs common.cli.status common.cli.sources common.cli.locations common.cli.cameras",
        "common.cli.pipelines common.cli.database common.cli.doctor common.cli.run common.cli.local",
        "common.cli.summary common.cli.coverage common.cli.report",
    ],
)
def test_producer_aggregator_and_analyst_load_no_model_runtime(modules: str) -> None:
    code = f"import {', '.join(modules.split())}, sys; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


def test_the_same_look_sees_what_a_classifier_loads() -> None:
    code = f"import workers.classification.network_classifier, sys; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "cv2" in done.stdout
