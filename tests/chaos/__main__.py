"""`make chaos`: pull plugs, count, and print the table of docs/reliability.md.

Local processes only. A seed reproduces an experiment's choices; what the machine makes of them differs from run to run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping

import click

from tests.chaos.experiments import EXPERIMENTS
from tests.chaos.harness import Outcome, Scale, open_lab


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, default=1, show_default=True, help="Reproduces the choices of a run.")
@click.option("--short", is_flag=True, help="Fewer kills and jobs: minutes instead of an hour.")
@click.option(
    "--only", "only", multiple=True, type=click.Choice(list(EXPERIMENTS)), help="Only these; may be repeated."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines instead of a Markdown table.")
def main(seed: int, short: bool, only: tuple[str, ...], as_json: bool) -> None:
    """Run the chaos experiments, each with its control, and exit with 1 if one of them did not hold.

    \b
    Examples:
      python -m tests.chaos --short
      python -m tests.chaos --only kill-9 --seed 7
    """
    outcomes: dict[str, Outcome] = {}
    for name in only or EXPERIMENTS:
        click.echo(f"{name}: {EXPERIMENTS[name].promise}", err=True)
        began = time.monotonic()
        with open_lab(name, seed) as lab:
            outcome = EXPERIMENTS[name].run(lab, Scale.SHORT if short else Scale.FULL)
        outcomes[name] = outcome
        verdict = "held" if outcome.held else "DID NOT HOLD"
        control = "failed, as it has to" if outcome.control_failed else "PROVED NOTHING"
        click.echo(f"  {verdict}: {in_words(outcome.figures)}", err=True)
        click.echo(f"  control {control}: {in_words(outcome.control)}", err=True)
        click.echo(f"  {time.monotonic() - began:.0f} s", err=True)
    if as_json:
        click.echo(json.dumps({name: vars(outcome) for name, outcome in outcomes.items()}, indent=2))
    else:
        click.echo(table(outcomes))
    sys.exit(0 if all(outcome.held and outcome.control_failed for outcome in outcomes.values()) else 1)


def in_words(figures: Mapping[str, object]) -> str:
    """Figures as one line."""
    return ", ".join(
        f"{value:.1f} {name}" if isinstance(value, float) else f"{value} {name}" for name, value in figures.items()
    )


def table(outcomes: Mapping[str, Outcome]) -> str:
    """The Markdown table of docs/reliability.md."""
    lines = ["| promise | as shipped | control | |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        held = "held" if outcome.held and outcome.control_failed else "**not held**"
        experiment = EXPERIMENTS[name]
        control = f"{experiment.off}: {in_words(outcome.control)}"
        lines.append(f"| {experiment.promise} | {in_words(outcome.figures)} | {control} | {held} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
