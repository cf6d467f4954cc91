"""The operator's commands that need neither producer nor worker: the schema, locations, cameras, pipelines,
jobs and status. Each opens the transaction and leaves the work to the modules that know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from common.cli.console import json_option, note, percent, print_json, print_table
from common.domain import JobState, MaskwatchError

if TYPE_CHECKING:
    from common.tables import Camera, Job

#: What the ledger's ids can be.
JOB_ID = click.IntRange(1, 2**63 - 1)


@click.group()
def db() -> None:
    """Migrate the database that MASKWATCH_DATABASE__URL names. (The embedded one migrates itself.)"""


@db.command()
def upgrade() -> None:
    """Bring the schema up to date; make the partitions of this month and the next.

    \b
    Example:
      maskwatch db upgrade
    """
    from datetime import UTC, datetime, timedelta

    import migrations
    from common import roles
    from common.database import engine, explained, session_scope
    from common.partitions import ensure_partitions

    with explained():
        migrations.upgrade(engine())
        now = datetime.now(UTC)
        made = ensure_partitions(engine(), [now, now + timedelta(days=31)])
    with session_scope() as session:
        granted = not roles.missing(session)
        if granted:  # also for what this version has added
            roles.grant(session)
    note(
        f"the database is up to date{'; new partitions: ' + ', '.join(made) if made else ''}"
        f"{'; rights granted' if granted else ''}"
    )


@db.command("grant")
@click.option("--print", "only_print", is_flag=True, help="Print the SQL instead of running it.")
def grant_rights(only_print: bool) -> None:
    """Give the producer, the workers, the aggregator and analysts a role each, with the rights it needs and no more.

    Run it as the login that ran `db upgrade`. Then make logins that are members:

    \b
    Examples:
      maskwatch db grant
      psql -c "CREATE ROLE worker_1 LOGIN PASSWORD '...' IN ROLE maskwatch_worker"
    """
    from common import roles
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        if only_print:
            click.echo("".join(f"CREATE ROLE {role} NOLOGIN;\n" for role in roles.missing(session)), nl=False)
            click.echo(";\n".join(roles.statements("public")) + ";")
            return
        made = roles.grant(session)
    note(f"rights are granted to {', '.join(roles.RIGHTS)}{' (new: ' + ', '.join(made) + ')' if made else ''}")


@click.group()
def locations() -> None:
    """Places that compliance is reported for."""


@locations.command("add")
@click.argument("name")
@click.option("--time-zone", required=True, metavar="ZONE", help="IANA name, e.g. Europe/Berlin.")
def add_location(name: str, time_zone: str) -> None:
    """Register a location; its time zone decides what an hour and a day are.

    \b
    Example:
      maskwatch locations add lobby --time-zone Europe/Berlin
    """
    from common import catalog
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        catalog.add_location(session, name, time_zone)
    note(f"location {name} is registered in the time zone {time_zone}")


DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would move; nothing is changed.")


@locations.command("correct")
@click.argument("name")
@click.option("--time-zone", required=True, metavar="ZONE", help="The zone that its clocks have shown all along.")
@DRY_RUN
@json_option
def correct_location(name: str, time_zone: str, dry_run: bool, as_json: bool) -> None:
    """Put a location's time zone right, after the fact: times that were read from keys and pictures move, with faces
    and summaries, in one recorded step. Chunks of videos whose hours would be torn are analysed again.

    Nothing can be registered meanwhile. On a deployment with roles, the owner of the tables does this.

    \b
    Example:
      maskwatch locations correct lobby --time-zone Europe/Berlin --dry-run
    """
    _correct(name, None, None, time_zone, None, dry_run=dry_run, as_json=as_json)


def _correct(
    location: str,
    camera: str | None,
    to_location: str | None,
    time_zone: str | None,
    time_pattern: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from common import audit, catalog, corrections
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        by = audit.operator()
        place = catalog.get_location(session, location)
        hangs_there = catalog.get_camera(session, place, camera) if camera is not None else None
        if time_zone is not None:
            done = corrections.correct_zone(session, place, time_zone, by=by)
        else:
            assert hangs_there is not None
            to = catalog.get_location(session, to_location) if to_location is not None else None
            done = corrections.correct_camera(session, hangs_there, to=to, time_pattern=time_pattern, by=by)
        if dry_run:
            session.rollback()
    if as_json:
        print_json({**done.as_dict(), "dry_run": dry_run})
        return
    note(f"{done.objects} objects: {done.moved} {'would move' if dry_run else 'moved'}")
    for count, what in (
        (done.placed, "had no time, and have one now"),
        (done.unplaced, "have no time by this, and are quarantined"),
        (done.frozen, "count in purged hours, which stay as they are"),
    ):
        if count:
            note(f"  {count} {what}")
    if done.jobs_again:
        note(f"  {done.jobs_again} jobs are to be done again, because their counts can't be moved")
    if not done.shown:
        note(
            f"  {to_location} shows the figures of another pipeline; to show this one's: "
            f"maskwatch pipelines promote --location {to_location}"
        )
    note("nothing was changed" if dry_run else "the summaries follow as the aggregator comes to them")


@locations.command("list")
@json_option
def list_locations(as_json: bool) -> None:
    """List the locations.

    \b
    Example:
      maskwatch locations list
    """
    from sqlalchemy import select

    from common.database import session_scope
    from common.deployment import deployment
    from common.tables import Location

    with deployment(), session_scope() as session:
        rows = [
            {"name": row.name, "time_zone": row.time_zone, "pipeline": row.promoted_pipeline_id}
            for row in session.scalars(select(Location).order_by(Location.name))
        ]
    if as_json:
        print_json(rows)
    else:
        print_table("Locations", ["location", "time zone", "pipeline"], [list(row.values()) for row in rows])


@click.group()
def cameras() -> None:
    """Cameras of the locations, and when their footage is looked for."""


def _camera_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `cameras add` and `cameras change` can say of a camera."""
    for option in reversed(
        [
            click.option(
                "--source", metavar="SOURCE", help="Where its footage arrives: s3://bucket/prefix/, or a folder."
            ),
            click.option("--time-pattern", metavar="PATTERN", help="As of `maskwatch backfill`."),
            click.option("--every", metavar="TIME", help="Look for new footage so often: 30s, 5m, 2h, 1d."),
            click.option("--cron", metavar="EXPRESSION", help="Look when it says, on the location's clock."),
            click.option("--look-back", metavar="TIME", help="How late footage may come and be found at once (2h)."),
            click.option("--sweep", metavar="TIME", help="List everything so often, for what came later still (1d)."),
            click.option("--picture-every", metavar="TIME", help="Its pictures stand for so long each, in coverage."),
            click.option("--expects", metavar="TIME", help="Footage that it should deliver per hour, e.g. 1h or 20m."),
        ]
    ):
        command = option(command)
    return command


