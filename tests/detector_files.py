"""Files of detectors for tests: networks with seeded random weights, written as the real files are."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.domain import ModelRef, PipelineSpec
from common.models import manifest
from common.settings import get_settings
from tests.pipelines import default_spec

#: By this the random weights of the heads are multiplied: else every score is 0 or 1 and every box as long as the
#: picture, or no score is far from a half.
HEAD_SCALE = {"resnet50": 0.03, "mobilenet": 2.5}


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the folder this machine's cache of models, until the test ends and forgets the settings."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("MASKWATCH_MODELS_DIR", str(folder))
    get_settings.cache_clear()
    return folder


def put_in_cache(folder: Path, name: str, contents: dict[str, bytes]) -> ModelRef:
    """Writes a model's files and gives the reference that pins these very files."""
    model = manifest.MODELS[name]
    for file in model.files:
        (folder / file.name).write_bytes(contents[file.name])
    sha256 = model.sha256_with([hashlib.sha256(contents[file.name]).hexdigest() for file in model.files])
    assert sha256 is not None
    return ModelRef(name, sha256)


def random_retinaface(backbone: Any, seed: int = 7) -> Any:
    """A RetinaFace with random weights whose features are neither dull nor huge: normalised on a random picture."""
    import torch
    from torch import nn

    from workers.detection.retinaface_network import RetinaFaceNetwork

    torch.manual_seed(seed)
    network = RetinaFaceNetwork(backbone).train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(2, 3, 256, 256) * 60)
        for head in (*network.ClassHead, *network.BboxHead, *network.LandmarkHead):
            head.conv1x1.weight *= HEAD_SCALE[backbone]
    return network.eval()


def saved(state: dict[str, Any], prefix: str = "module.") -> bytes:
    """A state dict as a training on several GPUs saves it."""
    import torch

    written = io.BytesIO()
    torch.save({prefix + name: value for name, value in state.items()}, written)
    return written.getvalue()


def spec_of(detector: ModelRef, threshold: float = 0.5, **settings: Any) -> PipelineSpec:
    """The default pipeline with another detector."""
    spec = default_spec(**settings)
    return replace(spec, detector=detector, detector_threshold=threshold)
