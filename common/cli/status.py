"""`maskwatch status`: jobs by state, queues, and what is still to do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click

from common import __version__, ledger
from common.catalog import schedule
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.deployment import deployment
from common.database import versions
from common.database.sessions import schema_revision, session_scope
from common.domain import JobState, MaskwatchError
from common.ledger import circuit_breaker as pauses
from common.ledger import failing_steps
from common.messaging.queues import BrokerDownError, Queue, queue_length, redis_client


@click.command()
@click.option("--watch", is_flag=True, help="Repeat every two seconds, until Ctrl-C.")
@json_option
def status(watch: bool, as_json: bool) -> None:
    """Show jobs by state, messages in the queues, what waits to be summarized, and paused sources.

    \b
    Examples:
      maskwatch status --watch
      maskwatch status --json
    """
    if watch and as_json:
        raise click.UsageError("--watch and --json exclude each other: give one of them")
    while watch:
        click.clear()
        try:
            _show_status(as_json)
        except MaskwatchError as error:  # a service that is down may come back
            note(f"error: {error}")
        time.sleep(2)
    _show_status(as_json)


def _show_status(as_json: bool) -> None:
    with deployment():
        with session_scope() as session:
            schema = {"revision": schema_revision(session), "oldest_versions": versions.oldest_versions(session)}
            states = ledger.counts_by_state(session)
            dirty = ledger.unsummarized(session)
            paused = pauses.list_paused(session)
            failing = failing_steps.list_all(session)
            cameras = schedule.count_problems(session)
        problem = None
        queues: dict[str, int] = {}
        try:
            with redis_client() as client:
                queues = {queue.value: queue_length(client, queue) for queue in Queue}
        except BrokerDownError as error:
            problem = str(error)
    if as_json:
        print_json(
            {
                "jobs": {state.value: count for state, count in states.items()},
                "queues": queues,
                "unsummarized": dirty,
                "paused_sources": [asdict(source) for source in paused],
                "failing_steps": [asdict(step) for step in failing],
                "camera_problems": cameras,
                "problem": problem,
                "version": __version__,
                "schema": schema,
            }
        )
    else:
        _print_status(states, queues, dirty, paused)
        _print_problems(failing, cameras)
    if problem:
        raise MaskwatchError(problem)


def _print_problems(failing: Sequence[failing_steps.FailingStep], cameras: int) -> None:
    for step in failing:
        note(f"{step.tick}: the step {step.step} has failed since {step.since:%Y-%m-%d %H:%M} UTC: {step.detail}")
    if failing:
        note("  the producer's log has more; a step is forgotten once it succeeds")
    if cameras:
        note(f"{cameras} camera(s) could not be polled: maskwatch cameras list says why")


def _print_status(
    states: Mapping[JobState, int], queues: Mapping[str, int], dirty: int, paused: Sequence[pauses.PausedSource]
) -> None:
    print_table("Jobs", ["state", "jobs"], [(state.value, count) for state, count in states.items() if count])
    print_table("Queues", ["queue", "messages"], list(queues.items()))
    note(f"{dirty} mark(s) wait for the aggregator")
    for source in paused:
        note(f"{source.bucket} has been paused since {source.paused_at:%Y-%m-%d %H:%M} UTC: {source.detail}")
        note(
            f"  next trial at {source.next_trial_at:%H:%M:%S} UTC; to end the pause: "
            f"maskwatch sources resume {source.bucket}"
        )
