"""The reads of the ledger for `maskwatch jobs list` and `jobs show`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from common import ledger
from common.database.tables import Job, JobAttempt, MediaObject, OperatorAction, OperatorActionJob
from common.domain import JobState


def list_jobs(session: Session, state: JobState | None, limit: int) -> list[dict[str, Any]]:
    """The newest jobs, of all states or of one."""
    query = (
        select(Job, MediaObject.bucket, MediaObject.key)
        .join(MediaObject, MediaObject.id == Job.media_object_id)
        .order_by(Job.id.desc())
        .limit(limit)
    )
    if state is not None:
        query = query.where(Job.state == state)
    return [
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


def show_job(session: Session, job_id: int) -> dict[str, Any]:
    """All about one job: its object, its state, its attempts and what operators did to it. Raises `MaskwatchError` if
    there is no job of this id."""
    job = ledger.get_job(session, job_id)
    media = session.get_one(MediaObject, job.media_object_id)
    return {
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
        "attempts": _attempts(session, job_id),
        "actions": _actions(session, job_id),
    }


def _attempts(session: Session, job_id: int) -> list[dict[str, Any]]:
    return [
        {
            "attempt": attempt.attempt,
            "outcome": attempt.outcome.value,
            "worker": attempt.worker,
            "started_at": attempt.started_at,
            "ended_at": attempt.ended_at,
            "reason": attempt.reason,
            "detail": attempt.detail,
        }
        for attempt in session.scalars(select(JobAttempt).where(JobAttempt.job_id == job_id).order_by(JobAttempt.id))
    ]


def _actions(session: Session, job_id: int) -> list[dict[str, Any]]:
    query = (
        select(OperatorAction)
        .join(OperatorActionJob, OperatorActionJob.action_id == OperatorAction.id)
        .where(OperatorActionJob.job_id == job_id)
        .order_by(OperatorAction.id)
    )
    return [
        {"action": action.action, "by": action.by, "database_user": action.database_user, "at": action.at}
        for action in session.scalars(query)
    ]


def _range(job: Job) -> str | None:
    """The part of its video that a chunk covers, in the file's own time; None for other jobs."""
    if not job.range_end_ms:
        return None
    return "–".join(str(timedelta(milliseconds=ms)) for ms in (job.range_start_ms, job.range_end_ms))
