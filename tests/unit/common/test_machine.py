"""Cores and GPUs: what a process may use, and what is said where it is asked for more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import machine
from common.domain import MaskwatchError
from common.machine import oversubscribed, require_device, threads_per_process, usable_cores


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of eight cores without a quota; the file that would name one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    return tmp_path / "cpu.max"


def test_threads_never_exceed_the_cores(eight_cores: Path) -> None:
    assert [threads_per_process(n) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    with pytest.raises(ValueError, match="at least 1"):
        threads_per_process(0)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("max 100000", 8)],
)
def test_a_containers_quota_counts(eight_cores: Path, quota: str, cores: int) -> None:
    eight_cores.write_text(quota + "\n")
    assert usable_cores() == cores


def test_too_many_threads_are_named_and_the_default_never_is_too_many(eight_cores: Path) -> None:
    assert oversubscribed(2, 4) is None
    sentence = oversubscribed(3, 4)
    assert sentence is not None and "3 process(es) × 4 thread(s) exceed the 8 core(s)" in sentence
    assert [oversubscribed(n, None) for n in range(1, 9)] == [None] * 8
    assert oversubscribed(9, None) is not None


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_device("cpu")
    monkeypatch.setattr(machine, "gpu_names", tuple)
    with pytest.raises(MaskwatchError, match="device cuda needs an NVIDIA GPU"):
        require_device("cuda")
    monkeypatch.setattr(machine, "gpu_names", lambda: ("A", "B"))
    require_device("cuda:1")
    with pytest.raises(MaskwatchError, match="cuda:2 does not exist; choose one of: cuda:0 A, cuda:1 B"):
        require_device("cuda:2")


def test_what_a_runtime_lacks_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.RUNTIMES, "native", ("native", ("json", "not_installed_here")))
    assert machine.missing_for("native") == (
        "the native runtime needs not_installed_here: pip install 'maskwatch[native]'"
    )
    monkeypatch.setitem(machine.RUNTIMES, "native", ("native", ("json",)))
    assert machine.missing_for("native") is None
