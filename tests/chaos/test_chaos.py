"""The short version of `make chaos`: a promise is kept, and its control breaks it."""

from __future__ import annotations

import pytest

from tests.chaos.experiments import EXPERIMENTS
from tests.chaos.harness import Scale, open_lab

#: What `make test` has time for; `make chaos` runs the others, too.
QUICK = ("forged-messages",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.chaos]) for name in EXPERIMENTS]
)
def test_a_promise_and_its_control(name: str) -> None:
    with open_lab(name, seed=1) as lab:
        outcome = EXPERIMENTS[name].run(lab, Scale.SHORT)
    assert outcome.held, outcome.figures
    assert outcome.control_failed, outcome.control
