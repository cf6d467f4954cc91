"""The benchmark runs and counts what it says it counts; the figures themselves belong in docs/performance.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import Services


def test_the_benchmark_of_the_road(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MASKWATCH_")]:
        monkeypatch.delenv(name)
    command = [sys.executable, "-m", "benchmarks.road", "--pictures", "6", "--rounds", "1", "--workers", "1", "--json"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["road_cpu_ms_by_part"]) == {
        "producer", "aggregator", "workers", "postgres", "redis", "s3", "enqueueing",
    }  # fmt: skip
    assert all(value >= 0 for value in result["road_cpu_ms_by_part"].values())
    assert abs(sum(result["road_cpu_ms_by_part"].values()) - result["road_cpu_ms"]) < 0.01
    # The models are most of it on both sides: neither has left out the work.
    assert result["road_cpu_ms_by_part"]["workers"] > 0.5 * result["loop_cpu_ms"] > 5
    # Memory is no matter of speed: a worker with its child stays under 900 MB.
    assert 200 < result["worker_rss_mb"] < 900
