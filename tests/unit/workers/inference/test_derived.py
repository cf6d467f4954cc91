"""ONNX files made from weights: made once, kept whole, and made anew where they aren't what they were."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.domain import MaskwatchError, ModelRef
from common.settings import get_settings
from tests.detector_files import use_cache
from workers.inference.derived import derived_onnx, derived_path

MODEL = ModelRef("retinaface-mobilenet", "ab" * 32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield use_cache(tmp_path / "models", monkeypatch)
    get_settings.cache_clear()


class Maker:
    """Counts how often a file was made."""

    made = 0

    def __call__(self) -> bytes:
        self.made += 1
        return b"network"


def test_a_file_is_made_once(cache: Path) -> None:
    make = Maker()
    assert [derived_onnx(MODEL, "v-1", make) for _ in range(3)] == [b"network"] * 3
    assert make.made == 1
    names = sorted(path.name for path in (cache / "derived").iterdir())
    assert names == [f"{MODEL.sha256}-v-1.onnx", f"{MODEL.sha256}-v-1.onnx.sha256"]


def test_other_weights_and_another_version_are_other_files(cache: Path) -> None:
    make = Maker()
    for model, version in ((MODEL, "v-1"), (MODEL, "v-2"), (ModelRef(MODEL.name, "cd" * 32), "v-1")):
        derived_onnx(model, version, make)
    assert make.made == 3


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "hash changed", "hash gone", "hash is no text"])
def test_a_damaged_file_is_made_anew(cache: Path, damage: str) -> None:
    make = Maker()
    derived_onnx(MODEL, "v-1", make)
    path = derived_path(MODEL, "v-1")
    sidecar = path.with_name(path.name + ".sha256")
    {
        "changed": lambda: path.write_bytes(b"Network"),
        "cut": lambda: path.write_bytes(b"netw"),
        "empty": lambda: path.write_bytes(b""),
        "hash changed": lambda: sidecar.write_text("00" * 32),
        "hash gone": sidecar.unlink,
        "hash is no text": lambda: sidecar.write_bytes(b"\xff\xfe"),
    }[damage]()
    assert derived_onnx(MODEL, "v-1", make) == b"network"
    assert make.made == 2
    assert derived_onnx(MODEL, "v-1", make) == b"network"
    assert make.made == 2


def test_a_making_that_fails_leaves_nothing(cache: Path) -> None:
    def fail() -> bytes:
        raise MaskwatchError("no weights")

    with pytest.raises(MaskwatchError, match="no weights"):
        derived_onnx(MODEL, "v-1", fail)
    assert not list(cache.rglob("*"))


def test_a_cache_that_can_not_be_written_costs_time_only(cache: Path) -> None:
    (cache / "derived").write_text("in the way")
    make = Maker()
    assert [derived_onnx(MODEL, "v-1", make) for _ in range(2)] == [b"network"] * 2
    assert make.made == 2


def test_without_torch_a_file_serves_and_its_lack_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derived_onnx(MODEL, "v-1", Maker())
    find_spec = importlib.util.find_spec

    def without_torch(name: str, *rest: Any) -> Any:
        return None if name == "torch" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    assert derived_onnx(MODEL, "v-1", Maker()) == b"network"
    with pytest.raises(MaskwatchError, match=r"pip install 'maskwatch\[native\]'"):
        derived_onnx(MODEL, "v-2", Maker())
