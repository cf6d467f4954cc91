"""What is kept of the shipped classifiers, and their bars, against the held-out tenth of the shared faces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.model_figures import SHIPPED, Confusion, read_confusions

DATA = Path(os.environ.get("MASKWATCH_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
FACES = DATA / "faces"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (FACES / "with_mask").is_dir(),
        reason=f"no faces at {FACES}: set MASKWATCH_TEST_DATA to the folder that holds faces/",
    ),
]
pytest.importorskip("sklearn", reason="the `train` layer is not installed")


@pytest.fixture(scope="module", params=read_confusions(SHIPPED).values(), ids=lambda kept: kept.classifier)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(what is kept, what is measured now, all figures), by the command that keeps it."""
    kept: Confusion = request.param
    path = tmp_path_factory.mktemp("kept") / "figures.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKWATCH_")}
    result = subprocess.run(
        [sys.executable, "-c", "from common.cli import main; main()", "evaluate", "faces", str(FACES), "--held-out",
         "--classifier", kept.classifier, "--keep-confusion", str(path), "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return kept, read_confusions(path)[kept.sha256], json.loads(result.stdout)


def test_what_is_kept_is_what_is_measured(measured):
    kept, now, _ = measured
    assert (now.faces, now.uncertain_below) == (kept.faces, kept.uncertain_below)
    # A face on the line may fall to the other side where another CPU rounds differently.
    for before, after in zip((*kept.with_mask, *kept.without_mask), (*now.with_mask, *now.without_mask), strict=True):
        assert abs(before - after) <= 1


def test_f1_and_calibration_reach_their_bars(measured):
    _, _, figures = measured
    assert figures["report"]["macro avg"]["f1-score"] >= 0.985
    assert figures["calibration"]["expected_calibration_error"] < 0.03
