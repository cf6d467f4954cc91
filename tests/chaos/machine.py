"""The experiment `state-machine`: what is shipped holds whatever turns are taken, and every planted fault is found."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy.orm import Session

from common import catalog
from common.ledger import StaleJobError
from common.settings import get_settings
from common.tables import Location, Pipeline
from tests.chaos.actors import SLOW, ZONE, LedgerMachine, Plant, Stage
from tests.chaos.hands import Hands, open_hands
from tests.chaos.lab import Experiment, Lab, Outcome, Scale
from tests.chaos.planted import PLANTS, PUBLISHED_LATE, QUICKLY_FOUND
from tests.chaos.promises import OPEN, BrokenPromiseError

STEPS = 50
#: Hands: transactions that are open at once at most.
HANDS = 4


@dataclass
class Run:
    """What the machine made of one plant. `found`: the first promise that broke, in example `counts["examples"]`."""

    counts: Counter[str]
    found: BrokenPromiseError | None
    seconds: float


def explore(url: str, plant: Plant, *, examples: int, seed: int, shrink: bool = False) -> Run:
    """Run the machine on a migrated database, which it empties, until a promise breaks or the examples are used up."""
    began = time.monotonic()
    found: BrokenPromiseError | None = None
    with open_hands(url, HANDS, rewrites=(SLOW, *plant.rewrites)) as hands:
        hands.refusal = StaleJobError
        for statement in plant.before:
            hands.look.execute(statement)
        stage = Stage(hands, *_catalog(hands), plant)
        machine = type("LedgerMachine", (LedgerMachine,), {"stage": stage})
        try:
            run_state_machine_as_test(
                hypothesis.seed(seed)(machine),
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=STEPS,
                    phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
                    database=None,
                    deadline=None,
                    report_multiple_bugs=False,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except BrokenPromiseError as broken:
            found = broken
        except FlakyFailure as flaky:
            # It broke once and not again: broken all the same.
            found = next(each for each in flaky.exceptions if isinstance(each, BrokenPromiseError))
        finally:
            hands.abandon()
            for statement in plant.after:
                hands.look.execute(statement)
    unfit = {*plant.rewrites} - hands.fitted
    assert not unfit, f"these statements are not the product's any more: {unfit}"
    stage.counts.update(hands.counts)
    return Run(stage.counts, found, time.monotonic() - began)


def _catalog(hands: Hands) -> tuple[Location, tuple[Pipeline, Pipeline]]:
    """One location and two pipelines, for all examples."""
    spec = get_settings().pipeline.spec()
    with Session(hands.engine, expire_on_commit=False) as session:
        location = catalog.add_location(session, "lobby", ZONE)
        first = catalog.ensure_pipeline(session, spec)
        second = catalog.ensure_pipeline(session, replace(spec, uncertain_below=0.7))
        location.promoted_pipeline_id = first.id
        session.commit()
    return location, (first, second)


# --- the experiment ---


def _run(lab: Lab, scale: Scale) -> Outcome:
    url = lab.services.endpoints.database_url
    seed = lab.random.randrange(2**32)
    full = scale is Scale.FULL
    shipped = explore(url, Plant(), examples=500 if full else 25, seed=seed, shrink=full)
    # What shows that the early message is what blocks the job, and not the rule that was taken away with it.
    late = explore(url, PUBLISHED_LATE, examples=60 if full else 5, seed=seed)
    runs = {plant.name: explore(url, plant, examples=500, seed=seed) for plant in (PLANTS if full else QUICKLY_FOUND)}
    figures: dict[str, object] = {name: shipped.counts[name] for name in ("examples", "steps")}
    figures |= {
        "transactions": sum(count for name, count in shipped.counts.items() if name.endswith(" committed")),
        "that waited for another": shipped.counts["transactions waited"],
        "refused by the fence": shipped.counts["transactions refused"],
        "killed": shipped.counts["transactions killed"],
        "broken promises": _found(shipped) if shipped.found else 0,
    }
    figures |= {f"known: {name}": count for name, count in shipped.counts.items() if name in OPEN}
    return Outcome(
        figures=figures,
        control={f"{name} {_found(run)}": "found" if run.found else "NOT FOUND" for name, run in runs.items()},
        held=shipped.found is None and late.found is None,
        control_failed=all(run.found for run in runs.values()),
    )


def _found(run: Run) -> str:
    """Which promise broke, and after how much."""
    if run.found is None:
        return f"(in {run.counts['examples']} examples)"
    return f"({run.found.promise!r} breaks in example {run.counts['examples']})"


EXPERIMENTS = (
    Experiment(
        "state-machine",
        "whatever turns producers, workers, reconcilers, operators and aggregators take: every frame counts once",
        "five planted faults",
        _run,
    ),
)