@cameras.command("add")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@_camera_options
def add_camera(name: str, location: str, **options: str | None) -> None:
    """Register a camera of a location. With a source and --every or --cron a producer looks for its footage.

    Where the keys sort by time (--time-pattern), only what can be new is listed, and everything once per --sweep.

    \b
    Examples:
      maskwatch cameras add door --location lobby
      maskwatch cameras add gate --location lobby --source s3://footage/gate/ --every 5m \\
          --time-pattern 'gate/%Y/%m/%d/%H-%M-%S.mp4' --expects 1h
    """
    from common import catalog
    from common.database import session_scope
    from common.deployment import deployment

    with deployment() as settings, session_scope() as session:
        camera = catalog.add_camera(session, catalog.get_location(session, location), name)
        if any(value is not None for value in options.values()):
            catalog.configure_camera(session, camera, settings, options)
    note(f"camera {name} of {location} is registered{_looked_at(camera)}")


def _looked_at(camera: Camera) -> str:
    if camera.source is None or camera.scheduled_since is None:
        return ""
    how = f"every {camera.every_seconds:g} s" if camera.every_seconds else f"at {camera.cron!r}"
    return f"; {camera.source} is looked at {how}"


@cameras.command("change")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
@_camera_options
def change_camera(name: str, location: str, **options: str | None) -> None:
    """Change where and when a camera's footage is looked for, or what it should deliver. What was found stays.

    \b
    Example:
      maskwatch cameras change gate --location lobby --every 1m
    """
    from common import audit, catalog
    from common.database import session_scope
    from common.deployment import deployment

    if all(value is None for value in options.values()):
        raise MaskwatchError("say what to change: maskwatch cameras change --help")
    with deployment() as settings, session_scope() as session:
        camera = catalog.get_camera(session, catalog.get_location(session, location), name)
        catalog.configure_camera(session, camera, settings, options)
        changed = ", ".join(sorted(name for name, value in options.items() if value is not None))
        audit.record(session, "change camera", audit.operator(), detail=f"{location}/{name}: {changed}")
    note(f"camera {name} of {location} is changed{_looked_at(camera)}")


