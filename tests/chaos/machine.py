"""The experiment `state-machine`: what is shipped holds whatever turns are taken, and every planted fault is found."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy.orm import Session

from common.catalog import places
from common.database.tables import Location, Pipeline
from common.database.versions import OutdatedProgramError
from common.ledger import StaleJobError
from common.models.pipeline import pipeline_spec
from common.settings import get_settings
from tests.chaos.actors import RESET, SLOW, ZONE, LedgerMachine, Mutant, Stage
from tests.chaos.harness import Experiment, Lab, Outcome, Scale
from tests.chaos.interleaver import Hands, open_hands
from tests.chaos.invariants import OPEN, BrokenPromiseError
from tests.chaos.mutants import MUTANTS, PUBLISHED_LATE, QUICKLY_FOUND
from tests.mutants import check_fit

STEPS = 50
#: Nobody pulls these plugs here, and a vacuum would come at another time in each run.
QUICK_DATABASE = (
    "ALTER SYSTEM SET fsync = off",
    "ALTER SYSTEM SET autovacuum = off",
    "SELECT pg_reload_conf()",
)

#: Hands: transactions that are open at once at most.
HANDS = 4


@dataclass
class Run:
    """What the machine made of one mutant. `found`: the first promise that broke, in example `counts["examples"]`."""

    mutant: str
    counts: Counter[str]
    found: BrokenPromiseError | None
    seconds: float


def explore(url: str, mutant: Mutant, *, examples: int, seed: int, shrink: bool = False) -> Run:
    """Run the machine on a migrated database of its own, which it empties, until a promise breaks or the examples are
    used up."""
    began = time.monotonic()
    with open_hands(url, HANDS, rewrites=(SLOW, *mutant.rewrites)) as hands:
        hands.refusal = (StaleJobError, OutdatedProgramError)
        for statement in (*QUICK_DATABASE, RESET, *mutant.before):
            hands.look.execute(statement)
        stage = Stage(hands, *_catalog(hands), mutant)
        while not stage.broken and stage.counts["examples"] < examples:
            _explore(stage, examples - stage.counts["examples"], seed + stage.counts["unrepeatable"], shrink)
        hands.abandon()
        for statement in mutant.after:
            hands.look.execute(statement)
    check_fit(mutant.rewrites, hands.fitted)
    # The last is the simplest, where it was looked for.
    found = stage.broken[-1] if stage.broken else None
    stage.counts.update(hands.counts)
    return Run(mutant.name, stage.counts, found, time.monotonic() - began)


def _explore(stage: Stage, examples: int, seed: int, shrink: bool) -> None:
    machine = hypothesis.seed(seed)(type("LedgerMachine", (LedgerMachine,), {"stage": stage}))
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,  # standard output is the experiment's; what broke is told as its figures
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except BrokenPromiseError:
        pass  # is in `stage.broken`
    except Flaky:
        # Two transactions that waited for a third went on in another order than before. What broke still broke.
        stage.counts["unrepeatable"] += 1


def _catalog(hands: Hands) -> tuple[Location, tuple[Pipeline, Pipeline]]:
    """One location and two pipelines, for all examples."""
    spec = pipeline_spec(get_settings())
    with Session(hands.engine, expire_on_commit=False) as session:
        location = places.add_location(session, "lobby", ZONE)
        first = places.ensure_pipeline(session, spec)
        second = places.ensure_pipeline(session, replace(spec, uncertain_below=0.7))
        location.promoted_pipeline_id = first.id
        session.commit()
    return location, (first, second)


# --- the experiment ---


def _run(lab: Lab, scale: Scale) -> Outcome:
    url = lab.services.endpoints.database_url
    seed = lab.random.randrange(2**32)
    full = scale is Scale.FULL
    shipped = explore(url, Mutant(), examples=500 if full else 25, seed=seed, shrink=full)
    # What shows that the early message is what blocks the job, and not the rule that was taken away with it.
    late = explore(url, PUBLISHED_LATE, examples=60 if full else 5, seed=seed)
    # Far more than it takes: the rarest is found once in about three hundred.
    runs = [explore(url, mutant, examples=1500, seed=seed) for mutant in (MUTANTS if full else QUICKLY_FOUND)]
    figures: dict[str, object] = {name: shipped.counts[name] for name in ("examples", "steps")}
    figures |= {
        "transactions": sum(count for name, count in shipped.counts.items() if name.endswith(" committed")),
        "that waited for another": shipped.counts["transactions waited"],
        "refused by the fence": shipped.counts["transactions refused"],
        "killed": shipped.counts["transactions killed"],
        "new breaches": shipped.found.promise if shipped.found else 0,
    }
    figures |= {f"examples with: {name}": count for name, count in shipped.counts.items() if name in OPEN}
    # A run in which nobody was refused, killed or made to wait would not have tried much; a short one may be such.
    tried = not full or all(shipped.counts[f"transactions {what}"] for what in ("waited", "refused", "killed"))
    return Outcome(
        figures=figures,
        control={f"examples until {_found(run)}": run.counts["examples"] for run in runs},
        held=shipped.found is None and late.found is None and tried,
        control_failed=all(run.found for run in runs),
    )


def _found(run: Run) -> str:
    """Which fault was found, and what it broke."""
    return f"{run.mutant!r} is found ({run.found.promise})" if run.found else f"{run.mutant!r} is NOT found"


EXPERIMENTS = (
    Experiment(
        "state-machine",
        "whatever turns producers, workers, reconcilers, operators and aggregators take: every frame counts once",
        "planted faults",
        _run,
    ),
)
