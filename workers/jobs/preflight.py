"""Checks that this machine has the engine, the device and the models of its jobs, once, before any job is claimed.

`python -m workers.jobs.preflight ENGINE DEVICE` analyses one image with them in a process of its own: only a forward
pass shows that a GPU and its libraries work, and the GPU's memory is free again when that process ends.
"""

from __future__ import annotations

import subprocess
import sys

from common.domain import MaskwatchError, PipelineSpec
from common.machine import missing_for, require_device
from common.models.pipeline import pipeline_spec, spec_of
from common.settings import PipelineSettings, Settings
from workers.inference import Engine, Runtime, runtime_of
from workers.weights.files import cache_folder, require

#: Time limit of the trial on a GPU: loading CUDA's libraries from a cold disk takes most of it.
TRIAL_SECONDS = 180.0


def require_runtime(runtime: Runtime) -> None:
    """Raises `MaskwatchError` if the engine isn't installed, or the GPU is missing or can't be used."""
    if (missing := missing_for(runtime.engine)) is not None:
        raise MaskwatchError(missing)
    require_device(runtime.device)
    if runtime.device == "cpu":
        return
    command = [sys.executable, "-m", "workers.jobs.preflight", runtime.engine, runtime.device]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise MaskwatchError(
            f"device {runtime.device} did not finish one picture within {TRIAL_SECONDS:.0f} s; check `nvidia-smi`"
        ) from error
    if trial.returncode:
        said = trial.stderr.strip().splitlines() or [f"the trial ended with exit code {trial.returncode}"]
        raise MaskwatchError(f"device {runtime.device} can't be used: {said[-1].removeprefix('error: ')}")


def require_models(spec: PipelineSpec) -> None:
    """Raises `MaskwatchError` if a model of the pipeline isn't on this machine, or isn't the pinned one."""
    for ref in (spec.detector, spec.classifier):
        require(ref)


def require_ready(settings: Settings) -> None:
    """Raises `MaskwatchError` if workers with these settings can't do the jobs that a backfill would plan."""
    require_runtime(runtime_of(settings))
    require_models(pipeline_spec(settings))


def _try(engine: str, device: str) -> None:
    import numpy as np

    # Imported here: only the process that tries the device loads decoders and models.
    from workers.analysis.load import load_analyzer

    # The pipeline of a new installation, whose models ship with it: the configured models may not be here yet.
    analyzer = load_analyzer(spec_of(PipelineSettings(), cache_folder()), Runtime(Engine(engine), device))
    analyzer.analyze(np.zeros((64, 64, 3), np.uint8))


if __name__ == "__main__":
    try:
        _try(*sys.argv[1:])
    except Exception as error:  # any error of a runtime; `require_runtime` shows this line
        print(f"error: {type(error).__name__ if not str(error) else error}", file=sys.stderr)
        sys.exit(1)
