"""The planted faults that the short experiment leaves out are found, too; what is no fault is not taken for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.actors import Mutant
from tests.chaos.harness import open_lab
from tests.chaos.machine import explore
from tests.chaos.mutants import (
    KEPT_TOKEN,
    MUTANTS,
    NO_LOCK,
    OUTDATED_AGGREGATOR,
    PUBLISHED_LATE,
    QUICKLY_FOUND,
    STALE_TOKEN,
    UPSERTED_MARKS,
)

pytestmark = pytest.mark.chaos

#: Each with a seed by which it is found in few examples. (How many it takes differs a little from run to run: see
#: `machine.explore`.)
SEEDS = {STALE_TOKEN: 1, KEPT_TOKEN: 1, OUTDATED_AGGREGATOR: 1, UPSERTED_MARKS: 1, NO_LOCK: 1}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with open_lab("planted", seed=1) as lab:
        yield lab.services.endpoints.database_url


def test_each_planted_fault_is_looked_for() -> None:
    assert {*SEEDS, *QUICKLY_FOUND} == {*MUTANTS}


@pytest.mark.parametrize("mutant", SEEDS, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_found(url: str, mutant: Mutant) -> None:
    run = explore(url, mutant, examples=1500, seed=SEEDS[mutant])
    print(f"found after {run.counts['examples']} examples, {run.counts['steps']} steps")
    assert run.found is not None


def test_a_fault_is_found_by_what_it_does(url: str) -> None:
    """Without the rule for overdue messages, but published after the commit, nothing is stuck: that rule is not what
    `publish before commit` is found by."""
    run = explore(url, PUBLISHED_LATE, examples=10, seed=1)
    assert run.found is None, run.found
