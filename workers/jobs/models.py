"""The models that jobs are pinned to, loaded once per process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from common.domain import JobKind, PipelineSpec, SampleMode
from common.ledger import ClaimedJob
from common.settings import Settings
from workers.analysis.analyzer import ImageAnalyzer
from workers.analysis.load import load_analyzer
from workers.inference import Runtime, runtime_of
from workers.jobs.attempts import UnfitWorkerError, release


def analyzer(spec: PipelineSpec, runtime: Runtime) -> ImageAnalyzer:
    """The loaded models of a pipeline. Pipelines that differ only in the frames that they sample share them."""
    return _loaded(replace(spec, sample=SampleMode.FRAMES, sample_fps=1.0), runtime)


@lru_cache(maxsize=2)
def _loaded(spec: PipelineSpec, runtime: Runtime) -> ImageAnalyzer:
    """Keeps two, so that models aren't reloaded all the time while jobs of two pipelines alternate."""
    return load_analyzer(spec, runtime)


def load_models(jobs: Sequence[ClaimedJob], settings: Settings) -> None:
    """Load the models of these jobs; call it under their heartbeat, since it may take longer than a lease.

    Raises `UnfitWorkerError`, with the jobs given back, if a model can't be loaded.
    """
    try:
        # A probe only reads a header.
        for spec in {job.spec for job in jobs if job.kind is not JobKind.PROBE}:
            analyzer(spec, runtime_of(settings))
    except Exception as error:  # whatever a runtime raises when it can't load a model
        release(jobs)
        raise UnfitWorkerError(str(error)) from error
