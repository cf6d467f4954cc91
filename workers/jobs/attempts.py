"""Claims jobs, and ends each attempt in the ledger, whether it succeeded or not.

The work itself is left to `workers.jobs.images` and `workers.jobs.videos`. An error in one job is recorded in the
ledger, and the other jobs go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from common import ledger
from common.database import versions
from common.database.errors import DatabaseDownError, is_lost
from common.database.sessions import session_scope, transact
from common.database.tables import Camera, Location, Pipeline
from common.domain import (
    REFUSALS,
    ArchivedError,
    AttemptOutcome,
    JobKind,
    JobRef,
    JobState,
    MaskwatchError,
    MediaKind,
    PermanentJobError,
    Reason,
    SourceChangedError,
    TransientJobError,
    UnknownSpecError,
    first_line,
)
from common.ledger import ClaimedJob, Registered, StaleJobError
from common.observability import metrics
from common.observability.logs import get_logger, working_on
from common.planning import PlannedObject
from common.settings import Settings
from common.storage.opening import open_bucket
from workers.inference.faults import OutOfModelMemoryError

log = get_logger(__name__)


def claim(refs: Sequence[JobRef], worker: str, settings: Settings) -> list[ClaimedJob]:
    """Claim the jobs of a message. Jobs whose token has changed since they were sent are dropped: another message or
    process has them."""
    with session_scope(one_statement=True) as session:
        jobs = ledger.claim(session, refs, worker=worker, lease_seconds=settings.ledger.lease_seconds)
    if len(jobs) < len(refs):
        log.info("dropped jobs of an outdated message", dropped=len(refs) - len(jobs))
    for job in jobs:
        metrics.observe(metrics.QUEUE_SECONDS, job.queued_seconds, lane=metrics.LANES[job.lane])
    return jobs


@lru_cache(maxsize=1)
def check_version() -> None:
    """Raise `OutdatedProgramError` if the database no longer accepts a worker of this version. Checked once per
    process, because the worker checked it at its start, and its children are replaced from time to time."""
    with session_scope() as session:
        versions.check_part(session, versions.Part.WORKER)


def require_version(jobs: Sequence[ClaimedJob]) -> None:
    """Raise `UnfitWorkerError`, with the jobs given back, if this version may not do any jobs."""
    try:
        check_version()
    except versions.OutdatedProgramError as error:
        release(jobs)
        raise UnfitWorkerError(str(error)) from error


def give_back_unknown(jobs: Sequence[ClaimedJob], settings: Settings) -> list[ClaimedJob]:
    """Give back the jobs whose pipeline only a newer version knows; returns the others.

    They wait for a while before they are sent again, because the next worker may be of this version, too.
    """
    known = []
    for job in jobs:
        try:
            job.spec  # noqa: B018 - reads it, or raises
        except UnknownSpecError as error:
            detail = f"pipeline {job.pipeline_id}: {error}"
            _tell_once(detail)
            _give_back(job, detail, settings)
        else:
            known.append(job)
    return known


@lru_cache(maxsize=256)
def _tell_once(detail: str) -> None:
    log.warning("jobs of an unknown pipeline are given back", detail=detail)


def _give_back(job: ClaimedJob, detail: str, settings: Settings) -> None:
    with _released(job), session_scope() as session:
        ledger.give_back(session, job, detail, check_seconds=settings.ledger.retry_cap_seconds)


def release(jobs: Iterable[ClaimedJob]) -> None:
    """Give back jobs that were not done; the attempt does not count."""
    for job in jobs:
        with _released(job), session_scope() as session:
            ledger.release(session, job)


@contextmanager
def _released(job: ClaimedJob) -> Iterator[None]:
    """Count a job that is given back, unless this process has lost it."""
    try:
        yield
    except StaleJobError:
        log.info("lost before release", job=job.ref.id)
        metrics.count(metrics.LEASE_LOSSES, cause="refused")
    else:
        _ended(job, AttemptOutcome.RELEASED)


def settle(job: ClaimedJob, work: Callable[[], None], settings: Settings, *, ends: bool = True) -> bool:
    """Run a job's work, and end the attempt if it fails; returns whether it succeeded. `ends`: the work itself ends the
    job in the ledger. If it doesn't, call `record` afterwards.
    """
    with metrics.timed(metrics.ATTEMPT_SECONDS, kind=job.kind.value):
        done = record(job, work, settings)
    if done and ends:
        succeeded(job)
    return done


def record(job: ClaimedJob, write: Callable[[], None], settings: Settings) -> bool:
    """Write what a job's work has found, and end the attempt if that fails; returns whether it succeeded."""
    with working_on(job.ref.id, job.attempt):
        return _settle(job, write, settings)


def succeeded(job: ClaimedJob) -> None:
    """Count a job that has succeeded."""
    _ended(job, AttemptOutcome.SUCCEEDED)


def _ended(job: ClaimedJob, outcome: AttemptOutcome) -> None:
    metrics.count(metrics.ATTEMPTS, kind=job.kind.value, outcome=outcome.value)


