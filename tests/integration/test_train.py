"""A real, tiny `maskwatch train` from the command line: killed in the middle, started again, checked at the end."""

from __future__ import annotations

import importlib.util
import json
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


def command(data: Path, out: Path, epochs: int) -> list[str]:
    return [
        sys.executable, "-c", "from common.cli import main; main()", "train", str(data), "--out", str(out),
        "--epochs", str(epochs), "--side", str(SIDE), "--json",
    ]  # fmt: skip


def test_a_killed_training_goes_on_and_its_onnx_file_agrees(data, tmp_path):
    out = tmp_path / "trained"
    first = subprocess.Popen(command(data, out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
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
    assert values["onnx_difference"] < 1e-4
    assert sorted(path.name for path in out.iterdir()) == [
        "compact.md", "compact.onnx", "compact.weights.h5", "metrics.json",
    ]  # fmt: skip
    assert onnx_input_shape(out / "compact.onnx")[1:] == [SIDE, SIDE, 3]


def onnx_input_shape(path: Path) -> list[int | str]:
    import onnxruntime

    (crops,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    assert not isinstance(crops.shape[0], int), "the number of crops has to be free"
    return list(crops.shape)


@pytest.fixture(scope="module")
def network() -> Any:
    """The compact network with random weights, so large that its answers differ from crop to crop."""
    from workers.training.network import build_compact

    model = build_compact(SIDE)
    rng = np.random.default_rng(2)
    for weights in model.weights:
        # Depthwise kernels see one channel each.
        fan_in = np.prod(weights.shape[:2] if weights.shape[-1] == 1 else weights.shape[:-1]) or 1
        drawn = rng.normal(0, np.sqrt(2 / fan_in), weights.shape)
        weights.assign(np.abs(drawn) / 4 + 0.75 if weights.name in ("gamma", "moving_variance") else drawn)
    return model


def test_onnx_and_keras_agree_in_batches_of_any_size(network, tmp_path):
    import onnxruntime

    from workers.training.export import TOLERANCE, export_onnx, parameter_count

    coarse = np.random.default_rng(1).uniform(-1, 1, (9, 2, 2, 3)).astype(np.float32)
    crops = coarse.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    export_onnx(network, SIDE, tmp_path / "random.onnx", crops)
    expected = network.predict(crops, verbose=0)
    assert expected.std(axis=0).min() > 100 * TOLERANCE, "equal answers to everything would agree with anything"
    session = onnxruntime.InferenceSession(tmp_path / "random.onnx", providers=["CPUExecutionProvider"])
    for part in (slice(0, 9), slice(3, 4)):
        (probabilities,) = session.run(["probabilities"], {"crops": crops[part]})
        assert np.abs(probabilities - expected[part]).max() < TOLERANCE
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert parameter_count(tmp_path / "random.onnx") == pytest.approx(network.count_params(), rel=0.05)


def test_the_mirrored_network_answers_with_the_mean_and_has_no_more_weights(network, tmp_path):
    from workers.training.export import export_onnx, parameter_count
    from workers.training.network import mirrored

    coarse = np.random.default_rng(3).uniform(-1, 1, (5, 2, 2, 3)).astype(np.float32)
    crops = coarse.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    turned = crops[:, :, ::-1]
    mean = (network.predict(crops, verbose=0) + network.predict(turned, verbose=0)) / 2
    both = mirrored(network)
    assert both.predict(crops, verbose=0) == pytest.approx(mean, abs=1e-6)
    assert np.abs(mean - network.predict(crops, verbose=0)).max() > 0.01, "the mirror image should say something else"
    export_onnx(both, SIDE, tmp_path / "mirrored.onnx", crops)
    assert parameter_count(tmp_path / "mirrored.onnx") == pytest.approx(network.count_params(), rel=0.05)


def test_an_onnx_file_that_differs_is_not_written(network, tmp_path, monkeypatch):
    from common.domain import MaskwatchError
    from workers.training.export import export_onnx

    crops = np.zeros((2, SIDE, SIDE, 3), np.float32)
    other = network.predict(crops, verbose=0) + np.float32([0.001, -0.001])
    monkeypatch.setattr(network, "predict", lambda *args, **kwargs: other)
    with pytest.raises(MaskwatchError, match=r"differs from the network by 1\.0e-03"):
        export_onnx(network, SIDE, tmp_path / "other.onnx", crops)
    assert list(tmp_path.iterdir()) == []


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
        "error: this command needs tensorflow, which is not installed: pip install 'maskwatch[train]'"
    )