@cameras.command("correct")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera was said to hang.")
@click.option("--to-location", metavar="NAME", help="Where it has hung all along.")
@click.option("--time-zone", metavar="ZONE", help="The zone of its location, with all that was seen there.")
@click.option("--time-pattern", metavar="PATTERN", help="How its keys are to be read.")
@DRY_RUN
@json_option
def correct_camera(
    name: str,
    location: str,
    to_location: str | None,
    time_zone: str | None,
    time_pattern: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put right what was said wrongly of a camera, after the fact: what it has seen moves to the other place or times,
    with faces and summaries, in one recorded step. (For a new place or pattern from now on, add another camera.)

    A time zone is its location's: all of its cameras move. Chunks of videos whose hours would be torn are analysed
    again. Nothing can be registered meanwhile. On a deployment with roles, the owner of the tables does this.

    \b
    Examples:
      maskwatch cameras correct gate --location lobby --to-location yard
      maskwatch cameras correct gate --location lobby --time-zone Europe/Berlin --dry-run
      maskwatch cameras correct gate --location lobby --time-pattern 'gate/%Y-%d-%m/%H%M%S.jpg'
    """
    if time_zone is not None and (to_location is not None or time_pattern is not None):
        raise click.UsageError("correct the time zone by itself: it is the location's, and not only this camera's")
    if to_location is None and time_zone is None and time_pattern is None:
        raise click.UsageError("say what was wrong: --to-location, --time-zone or --time-pattern")
    _correct(location, name, to_location, time_zone, time_pattern, dry_run=dry_run, as_json=as_json)


def _switch_camera(name: str, location: str, action: str) -> None:
    from common import audit, catalog
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        camera = catalog.get_camera(session, catalog.get_location(session, location), name)
        catalog.switch_camera(session, camera, action)
        audit.record(session, f"{action} camera", audit.operator(), detail=f"{location}/{name}")


@cameras.command("disable")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
def disable_camera(name: str, location: str) -> None:
    """Look for no more footage of a camera, for now. What was found stays, and is analysed.

    \b
    Example:
      maskwatch cameras disable gate --location lobby
    """
    _switch_camera(name, location, "disable")
    note(f"camera {name} of {location} is disabled; again: maskwatch cameras enable {name} --location {location}")


@cameras.command("enable")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hangs.")
def enable_camera(name: str, location: str) -> None:
    """Look for footage of a camera again; what came meanwhile is found.

    \b
    Example:
      maskwatch cameras enable gate --location lobby
    """
    _switch_camera(name, location, "enable")
    note(f"camera {name} of {location} is enabled")


@cameras.command("remove")
@click.argument("name")
@click.option("--location", required=True, help="Where the camera hung.")
def remove_camera(name: str, location: str) -> None:
    """Retire a camera: no more is looked for or expected of it. Its footage, faces and figures stay.

    \b
    Example:
      maskwatch cameras remove gate --location lobby
    """
    _switch_camera(name, location, "remove")
    note(f"camera {name} of {location} is removed; what it has seen stays")


@cameras.command("list")
@json_option
def list_cameras(as_json: bool) -> None:
    """List the cameras: where they hang, when they are looked at, when they were last, and what went wrong.

    \b
    Example:
      maskwatch cameras list
    """
    from common import catalog
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        rows = catalog.list_cameras(session)
    if as_json:
        print_json(rows)
        return
    columns = ["name", "location", "state", "source", "schedule", "last_look", "problem"]
    print_table("Cameras", ["camera", *columns[1:]], [[row[column] for column in columns] for row in rows])


@click.group()
def pipelines() -> None:
    """Pinned models and settings, and which of them a location shows."""


@pipelines.command("list")
@json_option
def list_pipelines(as_json: bool) -> None:
    """List the pipelines, the locations that show them, and how often their classifiers are right.

    That is the share of held-out faces with and without mask that are called so, uncertain ones left out; the
    counts behind it are in --json, as classifier_confusion.

    \b
    Example:
      maskwatch pipelines list
    """
    from sqlalchemy import select

    from common.database import session_scope
    from common.deployment import deployment
    from common.domain import PipelineSpec
    from common.model_figures import confusion_of
    from common.tables import Location, Pipeline

    with deployment(), session_scope() as session:
        shown: dict[int | None, list[str]] = {}
        for location in session.scalars(select(Location).order_by(Location.name)):
            shown.setdefault(location.promoted_pipeline_id, []).append(location.name)
        rows: list[dict[str, Any]] = [
            {"id": row.id, "created_at": row.created_at, "shown_by": shown.get(row.id, []), "spec": row.spec}
            for row in session.scalars(select(Pipeline).order_by(Pipeline.id))
        ]
    kept = [confusion_of(PipelineSpec.from_dict(row["spec"])) for row in rows]
    if as_json:
        confusions = [None if confusion is None else asdict(confusion) for confusion in kept]
        print_json([{**row, "classifier_confusion": known} for row, known in zip(rows, confusions, strict=True)])
        return
    table = [
        [
            row["id"],
            f"{row['created_at']:%Y-%m-%d %H:%M}",
            row["spec"]["detector"]["name"],
            row["spec"]["classifier"]["name"],
            known and f"{percent(known.right_with_mask)} / {percent(known.right_without_mask)}",
            ", ".join(row["shown_by"]),
        ]
        for row, known in zip(rows, kept, strict=True)
    ]
    columns = ["id", "created", "detector", "classifier", "held out: right with / without mask", "shown by"]
    print_table("Pipelines", columns, table)


@pipelines.command("promote")
@click.option("--location", required=True, help="The location whose views change.")
@click.option(
    "--pipeline",
    "pipeline_id",
    type=click.IntRange(1, 2**31 - 1),
    help="Its id (default: the one the settings describe).",
)
def promote_pipeline(location: str, pipeline_id: int | None) -> None:
    """Let a location's views show another pipeline; prints how many hours each of the two covers.

    \b
    Example:
      maskwatch pipelines promote --location lobby --pipeline 2
    """
    from sqlalchemy import func, select

    from common import catalog
    from common.database import session_scope
    from common.deployment import deployment
    from common.tables import ComplianceHour, Pipeline

    with deployment() as settings, session_scope() as session:
        place = catalog.get_location(session, location)
        chosen = (
            session.get(Pipeline, pipeline_id)
            if pipeline_id is not None
            else catalog.ensure_pipeline(session, settings.pipeline.spec())
        )
        if chosen is None:
            raise MaskwatchError(f"there is no pipeline {pipeline_id}; list them: maskwatch pipelines list")
        covered = dict(
            session.execute(
                select(ComplianceHour.pipeline_id, func.count())
                .where(ComplianceHour.location_id == place.id)
                .group_by(ComplianceHour.pipeline_id)
            )
            .tuples()
            .all()
        )
        before = place.promoted_pipeline_id
        catalog.promote(session, place, chosen)
        if before is not None:
            note(f"pipeline {before} covered {covered.get(before, 0)} hour(s) of {location}")
        note(f"{location} now shows pipeline {chosen.id}, which covers {covered.get(chosen.id, 0)} hour(s)")


@click.group()
def jobs() -> None:
    """The units of work, and why some of them did not succeed."""


@jobs.command("list")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True)
@json_option
def list_jobs(state: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the latest first.

    \b
    Example:
      maskwatch jobs list --state quarantined
    """
    from sqlalchemy import select

    from common.database import session_scope
    from common.deployment import deployment
    from common.tables import Job, MediaObject

    query = (
        select(Job, MediaObject.bucket, MediaObject.key)
        .join(MediaObject, MediaObject.id == Job.media_object_id)
        .order_by(Job.id.desc())
        .limit(limit)
    )
    if state:
        query = query.where(Job.state == JobState(state))
    with deployment(), session_scope() as session:
        rows = [
            {
                "id": job.id,
                "kind": job.kind.value,
                "range": _range(job),
                "state": job.state.value,
                "attempt": job.attempt,
                "uri": f"{bucket}/{key}",
                "reason": job.reason,
                "detail": job.detail,
            }
            for job, bucket, key in session.execute(query).tuples()
        ]
    if as_json:
        print_json(rows)
    else:
        columns = ["id", "kind", "range", "state", "attempt", "uri", "reason"]
        print_table("Jobs", columns, [[row[column] for column in columns] for row in rows])


def _range(job: Job) -> str | None:
    """The part of a video that a chunk is about, in its own time; None for other jobs."""
    if not job.range_end_ms:
        return None
    return "–".join(str(timedelta(milliseconds=ms)) for ms in (job.range_start_ms, job.range_end_ms))


@jobs.command("show")
@click.argument("job_id", type=JOB_ID)
@json_option
def show_job(job_id: int, as_json: bool) -> None:
    """Show one job: its object, its state, and every attempt.

    \b
    Example:
      maskwatch jobs show 17
    """
    from sqlalchemy import select

    from common import ledger
    from common.database import session_scope
    from common.deployment import deployment
    from common.tables import JobAttempt, MediaObject, OperatorAction, OperatorActionJob

    with deployment(), session_scope() as session:
        job = ledger.get_job(session, job_id)
        media = session.get_one(MediaObject, job.media_object_id)
        attempts = session.scalars(select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.id))
        actions = session.scalars(
            select(OperatorAction)
            .join(OperatorActionJob, OperatorActionJob.action_id == OperatorAction.id)
            .where(OperatorActionJob.job_id == job_id)
            .order_by(OperatorAction.id)
        )
        shown: dict[str, Any] = {
            "id": job.id,
            "kind": job.kind.value,
            "range": _range(job),
            "state": job.state.value,
            "uri": f"{media.bucket}/{media.key}",
            "etag": media.etag,
            "size_bytes": media.size_bytes,
            "observed_at": media.observed_at,
            "observed_at_source": media.observed_at_source and media.observed_at_source.value,
            "container": media.container,
            "codec": media.codec,
            "duration_seconds": media.duration_seconds,
            "pipeline": job.pipeline_id,
            "attempt": job.attempt,
            "failures": job.failures,
            "crashes": job.crashes,
            "lost_leases": job.lost_leases,
            "next_run_at": job.next_run_at,
            "lease_until": job.lease_until,
            "reason": job.reason,
            "detail": job.detail,
            "attempts": [
                {
                    "attempt": attempt.attempt,
                    "outcome": attempt.outcome.value,
                    "worker": attempt.worker,
                    "started_at": attempt.started_at,
                    "ended_at": attempt.ended_at,
                    "reason": attempt.reason,
                    "detail": attempt.detail,
                }
                for attempt in attempts
            ],
            "actions": [
                {"action": action.action, "by": action.by, "database_user": action.database_user, "at": action.at}
                for action in actions
            ],
        }
    if as_json:
        print_json(shown)
        return
    print_table(
        f"Job {job_id}", ["", ""], [(k, v) for k, v in shown.items() if not isinstance(v, list) and v is not None]
    )
    columns = ["attempt", "outcome", "worker", "started_at", "ended_at", "reason"]
    print_table("Attempts", columns, [[row[column] for column in columns] for row in shown["attempts"]])
    if shown["actions"]:
        columns = ["action", "by", "at"]
        print_table("Actions", columns, [[row[column] for column in columns] for row in shown["actions"]])


