"""`maskwatch pipelines`: pinned models and settings, and which of them a location shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from sqlalchemy.orm import Session

from common.catalog import places
from common.cli.parts.console import json_option, note, print_json, print_table
from common.cli.parts.sessions import Say, with_session
from common.domain import PipelineSpec, UnknownSpecError
from common.models.figures import Confusion, confusion_of
from common.models.pipeline import pipeline_spec
from common.reporting.tables import percent
from common.settings import get_settings


@click.group()
def pipelines() -> None:
    """Pinned models and settings, and which of them a location shows."""


@pipelines.command("list")
@json_option
@with_session
def list_pipelines(session: Session, as_json: bool) -> Say:
    """List the pipelines, the locations that show them, and how often their classifiers are right.

    Right is the share of held-out faces with and without mask that are labelled so, without the uncertain ones; --json
    holds the counts, as classifier_confusion.

    \b
    Example:
      maskwatch pipelines list
    """
    rows = places.list_pipelines(session)
    kept = [_confusion_of(row["spec"]) for row in rows]
    if as_json:
        confusions = [None if confusion is None else asdict(confusion) for confusion in kept]
        documents = [{**row, "classifier_confusion": known} for row, known in zip(rows, confusions, strict=True)]
        return lambda: print_json(documents)
    columns = ["id", "created", "detector", "classifier", "held out: right with / without mask", "shown by"]
    table = [_pipeline_row(row, known) for row, known in zip(rows, kept, strict=True)]
    return lambda: print_table("Pipelines", columns, table)


def _confusion_of(stored_spec: dict[str, Any]) -> Confusion | None:
    try:
        return confusion_of(PipelineSpec.from_dict(stored_spec))
    except UnknownSpecError:  # a newer version's pipeline: listed all the same
        return None


def _pipeline_row(row: dict[str, Any], known: Confusion | None) -> list[Any]:
    return [
        row["id"],
        f"{row['created_at']:%Y-%m-%d %H:%M}",
        row["spec"]["detector"]["name"],
        row["spec"]["classifier"]["name"],
        known and f"{percent(known.right_with_mask)} / {percent(known.right_without_mask)}",
        ", ".join(row["shown_by"]),
    ]


@pipelines.command("promote")
@click.option("--location", required=True, help="The location whose views change.")
@click.option(
    "--pipeline",
    "pipeline_id",
    type=click.IntRange(1, 2**31 - 1),
    help="The pipeline's id (default: the one that the settings describe).",
)
@with_session
def promote_pipeline(session: Session, location: str, pipeline_id: int | None) -> Say:
    """Make a location's views show another pipeline; prints how many hours the old and the new one cover.

    \b
    Example:
      maskwatch pipelines promote --location lobby --pipeline 2
    """
    place = places.get_location(session, location)
    if pipeline_id is not None:
        chosen = places.get_pipeline(session, pipeline_id)
    else:
        chosen = places.ensure_pipeline(session, pipeline_spec(get_settings()))
    covered = places.hours_by_pipeline(session, place)
    before = place.promoted_pipeline_id
    places.promote(session, place, chosen)

    def say() -> None:
        if before is not None:
            note(f"pipeline {before} covered {covered.get(before, 0)} hour(s) of {location}")
        note(f"{location} now shows pipeline {chosen.id}, which covers {covered.get(chosen.id, 0)} hour(s)")

    return say
