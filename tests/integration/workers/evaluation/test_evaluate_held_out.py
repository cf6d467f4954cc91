"""The bars of the shipped classifier on the tenth of the faces that no training saw, by the command one would type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.models import figures as model_figures
from tests import ROOT
from tests.pipelines import default_spec

DATA = Path(os.environ.get("MASKWATCH_TEST_DATA") or ROOT.parent / "shared" / "data")
HELD_OUT = ROOT / "workers" / "classification" / "weights" / "held_out.txt"

pytestmark = [
    pytest.mark.data,
    pytest.mark.bench,
    pytest.mark.skipif(
        not (DATA / "faces").is_dir() or not (DATA / "scenes_train").is_dir(),
        reason=f"no faces at {DATA}: set MASKWATCH_TEST_DATA to the folder that holds faces/ and scenes_train/",
    ),
]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKWATCH_")}
    command = ["evaluate", "faces", str(DATA / "faces"), "--held-out", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", "from common.cli import main; main()", *command],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_f1_reaches_its_bar_for_both_classes(figures):
    assert figures["all"]["faces"] > 600
    for name in ("with_mask", "without_mask"):
        assert figures["report"][name]["f1-score"] >= 0.985


def test_probabilities_can_be_believed(figures):
    assert figures["calibration"]["expected_calibration_error"] < 0.03


def test_the_kept_confusion_matrix_is_what_evaluation_finds(figures):
    kept = model_figures.confusion_of(default_spec())
    assert kept is not None
    (configured,) = (row for row in figures["uncertain"] if row["configured"])
    for ground_truth, called in enumerate((kept.with_mask, kept.without_mask)):
        assert list(called[:2]) == configured["confusion"][ground_truth]
        assert sum(called) == sum(figures["all"]["confusion"][ground_truth])


def test_no_variant_of_a_held_out_face_was_learned_from():
    """The split is made again from the data; what it holds out is what the shipped list names."""
    from workers.datasets import dataset

    samples = dataset.load([DATA / "faces", DATA / "scenes_train"]).samples
    split = dataset.split_by_group(samples, seed=42)
    assert [sample.name for sample in split.held_out] == HELD_OUT.read_text(encoding="utf-8").splitlines()
    held_out = {sample.group for sample in split.held_out}
    assert not held_out & {sample.group for sample in (*split.training, *split.validation)}
    # The public test scenes are other pictures than those anything was fitted to.
    learned = {sample.group for sample in samples if sample.from_scene}
    assert not learned & {f"scenes_train/{path.name}" for path in (DATA / "scenes" / "images").iterdir()}
    # The control: a brighter copy of a held-out face among the others would have been noticed.
    face = split.held_out[0]
    brighter = np.clip(face.pixels.astype(np.int16) + 30, 0, 255).astype(np.uint8)
    copy = replace(face, pixels=brighter, group="planted", name="planted")
    grouped = dataset.group_lookalikes([face, copy, *split.training[:200]])
    assert grouped[0].group == grouped[1].group
    assert grouped[0].group not in {sample.group for sample in grouped[2:]}