@jobs.command("retry")
@click.argument("job_ids", type=JOB_ID, nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every job in quarantine.")
@json_option
def retry_jobs(job_ids: tuple[int, ...], everything: bool, as_json: bool) -> None:
    """Give jobs in quarantine another chance, once what was wrong has been put right; by number also cancelled ones.

    \b
    Examples:
      maskwatch jobs retry 17 18
      maskwatch jobs retry --all
    """
    from common import audit, ledger
    from common.database import session_scope
    from common.deployment import deployment

    if bool(job_ids) == everything:
        raise MaskwatchError("name the jobs to retry, or say --all")
    with deployment(), session_scope() as session:
        moved = ledger.retry(session, None if everything else job_ids, by=audit.operator())
    skipped = sorted(set(job_ids) - set(moved))
    if as_json:
        print_json({"retried": moved, "not_in_quarantine": skipped})
    else:
        note(f"{len(moved)} job(s) will be tried again")
    if skipped:
        raise MaskwatchError(
            f"left as they are, because they are not in quarantine, were seen in purged time, or need a time pattern "
            f"that fits (maskwatch backfill --time-pattern): {', '.join(map(str, skipped))}"
        )


@jobs.command("cancel")
@click.argument("job_ids", type=JOB_ID, nargs=-1, required=True)
@json_option
def cancel_jobs(job_ids: tuple[int, ...], as_json: bool) -> None:
    """Cancel jobs that have not ended. A worker that is at one of them can't store its result any more.

    What has been analysed stays. `jobs retry` with its number takes a cancelled job back. A whole backfill:
    `maskwatch backfills cancel`.

    \b
    Example:
      maskwatch jobs cancel 17 18
    """
    from common import audit, ledger
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        moved = ledger.cancel(session, job_ids, by=audit.operator())
    _tell_moved("cancelled", moved, job_ids, "because they have ended or are not there", as_json)


@jobs.command("rerun")
@click.argument("job_ids", type=JOB_ID, nargs=-1, required=True)
@json_option
def rerun_jobs(job_ids: tuple[int, ...], as_json: bool) -> None:
    """Analyse pictures and chunks of video again that succeeded. Their faces are removed, and the summaries follow.

    \b
    Example:
      maskwatch jobs rerun 17
    """
    from common import audit, ledger
    from common.database import session_scope
    from common.deployment import deployment

    with deployment(), session_scope() as session:
        moved = ledger.rerun(session, job_ids, by=audit.operator())
    why = "because they have not succeeded, are probes, or counted in purged time"
    _tell_moved("to be analysed again", moved, job_ids, why, as_json)


def _tell_moved(what: str, moved: list[int], asked: tuple[int, ...], why: str, as_json: bool) -> None:
    """Say which jobs an action changed; an error for those it could not."""
    skipped = sorted(set(asked) - set(moved))
    if as_json:
        print_json({"changed": moved, "left": skipped})
    else:
        note(f"{len(moved)} job(s) {what}")
    if skipped:
        raise MaskwatchError(f"left as they are, {why}: {', '.join(map(str, skipped))}")


@click.group()
def sources() -> None:
    """Buckets and folders that footage comes from, and whether one has paused itself."""


@sources.command("list")
@json_option
def list_sources(as_json: bool) -> None:
    """List the sources. One that refused everything is paused, with the reason, and tried again now and then.

    \b
    Example:
      maskwatch sources list
    """
    from sqlalchemy import select

    from common.database import session_scope
    from common.deployment import deployment
    from common.tables import Source

    with deployment(), session_scope() as session:
        rows = [
            {
                "source": row.bucket,
                "paused_at": row.paused_at,
                "next_trial_at": row.next_trial_at,
                "refusals": row.refusals,
                "reason": row.reason,
                "detail": row.detail,
            }
            for row in session.scalars(select(Source).order_by(Source.bucket))
        ]
    if as_json:
        print_json(rows)
    else:
        columns = ["source", "paused_at", "next_trial_at", "reason", "detail"]
        print_table("Sources", columns, [[row[column] for column in columns] for row in rows])


@sources.command("resume")
@click.argument("source")
def resume_source(source: str) -> None:
    """End the pause of a source at once, when what it refused for has been put right.

    \b
    Example:
      maskwatch sources resume s3://footage
    """
    from common import audit
    from common import sources as pauses
    from common.database import session_scope
    from common.deployment import deployment
    from common.storage import split_uri

    bucket, _ = split_uri(source)
    with deployment(), session_scope() as session:
        pauses.resume(session, bucket)
        audit.record(session, "resume", audit.operator(), detail=bucket)
    note(f"{bucket} is resumed")


@click.command()
@click.option("--watch", is_flag=True, help="Again every two seconds, until Ctrl-C.")
@json_option
def status(watch: bool, as_json: bool) -> None:
    """Show jobs by state, messages in the queues, what waits to be summarized, and sources that have paused.

    \b
    Examples:
      maskwatch status --watch
      maskwatch status --json
    """
    import time

    if watch and as_json:
        raise click.UsageError("--watch is for people; a machine asks again")
    while watch:
        click.clear()
        try:
            _show_status(as_json)
        except MaskwatchError as error:  # it may come back
            note(f"error: {error}")
        time.sleep(2)
    _show_status(as_json)


def _show_status(as_json: bool) -> None:
    from common import ledger
    from common import sources as pauses
    from common.database import session_scope
    from common.deployment import deployment
    from common.queues import BrokerDownError, Queue, queue_length, redis_client

    with deployment():
        with session_scope() as session:
            states = ledger.counts_by_state(session)
            dirty = ledger.unsummarized(session)
            paused = pauses.list_paused(session)
        problem = None
        queues: dict[str, int] = {}
        try:
            with redis_client() as client:
                queues = {queue.value: queue_length(client, queue) for queue in Queue}
        except BrokerDownError as error:
            problem = str(error)
    if as_json:
        by_state = {state.value: count for state, count in states.items()}
        print_json(
            {
                "jobs": by_state,
                "queues": queues,
                "unsummarized": dirty,
                "paused_sources": [asdict(source) for source in paused],
                "problem": problem,
            }
        )
    else:
        print_table("Jobs", ["state", "jobs"], [(state.value, count) for state, count in states.items() if count])
        print_table("Queues", ["queue", "messages"], list(queues.items()))
        note(f"{dirty} mark(s) wait for the aggregator")
        for source in paused:
            note(f"{source.bucket} is paused since {source.paused_at:%Y-%m-%d %H:%M} UTC: {source.detail}")
            note(
                f"  tried again at {source.next_trial_at:%H:%M:%S} UTC, or by: maskwatch sources resume {source.bucket}"
            )
    if problem:
        raise MaskwatchError(problem)