def _settle(job: ClaimedJob, work: Callable[[], None], settings: Settings) -> bool:
    try:
        try:
            work()
            return True
        except DrainedError:
            release([job])
            log.info("given back", job=job.ref.id, uri=job.uri)
        except ArchivedError as error:
            _await_restore(job, str(error), settings)
        except (PermanentJobError, TransientJobError) as error:
            _fail(job, error, settings)
        except SourceChangedError as error:
            _plan_new_version(job, str(error), settings)
        except OutOfModelMemoryError as error:
            # Tried again, but not for ever: another process may free the memory.
            _fail(job, TransientJobError(Reason.MODEL_OUT_OF_MEMORY, str(error)), settings)
        except StaleJobError:
            raise
        except DatabaseDownError:
            _release_if_possible(job)
            raise
        except Exception as error:
            if (lost := _lost(error)) is not None:
                _release_if_possible(job)
                raise DatabaseDownError(f"the database stored no rows ({first_line(lost)})") from error
            # A bug of Maskwatch or of a library: tried again, then quarantined for a person to look at.
            log.exception("unexpected error", job=job.ref.id, uri=job.uri)
            _fail(job, TransientJobError(Reason.UNEXPECTED_ERROR, f"{type(error).__name__}: {error}"), settings)
    except StaleJobError as error:
        log.warning("stale commit refused", job=job.ref.id, uri=job.uri, detail=str(error))
        metrics.count(metrics.LEASE_LOSSES, cause="refused")
    return False


def _lost(error: Exception) -> DBAPIError | None:
    """The error as SQLAlchemy's, if it means that the database is down or has no room; else None."""
    if isinstance(error, psycopg.OperationalError):
        # COPY doesn't go through SQLAlchemy, so its errors are psycopg's own.
        error = DBAPIError("COPY", None, error)
    return error if isinstance(error, DBAPIError) and is_lost(error) else None


def _release_if_possible(job: ClaimedJob) -> None:
    """Give back a job whose results the database did not store: with a full disk it may still update the ledger.

    If the database is down, the lease runs out, and the reconciler recovers the job.
    """
    try:
        release([job])
    except (MaskwatchError, DBAPIError):
        log.warning("not given back; its lease will run out", job=job.ref.id, uri=job.uri)


def _fail(job: ClaimedJob, error: PermanentJobError | TransientJobError, settings: Settings) -> None:
    """End an attempt that failed: retry the job, or quarantine it; a refusal also counts against its source."""
    limits = settings.ledger
    detail = f"{job.uri}: {error.detail}"
    with session_scope() as session:
        if error.reason in REFUSALS:
            state = ledger.refuse(
                session,
                job,
                error.reason,
                detail,
                policy=limits.pause_policy,
                max_attempts=limits.max_attempts,
                base=limits.retry_base_seconds,
                cap=limits.retry_cap_seconds,
            )
        elif isinstance(error, TransientJobError):
            state = ledger.retry_later(
                session,
                job,
                error.reason,
                detail,
                max_attempts=limits.max_attempts,
                base=limits.retry_base_seconds,
                cap=limits.retry_cap_seconds,
            )
        else:
            ledger.quarantine(session, job, error.reason, detail)
            state = JobState.QUARANTINED
    _failed(job, error.reason, state)
    log.warning(
        "failed", job=job.ref.id, uri=job.uri, reason=error.reason.value, detail=error.detail, state=state.value
    )


def _failed(job: ClaimedJob, reason: Reason, state: JobState) -> None:
    metrics.failed(reason, state)
    _ended(job, AttemptOutcome.QUARANTINED if state is JobState.QUARANTINED else AttemptOutcome.RETRIED)


def _await_restore(job: ClaimedJob, detail: str, settings: Settings) -> None:
    """The object is archived: wait for it if its restore was requested."""
    with session_scope() as session:
        state = ledger.await_restore(
            session,
            job,
            detail,
            check_seconds=settings.storage.restore_check_seconds,
            wait_seconds=settings.storage.restore_wait_seconds,
        )
    _failed(job, Reason.ARCHIVED, state)
    log.info("archived", job=job.ref.id, uri=job.uri, state=state.value)


def _plan_new_version(job: ClaimedJob, detail: str, settings: Settings) -> None:
    """The object was replaced after planning: end this job, and register the version that lies there now."""
    try:
        found = open_bucket(job.bucket).stat(job.key)
    except (PermanentJobError, TransientJobError) as error:
        _fail(job, error, settings)
        return
    if found.etag == job.etag:
        _fail(job, TransientJobError(Reason.STORAGE_UNAVAILABLE, f"{detail}, and then had it again"), settings)
        return
    kind = MediaKind.IMAGE if job.kind is JobKind.IMAGE else MediaKind.VIDEO

    def plan(session: Session) -> Registered:
        location = session.get_one(Location, job.location_id)
        camera = session.get_one(Camera, job.camera_id) if job.camera_id is not None else None
        pipeline = session.get_one(Pipeline, job.pipeline_id)
        ledger.source_changed(session, job, f"{job.uri}: {detail}")
        return ledger.register(
            session,
            [PlannedObject(found, kind, job.key_time)],
            location=location,
            camera=camera,
            pipeline=pipeline,
            lane=job.lane,
            backfill_id=job.backfill_id,
            newest=True,
        )

    registered = transact(plan)
    _ended(job, AttemptOutcome.SOURCE_CHANGED)
    log.info("source changed", job=job.ref.id, uri=job.uri, planned=registered.new)


class UnfitWorkerError(Exception):
    """This worker can't do its jobs (their models, or its version), but others may. It must stop, and not fail the jobs
    one by one."""


class UnknownPipelineError(Exception):
    """Only a newer version knows the pipelines of the jobs of this message; all jobs were given back."""


class DrainedError(Exception):
    """The worker is asked to stop, so the job is given back."""
