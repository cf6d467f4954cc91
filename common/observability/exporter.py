"""Serves the metrics of a process and of its children over HTTP (Prometheus's multiprocess mode)."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.domain import MaskwatchError, first_line
from common.files import make_held, remove_left_over
from common.settings import MetricsSettings

if TYPE_CHECKING:
    from prometheus_client.registry import Collector
from common.observability.metrics import FILE_BYTES, FOLDER, METRICS, Role, series, switch

#: The same folder for Prometheus's library, which reads this variable when it is imported.
_LIBRARY_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


_PREFIX = "maskwatch-metrics-"


#: The process number in the name of the file that holds the sums of ended children.
_ENDED = 0


@contextmanager
def serving(role: Role, settings: MetricsSettings, gauges: Callable[[], Iterable[Collector]] = tuple) -> Iterator[None]:
    """During the block, serve the metrics of this process and its children over HTTP, if a port is configured.

    `gauges` makes collectors of more metrics. Enter it once per process, before its children start and before anything
    imports Prometheus's library. Raises `MaskwatchError` if the port or a folder is not available.
    """
    global _on
    if not settings.port:
        yield
        return
    before = {name: os.environ.get(name) for name in (FOLDER, _LIBRARY_FOLDER)}
    with _folder() as folder:
        os.environ |= {FOLDER: str(folder), _LIBRARY_FOLDER: str(folder)}
        switch(on=True)
        try:
            # Every series begins at 0 at the start: `rate` sees an increase only after an earlier value.
            for metric in METRICS:
                if role in metric.roles:
                    for values in itertools.product(*metric.labels.values()):
                        series(metric, tuple(zip(metric.labels, values, strict=True)))
            with _server(settings.host, settings.port, folder, gauges()):
                yield
        finally:
            switch(on=False)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _server(host: str, port: int, folder: Path, gauges: Iterable[Collector]) -> Iterator[None]:
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_sums_of(folder))
    for collector in gauges:
        registry.register(collector)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise MaskwatchError(
            f"metrics can't be served on {host}:{port}: {first_line(error)}; set another MASKWATCH_METRICS__HOST or "
            "MASKWATCH_METRICS__PORT; each process of a machine needs a port of its own"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sums_of(folder: Path) -> Collector:
    """A collector of the files of all processes in `folder`."""
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector

    class Sums(Collector):
        def __init__(self) -> None:
            self._files = MultiProcessCollector(None, path=str(folder))
            # Two scrapes at once must not read a half-written sum.
            self._lock = threading.Lock()

        def collect(self) -> Iterable[Any]:
            with self._lock:
                fold_ended(folder)
                return list(self._files.collect())

    return Sums()


def fold_ended(folder: Path) -> int:
    """Add the counts of ended processes to one file, and remove their files; returns how many files were removed.

    A worker replaces its children from time to time, so their files must not pile up. Their counts are added first,
    because a counter must not go down.
    """
    from prometheus_client.mmap_dict import MmapedDict

    folded = 0
    for path in folder.glob("*.db"):
        kind, _, number = path.stem.partition("_")
        if int(number) == _ENDED or _runs(int(number)):
            continue
        sums = MmapedDict(str(folder / f"{kind}_{_ENDED}.db"))
        try:
            for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path)):
                total, _ = sums.read_value(key)
                sums.write_value(key, total + value, 0.0)
        finally:
            sums.close()
        path.unlink()
        folded += 1
    return folded


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process has the pid now: try again when it has ended
        return True
    return True


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder to count in, locked while it is in use: so folders that killed processes left can be recognized."""
    remove_left_over(_PREFIX, folder=True)
    try:
        path, handle = make_held(_PREFIX, folder=True)
        # The file for the sums of ended children is made now, while there is room on the disk.
        for kind in ("counter", "histogram"):
            with (path / f"{kind}_{_ENDED}.db").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
    except OSError as error:
        raise MaskwatchError(
            f"no room for metrics in {tempfile.gettempdir()}: {first_line(error)}; free space there, or set TMPDIR"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)
