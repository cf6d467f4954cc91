"""All experiments, in the order of the table in docs/reliability.md."""

from __future__ import annotations

from importlib import import_module

from tests.chaos.harness import Experiment

#: Each of these modules has a tuple EXPERIMENTS.
MODULES = ("workers", "hostile", "outages", "archives", "machine")

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for module in MODULES
    for experiment in import_module(f"tests.chaos.{module}").EXPERIMENTS
}
