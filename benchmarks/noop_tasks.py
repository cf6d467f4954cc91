"""The worker's side of `benchmarks.ledger`: jobs that find nothing, at once. What is left is the ledger's work."""

from __future__ import annotations

from typing import Any

from common.database.sessions import session_scope
from common.messaging.celery_app import app
from common.messaging.queues import TaskName, decode_refs
from common.settings import get_settings
from workers.jobs import attempts
from workers.jobs.recording import AnalysedImage, record_images


@app.task(name=TaskName.ANALYZE.value)
def analyze(message: Any) -> None:
    """Claim, record and finish the jobs that a message names, together, as shipped."""
    jobs = attempts.claim(decode_refs(message), "noop/1", get_settings())
    with session_scope() as session:
        record_images(session, [AnalysedImage(job, [], job.observed_at) for job in jobs if job.observed_at])
