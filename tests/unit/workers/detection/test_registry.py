"""Which detectors there are, and fdet's being imported without anybody noticing."""

from __future__ import annotations

import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.domain import MaskwatchError, ModelRef
from common.models.manifest import MODELS, ModelKind
from tests.detector_files import put_in_cache, saved, spec_of
from workers.detection.registry import detector_names, load_detector
from workers.inference import Engine, Runtime
from workers.weights import files


def test_every_detector_of_the_manifest_can_be_loaded_by_its_name() -> None:
    assert set(detector_names()) == {m.name for m in MODELS.values() if m.kind is ModelKind.DETECTOR}
    assert detector_names()[0] == "centerface"
    assert all(0 < (MODELS[name].threshold or 0) < 1 for name in detector_names())


def what_is_missing(name: str) -> str | None:
    """What a detector lacks on this machine, and how to get it; None if it can be loaded."""
    status = files.examine(files.local_models()[name])
    return None if status.state in files.USABLE else status.detail


def test_what_a_detector_lacks_is_told(cache: Path) -> None:
    assert what_is_missing("centerface") is None
    assert what_is_missing("haar") is None
    assert "maskwatch models import" in (what_is_missing("retinaface-mobilenet") or "")
    assert "maskwatch models pull mtcnn" in (what_is_missing("mtcnn") or "")
    unknown = spec_of(ModelRef("compact", "0" * 64), 0.6)
    with pytest.raises(MaskwatchError, match="unknown detector 'compact'"):
        load_detector(unknown, Runtime())


@pytest.fixture
def fdet_spec(cache: Path, random_mobilenet: Any) -> Any:
    pytest.importorskip("colour", reason="the layer `native` is not installed")
    content = saved(random_mobilenet.state_dict())
    model = put_in_cache(cache, "fdet-retinaface-mobilenet", {"retinaface_mobilenet0.25_Final.pth": content})
    return spec_of(model, 0.6)


def test_fdet_leaves_no_trace_and_asks_nobody(fdet_spec: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    import torch

    def refuse(*_: object) -> None:
        raise AssertionError("somebody opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    mine = types.ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", mine)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fdet"]:
        monkeypatch.delitem(sys.modules, name)
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.is_grad_enabled()

    found = load_detector(fdet_spec, Runtime(Engine.NATIVE)).detect(np.zeros((90, 131, 3), np.uint8))

    assert len(found) == len(found.scores)
    assert sys.modules["torchvision"] is mine
    assert not [name for name in sys.modules if name.startswith("torchvision.")]
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.is_grad_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_fdet_is_given_nothing_that_does_not_fit(cache: Path, random_mobilenet: Any) -> None:
    """Left to itself it takes such a file in silence."""
    state = dict(random_mobilenet.state_dict())
    state["ClassHead.0.conv1x1.odd"] = state.pop("ClassHead.0.conv1x1.bias")
    model = put_in_cache(
        cache, "fdet-retinaface-mobilenet", {"retinaface_mobilenet0.25_Final.pth": saved(state)}
    )  # fmt: skip
    with pytest.raises(MaskwatchError, match=r"missing: ClassHead\.0\.conv1x1\.bias"):
        load_detector(spec_of(model), Runtime(Engine.NATIVE))


def test_detectors_can_be_named_and_the_default_loaded_where_torch_is_not() -> None:
    """A worker without the layer `native`. In a process of its own, for this one has long imported torch."""
    program = """if True:
        import sys
        sys.modules["torch"] = None
        from common.models.pipeline import pipeline_spec, spec_of
        from common.settings import get_settings
        from workers.detection.registry import detector_names, load_detector
        from workers.inference import Runtime
        load_detector(pipeline_spec(get_settings()), Runtime())
        print(len(detector_names()))
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.stdout.strip(), found.stderr) == (str(len(detector_names())), "")
