"""A real, tiny `maskwatch train` from the command line: killed in the middle, started again, checked at the end."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="the `train` layer is not installed"),
]

SIDE = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 noisy ovals; half of them have a light patch over their lower half."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for label in ("with_mask", "without_mask"):
        (folder / label).mkdir()
        for number in range(60):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
            face = coarse.resize((48, 56), Image.Resampling.BICUBIC)
            draw = ImageDraw.Draw(face)
            draw.ellipse((8, 6, 40, 52), fill=(190, 140, 110))
            if label == "with_mask":
                draw.rectangle((10, 30, 38, 48), fill=(200, 225, 240))
            face.save(folder / label / f"{number}.png")
    (folder / "with_mask" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def command(data: Path, out: Path, epochs: int, *more: str) -> list[str]:
    return [
        sys.executable, "-c", "from common.cli import main; main()", "train", str(data), "--out", str(out),
        "--arch", "compact", "--stages", f"{SIDE}:{epochs}", "--json", *more,
    ]  # fmt: skip


#: What every training leaves beside the network itself.
LEFT = {
    "metrics.json", "held_out.txt", "curves.png", "samples.png", "confusion-folders.png", "reliability-folders.png",
}  # fmt: skip


@pytest.mark.bench
def test_a_killed_training_goes_on_and_its_onnx_file_agrees(data, tmp_path):
    out = tmp_path / "trained"
    first = subprocess.Popen(command(data, out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(6000):  # loading TensorFlow alone takes a minute on a busy machine
            if (out / "progress.json").exists() or first.poll() is not None:
                break
            time.sleep(0.05)
        assert first.poll() is None, "it ended before it could be killed"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = json.loads((out / "progress.json").read_text())
    assert before["epochs_done"] == 1

    second = subprocess.run(command(data, out, 2), capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    values = json.loads(second.stdout)
    assert f"epoch {before['epochs_done']} of 2" not in second.stderr, "it began again"
    assert values["history"][: before["epochs_done"]] == before["history"]
    assert [figures["epoch"] for figures in values["history"]] == [1, 2]

    assert values["data"]["faces"] == {"with_mask": 60, "without_mask": 60}
    assert json.loads((out / "metrics.json").read_text()) == values
    assert [entry["file"] for entry in values["data"]["unreadable"]] == ["with_mask/torn.jpg"]
    assert "with_mask/torn.jpg" in second.stderr
    assert values["onnx"]["difference"] < 1e-4
    assert {path.name for path in out.iterdir()} >= LEFT | {"compact.md", "compact.onnx", "compact.weights.h5"}
    assert not list(out.glob("checkpoint-*")) and not (out / "progress.json").exists()
    held_out = (out / "held_out.txt").read_text().splitlines()
    assert len(held_out) == values["data"]["held_out_faces"] == values["held_out"]["folders"]["all"]["faces"]
    assert onnx_input_shape(out / "compact.onnx")[1:] == [SIDE, SIDE, 3]
    assert values["onnx"]["sha256"] in (out / "compact.md").read_text()


@pytest.mark.bench
def test_the_notebooks_recipe_trains_xception_and_says_what_it_lacks(data, tmp_path):
    out = tmp_path / "trained"
    more = ("--arch", "xception", "--recipe", "notebook", "--limit", "80")
    environment = {**os.environ, "KERAS_HOME": str(tmp_path)}
    result = subprocess.run(command(data, out, 1, *more), capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "no ImageNet weights found" in result.stderr
    values = json.loads(result.stdout)
    assert values["settings"]["pretrained"] is False
    assert values["data"]["training_faces"] == 72
    assert values["temperature"] == 1
    assert {path.name for path in out.iterdir()} >= LEFT | {"xception.md", "xception.onnx", "xception.weights.h5"}
    assert (out / "xception.onnx").stat().st_size < 50_000_000
    assert values["onnx"]["difference"] < 5e-3


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the `native` layer is not installed")
@pytest.mark.bench
def test_a_training_in_torch_ends_with_the_same_files(data, tmp_path):
    out = tmp_path / "trained"
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    result = subprocess.run(command(data, out, 1), capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["onnx"]["difference"] < 1e-4
    assert {path.name for path in out.iterdir()} >= LEFT | {"compact.md", "compact.onnx", "compact.weights.h5"}


def onnx_input_shape(path: Path) -> list[int | str]:
    import onnxruntime

    (crops,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    assert not isinstance(crops.shape[0], int), "the number of crops has to be free"
    return list(crops.shape)


@pytest.fixture(scope="module")
def network() -> Any:
    """The compact network with random weights, so large that its answers differ from crop to crop."""
    from workers.classification import networks

    model = networks.build("compact", None)
    rng = np.random.default_rng(2)
    for weights in model.weights:
        # Depthwise kernels see one channel each.
        fan_in = np.prod(weights.shape[:2] if weights.shape[-1] == 1 else weights.shape[:-1]) or 1
        drawn = rng.normal(0, np.sqrt(2 / fan_in), weights.shape)
        weights.assign(np.abs(drawn) / 4 + 0.75 if weights.name in ("gamma", "moving_variance") else drawn)
    return model


@pytest.fixture(scope="module")
def settings() -> Any:
    from workers.training import recipes

    compact = recipes.settings_for(recipes.Recipe.FIELD, "compact")
    return recipes.with_stages(compact, recipes.read_stages(f"{SIDE}:1"), None)


def coarse_crops(seed: int, count: int) -> Any:
    """Crops whose mirror images differ, of large patches, which random networks tell apart."""
    coarse = np.random.default_rng(seed).uniform(-1, 1, (count, 2, 2, 3)).astype(np.float32)
    return coarse.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)


def mean_over_mirror(network: Any, crops: Any) -> Any:
    return (network.predict(crops, verbose=0) + network.predict(crops[:, :, ::-1], verbose=0)) / 2


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 5e-3)])
def test_onnx_and_keras_agree_in_batches_of_any_size(network, settings, tmp_path, half, tolerance):
    import onnxruntime

    from workers.training.export import export_onnx, parameter_count

    crops = coarse_crops(1, 9)
    export_onnx(network, settings, tmp_path / "random.onnx", crops, half=half)
    expected = mean_over_mirror(network, crops)
    assert expected.std(axis=0).min() > 10 * tolerance, "equal answers to everything would agree with anything"
    assert np.abs(expected - network.predict(crops, verbose=0)).max() > 0.01, "the mirror image should differ"
    session = onnxruntime.InferenceSession(tmp_path / "random.onnx", providers=["CPUExecutionProvider"])
    for part in (slice(0, 9), slice(3, 4)):
        (probabilities,) = session.run(["probabilities"], {"crops": crops[part]})
        assert np.abs(probabilities - expected[part]).max() < tolerance
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert parameter_count(tmp_path / "random.onnx") == pytest.approx(network.count_params(), rel=0.05)


@pytest.mark.parametrize("half", [False, True])
def test_keras_finds_its_weights_in_the_onnx_file(network, settings, tmp_path, half):
    import onnxruntime

    from workers.classification.keras_session import to_keras
    from workers.training.export import export_onnx

    crops = coarse_crops(4, 9)
    export_onnx(network, settings, tmp_path / "random.onnx", crops, half=half, temperature=0.7)
    session = onnxruntime.InferenceSession(tmp_path / "random.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"crops": crops})
    found = to_keras((tmp_path / "random.onnx").read_bytes(), "random").predict(crops, verbose=0)
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_temperature_is_in_the_file(network, settings, tmp_path):
    import onnxruntime

    from tests.temperature import apply_temperature
    from workers.training.export import export_onnx

    crops = coarse_crops(5, 9)
    export_onnx(network, settings, tmp_path / "cold.onnx", crops, temperature=0.5)
    session = onnxruntime.InferenceSession(tmp_path / "cold.onnx", providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"crops": crops})
    sides = [apply_temperature(network.predict(side, verbose=0), 0.5) for side in (crops, crops[:, :, ::-1])]
    assert probabilities == pytest.approx((sides[0] + sides[1]) / 2, abs=1e-4)


def test_an_onnx_file_that_differs_is_not_written(network, settings, tmp_path, monkeypatch):
    from common.domain import MaskwatchError
    from workers.training import export

    crops = coarse_crops(6, 2)
    run = export._run
    monkeypatch.setattr(export, "_run", lambda *args: run(*args) + np.float32([0.001, -0.001]))
    with pytest.raises(MaskwatchError, match=r"differs from the network by 1\.0e-03"):
        export.export_onnx(network, settings, tmp_path / "other.onnx", crops)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_refused_leaves_no_folder(tmp_path):
    (tmp_path / "data" / "with_mask").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "with_mask" / "one.png")
    out = tmp_path / "trained"
    result = subprocess.run(command(tmp_path / "data", out, 1), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: no face of class without_mask in the data; a classifier needs both classes\n"
    assert not out.exists()


def test_a_finished_training_is_not_overwritten(data, tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    result = subprocess.run(command(data, tmp_path, 1), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path} holds a finished training; choose another folder or remove it\n"


def test_a_folder_that_cannot_be_made_is_one_line(data, tmp_path):
    (tmp_path / "file").touch()
    result = subprocess.run(command(data, tmp_path / "file" / "out", 1), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path / 'file' / 'out'} can't be made: Not a directory\n"


def test_another_training_in_the_same_folder_is_refused_in_one_line(data, tmp_path):
    out = tmp_path / "trained"
    out.mkdir()
    (out / "progress.json").write_text('{"fingerprint": "of something else"}')
    result = subprocess.run(command(data, out, 1), capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {out} holds a training with other data")
    assert not (out / "compact.onnx").exists()


def test_a_missing_tensorflow_is_named_in_one_line(data, tmp_path):
    code = "import sys; sys.modules['tensorflow'] = None; from common.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "train", str(data), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "error: this command needs tensorflow, which is not installed: pip install 'maskwatch[native]'"
    )
