"""The benchmarks of the models run and count what they say they count; the figures themselves belong in
docs/performance.md."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from tests.services import forget_settings

torch = pytest.importorskip("torch", reason="the `native` layer is not installed")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", *command)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.bench
@pytest.mark.train
def test_the_benchmark_of_the_models() -> None:
    pytest.importorskip("keras", reason="the `train` layer is not installed")
    done = run("benchmarks.models", "--quick", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(row["width"], row["height"]) for row in result["detectors"]] == [(640, 480), (1000, 562)]
    for row in result["detectors"]:
        assert row["faces"] > 10
        assert row["faster_than_fdet"] == pytest.approx(row["fdet_ms"] / row["onnx_ms"])
        assert 0 < row["post_share"] < 1


def test_without_a_gpu_its_benchmark_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("benchmarks.gpu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "nothing measured: device cuda needs" in done.stderr


@pytest.mark.bench
def test_the_benchmark_of_gpus_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with tiny frames: that every figure is there and that they fit each other."""
    from benchmarks import gpu

    monkeypatch.setenv("MASKWATCH_MODELS_DIR", "set by the benchmark")
    forget_settings()
    try:
        result = gpu.measure(torch.device("cpu"), ("retinaface-mobilenet", "centerface"), ((96, 64),), (1, 2), 0.1)
    finally:
        forget_settings()
    retinaface, center = result["detectors"]
    for row in (retinaface, center):
        assert row["per_s"] == max(row["per_s_by_batch"].values()) > 0
        assert set(row["per_s_by_batch"]) == {1, 2}
        assert row["before_share"] + row["network_share"] + row["after_share"] == pytest.approx(1)
        matrix_flops = 1e12 * result["matrix_tflops"]
        assert row["share_of_matrix_rate"] == pytest.approx(1e9 * row["gflop"] * row["per_s"] / matrix_flops)
    assert retinaface["fdet_per_s"] > 0
    assert center["fdet_per_s"] is None
    assert any("frames/s" in line for line in gpu.lines(result))


@pytest.mark.bench
@pytest.mark.parametrize(("size", "gflop"), [((640, 480), 66.4), ((1000, 562), 124.2)])
def test_the_work_of_resnet50_is_what_the_literature_says(size: tuple[int, int], gflop: float) -> None:
    """Counted on shapes alone, without a calculation."""
    from torch.utils.flop_counter import FlopCounterMode

    from workers.detection.retinaface_network import RetinaFaceNetwork

    counter = FlopCounterMode(display=False)
    network: Any = RetinaFaceNetwork("resnet50").eval().to("meta")
    with torch.no_grad(), counter:
        network(torch.zeros(1, 3, size[1], size[0], device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)
