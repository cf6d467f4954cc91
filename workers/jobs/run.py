"""The jobs of one message: claimed together, ended one by one, whatever their kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from common.domain import JobKind, JobRef
from common.settings import Settings
from workers.jobs import attempts, models
from workers.jobs.heartbeat import Heartbeat
from workers.jobs.images import analyze_images
from workers.jobs.videos import run_video_job


def run_jobs(
    refs: Sequence[JobRef], *, worker: str, settings: Settings, draining: Callable[[], bool] = lambda: False
) -> int:
    """Claim these jobs and end each of them; returns how many succeeded.

    Raises, with the jobs given back: `workers.jobs.attempts.UnfitWorkerError` if this version may do no jobs or
    their models can't be loaded, `workers.jobs.attempts.UnknownPipelineError` if only a newer version can do them.
    """
    claimed = attempts.claim(refs, worker, settings)
    attempts.require_version(claimed)
    jobs = attempts.give_back_unknown(claimed, settings)
    if claimed and not jobs:
        raise attempts.UnknownPipelineError
    images = [job for job in jobs if job.kind is JobKind.IMAGE]
    succeeded = 0
    with Heartbeat(jobs, settings) as heartbeat:
        models.load_models(jobs, settings)
        deadline = time.monotonic() + settings.worker.soft_time_limit_seconds
        if images:
            succeeded += analyze_images(images, heartbeat, settings, draining=draining, deadline=deadline)
        for job in jobs:
            if job.kind is not JobKind.IMAGE:
                succeeded += run_video_job(job, heartbeat, settings, draining=draining, deadline=deadline)
                heartbeat.done(job)
    return succeeded
