"""Metrics: counted by children, summed by their worker, gone with it; off, nothing happens; no job ever fails of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common.cli.processes import work_processes
from common.domain import Face, JobKind, JobState, MaskStatus, Reason
from common.observability import metrics
from tests.redis_server import free_port

PROLOGUE = """
import os, signal, subprocess, sys, tempfile, time
from pathlib import Path
from urllib.request import urlopen
from common.observability import exporter, metrics
from common.observability.metrics import Role, Stage
from common.observability.exporter import serving
from common.settings import MetricsSettings

PORT = {port}
ON = MetricsSettings(port=PORT)

def scrape():
    lines = urlopen(f"http://127.0.0.1:{{PORT}}/metrics", timeout=10).read().decode().splitlines()
    return {{name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}}

def child(code):
    return subprocess.Popen([sys.executable, "-c", "from common.observability import metrics\\n" + code])

def counting():
    return sorted(Path(os.environ["MASKWATCH_METRICS_FOLDER"]).iterdir())

def folders():
    return sorted(path.name for path in Path(tempfile.gettempdir()).glob("maskwatch-metrics-*"))
"""


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, because a process serves metrics once in its life; its temporary folder is
    `folder`."""
    script = PROLOGUE.format(port=free_port()) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(folder), **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def output(code: str, folder: Path, **environment: str) -> str:
    done = run(code, folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FACES = 'maskwatch_faces_total{status="with_mask"}'


def test_what_children_count_is_summed_and_outlives_them(tmp_path: Path) -> None:
    said = output(
        f"""
        with serving(Role.WORKER, ON):
            before = scrape()['{FACES}']
            count = "metrics.count(metrics.FACES, 2, status='with_mask')"
            time_it = "metrics.observe(metrics.QUEUE_SECONDS, 0.2, lane='live')"
            for _ in range(3):
                assert child(count + chr(10) + time_it).wait() == 0
            sums = [scrape() for _ in range(2)]
            files = sorted(path.stem.partition("_")[2] for path in counting())
            assert child(count).wait() == 0
            again = scrape()
        print(before, *[s['{FACES}'] for s in sums], again['{FACES}'])
        print(*[round(sums[1][f'maskwatch_queue_seconds_{{part}}'], 3) for part in (
            'count{{lane="live"}}', 'bucket{{lane="live",le="0.5"}}', 'sum{{lane="live"}}')])
        print(files == sorted(["0", "0", str(os.getpid()), str(os.getpid())]))
        """,
        tmp_path,
    ).splitlines()
    assert said[:2] == ["0.0 6.0 6.0 8.0", "3.0 3.0 0.6"]
    assert said[2] == "True", "files of children that have ended are folded into one"


def test_without_folding_a_file_per_child_would_stay(tmp_path: Path) -> None:
    """The control: what fold_ended is for. It is left out, and the files pile up."""
    said = output(
        """
        exporter.fold_ended = lambda folder: 0
        with serving(Role.WORKER, ON):
            for _ in range(3):
                assert child("metrics.count(metrics.FACES, status='with_mask')").wait() == 0
            scrape()
            print(len(list(Path(os.environ["MASKWATCH_METRICS_FOLDER"]).glob("counter_*.db"))))
        """,
        tmp_path,
    )
    assert said == "5"  # those of the main process, of three children, and the sums


def test_a_child_that_runs_is_not_folded(tmp_path: Path) -> None:
    said = output(
        f"""
        with serving(Role.WORKER, ON):
            running = child("metrics.count(metrics.FACES, status='with_mask')\\nimport time; time.sleep(60)")
            while scrape()['{FACES}'] != 1:
                time.sleep(0.05)
            name = f"counter_{{running.pid}}.db"
            print(Path(os.environ["MASKWATCH_METRICS_FOLDER"], name).exists())
            running.kill(); running.wait()
            print(scrape()['{FACES}'], Path(os.environ["MASKWATCH_METRICS_FOLDER"], name).exists())
        """,
        tmp_path,
    )
    assert said.split() == ["True", "1.0", "False"]


def test_the_folder_goes_with_its_process_and_a_killed_one_s_with_the_next(tmp_path: Path) -> None:
    said = output(
        """
        with serving(Role.WORKER, ON):
            print(len(folders()))
        print(len(folders()))
        killed = subprocess.Popen([sys.executable, "-c", "import time\\n"
            "from common.observability.metrics import Role\\nfrom common.observability.exporter import serving\\n"
            "from common.settings import MetricsSettings\\n"
            f"with serving(Role.WORKER, MetricsSettings(port={PORT})):\\n time.sleep(60)"])
        while not folders():
            time.sleep(0.05)
        left = folders()
        """
        + """
        killed_holds = exporter.remove_left_over(exporter._PREFIX, folder=True) or folders() == left
        killed.kill(); killed.wait()
        print(killed_holds, folders() == left)
        exporter.remove_left_over(exporter._PREFIX, folder=True)
        print(folders())
        """,
        tmp_path,
    )
    assert said.split() == ["1", "0", "True", "True", "[]"]


def test_off_nothing_is_imported_and_nothing_counted(tmp_path: Path) -> None:
    said = output(
        """
        with serving(Role.WORKER, MetricsSettings()), serving(Role.WORKER, MetricsSettings(port=0)):
            metrics.count(metrics.FACES, status="with_mask")
            metrics.observe(metrics.QUEUE_SECONDS, 1, lane="live")
            with metrics.stage(Stage.READ):
                pass
            print(folders(), [name for name in sys.modules if name.startswith("prometheus")])
            print(metrics.stage(Stage.READ) is metrics.stage(Stage.WRITE))
        """,
        tmp_path,
    )
    assert said.splitlines() == ["[] []", "True"]


def test_a_metric_that_can_t_be_counted_fails_no_job_and_is_told_once(tmp_path: Path) -> None:
    done = run(
        """
        with serving(Role.WORKER, ON):
            metrics.count(metrics.FACES, status="a/key.jpg")
            metrics.count(metrics.FACES, status="another")
            with metrics.stage(Stage.READ):
                print("worked")
        """,
        tmp_path,
    )
    assert done.returncode == 0 and done.stdout.strip() == "worked"
    assert done.stderr.count("metrics are off in this process") == 1


def test_a_scrape_never_meets_a_file_that_is_being_made(tmp_path: Path) -> None:
    """With its control: one empty file under a child's name fails the scrape of all processes."""
    said = output(
        """
        from urllib.error import HTTPError
        with serving(Role.WORKER, ON):
            slow = "import os, time\\nreal = os.posix_fallocate\\n"
            slow += "def late(*args): print('making', flush=True); time.sleep(2); real(*args)\\n"
            slow += "os.posix_fallocate = late\\nmetrics.count(metrics.FACES, status='with_mask')"
            making = subprocess.Popen(
                [sys.executable, "-c", "from common.observability import metrics\\n" + slow],
                stdout=subprocess.PIPE, text=True)
            print(making.stdout.readline().strip(), len(scrape()) > 10, making.poll())
            making.communicate()
            Path(os.environ["MASKWATCH_METRICS_FOLDER"], f"counter_{os.getppid()}.db").touch()
            try:
                scrape()
            except HTTPError as error:
                print(error.code)
        """,
        tmp_path,
    )
    assert said.splitlines() == ["making True None", "500"]


def test_a_full_disk_turns_metrics_off_in_a_child_instead_of_killing_it(tmp_path: Path) -> None:
    """Without the room being taken beforehand, the first count would end the process by SIGBUS."""
    done = run(
        """
        with serving(Role.WORKER, ON):
            full = "import os, errno\\ndef none(*_): raise OSError(errno.ENOSPC, 'No space left on device')\\n"
            full += "os.posix_fallocate = none\\nmetrics.count(metrics.FACES, status='with_mask')\\n"
            full += "print('worked', flush=True)"
            print(child(full).wait())
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["worked", "0"]
    assert "metrics are off" in done.stderr and "No space left" in done.stderr


def test_a_file_never_grows_beyond_the_room_it_took(tmp_path: Path) -> None:
    said = output(
        """
        with serving(Role.WORKER, ON):
            for role in Role:
                for metric in metrics.METRICS:
                    import itertools
                    for values in itertools.product(*metric.labels.values()):
                        metrics.series(metric, tuple(zip(metric.labels, values)))
            from prometheus_client.mmap_dict import MmapedDict
            for path in Path(os.environ["MASKWATCH_METRICS_FOLDER"]).iterdir():
                print(path.stat().st_size == metrics.FILE_BYTES)
        """,
        tmp_path,
    )
    assert said.split() == ["True"] * 4


def test_a_port_that_is_taken_is_told_in_one_sentence(tmp_path: Path) -> None:
    done = run(
        """
        import socket
        taken = socket.create_server(("127.0.0.1", PORT))
        with serving(Role.WORKER, ON):
            pass
        """,
        tmp_path,
    )
    assert done.returncode == 1
    assert "metrics can't be served on 127.0.0.1:" in done.stderr and "MASKWATCH_METRICS__PORT" in done.stderr
    assert not list(tmp_path.glob("maskwatch-metrics-*"))


def test_every_metric_says_what_it_is_and_has_bounded_labels() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert metric.name.startswith("maskwatch_") and not metric.name.endswith("_total")
        assert metric.help.endswith(".") and metric.roles
        assert bool(metric.buckets) == metric.name.endswith("_seconds")
        assert all(values and len(values) < 50 for values in metric.labels.values())
        assert not set(metric.labels) & {"key", "job", "uri", "bucket", "worker", "camera", "location"}
    listed = {value for value in vars(metrics).values() if isinstance(value, metrics.Metric)}
    assert listed == set(metrics.METRICS)


@pytest.mark.parametrize(
    ("state", "metric"), [(JobState.RETRY_WAIT, metrics.RETRIES), (JobState.QUARANTINED, metrics.QUARANTINES)]
)
def test_a_failure_is_a_retry_or_a_quarantine(
    state: JobState, metric: metrics.Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[object] = []
    monkeypatch.setattr(metrics, "count", lambda *args, **labels: counted.append((*args, labels)))
    metrics.failed(Reason.TIME_LIMIT, state)
    assert counted == [(metric, {"reason": "time_limit"})]


def test_frames_and_faces_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[object] = []
    monkeypatch.setattr(metrics, "_on", True)
    monkeypatch.setattr(metrics, "count", lambda *args, **labels: counted.append((args[0].name, args[1], labels)))
    face = Face(1, 1, 2, 2, 0.9, 0.9, 0.1, MaskStatus.WITH_MASK)
    metrics.analysed(JobKind.CHUNK, [[face, face], [], [face]])
    assert counted == [
        ("maskwatch_frames", 3, {"kind": "chunk"}),
        ("maskwatch_faces", 3, {"status": "with_mask"}),
    ]


def test_a_log_line_names_the_job_and_its_attempt_in_every_thread_of_it() -> None:
    code = """
import logging
from common.observability.logs import configure_logging, get_logger, working_on
from workers.media.prefetch import ahead
configure_logging()
def items():
    logging.getLogger("a.library").warning("in the thread that decodes")
    yield 1
with working_on(17, 2):
    get_logger("ours").warning("in the work")
    list(ahead(items(), size_of=lambda _: 1, alike=lambda a, b: True, max_size=1, max_items=1))
get_logger("ours").warning("after it")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"], line.get("job"), line.get("attempt")) for line in lines] == [
        ("in the work", 17, 2),
        ("in the thread that decodes", 17, 2),
        ("after it", None, None),
    ]


def test_the_processes_of_one_command_serve_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes would all want the port that is set for this one."""
    started: list[dict[str, str]] = []

    class Process:
        pid = 1

        def __init__(self, argv: list[str], env: dict[str, str], **_: object) -> None:
            started.append(env)

        def send_signal(self, number: int) -> None: ...

        def wait(self, seconds: float) -> None: ...

    monkeypatch.setenv("MASKWATCH_METRICS__PORT", "9464")
    monkeypatch.setattr("common.cli.processes.subprocess.Popen", Process)
    with work_processes(2, state_dir=None):
        pass
    assert len(started) == 4 and {env["MASKWATCH_METRICS__PORT"] for env in started} == {"0"}
