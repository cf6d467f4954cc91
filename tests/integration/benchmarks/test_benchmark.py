"""The benchmark runs and counts what it says it counts; the figures themselves belong in docs/performance.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from tests.services import Services


@pytest.mark.bench
def test_the_benchmark_end_to_end(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MASKWATCH_")]:
        monkeypatch.delenv(name)
    command = [
        sys.executable,
        "-m",
        "benchmarks.end_to_end",
        "--images",
        "6",
        "--rounds",
        "1",
        "--workers",
        "1",
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["end_to_end_cpu_ms_by_part"]) == {
        "producer", "aggregator", "workers", "postgres", "redis", "s3", "enqueueing",
    }  # fmt: skip
    assert all(value >= 0 for value in result["end_to_end_cpu_ms_by_part"].values())
    assert abs(sum(result["end_to_end_cpu_ms_by_part"].values()) - result["end_to_end_cpu_ms"]) < 0.01
    # The models are most of it on both sides: neither has left out the work.
    assert result["end_to_end_cpu_ms_by_part"]["workers"] > 0.5 * result["loop_cpu_ms"] > 5
    # Memory is no matter of speed: a worker with its child stays under 900 MB.
    assert 200 < result["worker_rss_mb"] < 900


@pytest.mark.bench
def test_a_chunk_costs_its_own_bytes_and_keyframes_alone_are_decoded() -> None:
    """Of the benchmark of videos what is no matter of time; the rest of it is run by hand."""
    command = [sys.executable, "-m", "benchmarks.video", "--quick", "--only", "bytes", "--only", "decoding", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["index_at"] for row in result["bytes"]] == ["front", "end"]
    for row in result["bytes"]:
        assert row["chunk_bytes"] < row["fetched_bytes"] + 256 * 1024 < row["file_bytes"]
        assert row["fetched_bytes"] <= row["allowed_bytes"]
    assert result["decoding"]["frames"] == {"everything": 120, "frames at 1/s": 4, "keyframes at 1/s": 2}


@pytest.mark.bench
def test_the_rows_of_the_ledger_have_a_size() -> None:
    """Sizes are no matter of speed: those of docs/performance.md hold, within a tenth."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.storage"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\w+) \| (\d+) \|$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["faces", "media_objects", "jobs", "job_attempts", "frame_counts"]
    told = dict(re.findall(r"^\| (\w+) \| (\d+) \|$", (ROOT / "docs/performance.md").read_text(), flags=re.MULTILINE))
    assert all(abs(int(size) / int(told[name]) - 1) < 0.1 for name, size in rows)


@pytest.mark.bench
def test_what_must_not_grow_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small ledgers: that the benchmarks run. Each of them checks itself that what it measures was done."""
    for name in [name for name in os.environ if name.startswith("MASKWATCH_")]:
        monkeypatch.delenv(name)
    cancelled = run(
        "ledger_size", "--cancel=100", "--cancel=6000", "--rounds=1", "--jobs=2000", "--passes=2", "--pause=0"
    )
    assert list(cancelled["cancelled"]) == ["100", "6000"]
    # A pass writes each job three times and leaves dead rows: where there are none, nothing was done.
    registered, first, second = cancelled["room_mib"]
    assert 0 < registered < first <= second and cancelled["room_ratio"] == second / first
    migrated = run("migration", "--jobs=20000", "--queued=10000")
    assert migrated["claims"] > 0 and migrated["longest_s"] > 0 and migrated["longest_before_s"] > 0
    ticks = run("dispatch", "--jobs=30000", "--seconds=0.1", "--backfills=100", "--retries=3000")
    assert 0 < ticks["tick_backfills_ms"] <= ticks["tick_backfills_longest_ms"]
    assert 0 < ticks["tick_retries_ms"] <= ticks["tick_retries_longest_ms"]


def run(name: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
