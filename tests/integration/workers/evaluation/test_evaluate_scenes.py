"""The bars of the shipped detector and classifier on the public test scenes, by the command a user would type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

DATA = Path(os.environ.get("MASKWATCH_TEST_DATA") or ROOT.parent / "shared" / "data")
SCENES = DATA / "scenes"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (SCENES / "annotations").is_dir(),
        reason=f"no test scenes at {SCENES}: set MASKWATCH_TEST_DATA to the folder that holds scenes/",
    ),
]


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    # The pipeline of a new installation: without the settings of the person who runs the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKWATCH_")}
    result = subprocess.run(
        [sys.executable, "-c", "from common.cli import main; main()", "evaluate", "scenes", str(SCENES), "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def test_all_images_and_labels_are_counted(summary):
    assert summary["images"] == len(list((SCENES / "images").iterdir()))
    assert summary["unreadable"] == []
    assert summary["labelled_faces"] == sum(
        path.read_text().count("<object>") for path in (SCENES / "annotations").iterdir()
    )


def test_recall_reaches_its_bars(summary):
    assert summary["sizes"]["16–32"]["recall"] >= 0.967
    assert summary["sizes"]["≥32"]["recall"] >= 0.951


def test_precision_reaches_its_bar(summary):
    assert summary["precision"] >= 0.862


def test_every_figure_is_in_the_same_answer(summary):
    assert summary["sizes"]["16–24"]["balanced_accuracy"] is not None
    assert 0 < summary["average_precision"] < 1
    assert summary["judged"]["worn_wrongly"]["matched"] > 0
    assert summary["calibration"]["expected_calibration_error"] < 0.1
    (configured,) = (row for row in summary["uncertain"] if row["configured"])
    assert configured["uncertain_share"] == summary["judged"]["uncertain_share"]


def test_balanced_accuracy_reaches_its_bar(summary):
    assert summary["judged"]["balanced_accuracy"] >= 0.96
