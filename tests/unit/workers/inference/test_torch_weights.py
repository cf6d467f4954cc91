"""Files of torch weights: only weights, and only those of this very network."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.domain import MaskwatchError
from workers.inference.torch_weights import fill, read_state


def network(width: int = 5) -> Any:
    return nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 1))


def saved(value: Any) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


@pytest.mark.parametrize("form", ["plain", "parallel", "checkpoint", "parallel checkpoint", "old"])
def test_every_form_of_a_file_fills_the_network(form: str) -> None:
    torch.manual_seed(1)
    state = network().state_dict()
    given = dict(state)
    if "parallel" in form:
        given = {f"module.{name}": value for name, value in given.items()}
    if "checkpoint" in form:
        given = {"epoch": 9, "state_dict": given}
    if form == "old":
        del given["1.num_batches_tracked"]
    filled = network().train()
    fill(filled, read_state(saved(given), "the file"), "the file")
    assert not filled.training
    assert all(torch.equal(value, state[name]) for name, value in filled.state_dict().items() if "tracked" not in name)


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_pickle_with_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    content = saved({"weight": torch.zeros(2), "more": Bomb(tmp_path / "trace")})
    with pytest.raises(MaskwatchError, match=r"evil\.pt holds something else than weights"):
        read_state(content, "evil.pt")
    assert not (tmp_path / "trace").exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "trace").exists()  # the bomb is one


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_refused(kept: float) -> None:
    content = saved(network().state_dict())
    content = content[: int(kept * len(content)) if 0 < kept < 1 else int(kept)]
    with pytest.raises(MaskwatchError, match=r"cut\.pt .*get it again"):
        read_state(content, "cut.pt")


@pytest.mark.parametrize("value", [[torch.zeros(1)], {}, {"epoch": 3}, torch.zeros(3), {"state_dict": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(value: Any) -> None:
    with pytest.raises(MaskwatchError, match="holds no state dict"):
        read_state(saved(value), "odd.pt")


def test_the_names_that_differ_are_told_and_nothing_is_filled() -> None:
    state = {f"old{i}": torch.zeros(1) for i in range(5)} | dict(network(7).state_dict())
    del state["2.weight"]
    filled = network()
    before = {name: value.clone() for name, value in filled.state_dict().items()}
    with pytest.raises(MaskwatchError) as caught:
        fill(filled, state, "other.pt")
    assert str(caught.value) == (
        "other.pt is of another network; missing: 2.weight; not in the network: old0, old1, old2 and 2 more; "
        "of another shape: 0.weight (7, 3, 3, 3) instead of (5, 3, 3, 3), 1.bias (7,) instead of (5,), "
        "1.running_mean (7,) instead of (5,) and 2 more"
    )
    assert all(torch.equal(value, before[name]) for name, value in filled.state_dict().items())


def test_a_backbone_alone_is_not_a_detector() -> None:
    """What is easily confused: the ImageNet file that a training began with."""
    from workers.detection.retinaface_network import RetinaFaceNetwork, load_weights

    body = RetinaFaceNetwork("mobilenet").body.state_dict()
    with pytest.raises(MaskwatchError, match=re.escape("missing: BboxHead.0.conv1x1.bias")):
        load_weights(saved({"state_dict": {f"module.{name}": value for name, value in body.items()}}), "mobilenet")
