"""Loads the models that a pipeline pins, and makes its analyzer of them: on a CPU, or with frames that stay on a
GPU."""

from __future__ import annotations

from common.domain import PipelineSpec
from workers.analysis.analyzer import Analyzer, PictureAnalyzer
from workers.inference import Runtime, limit_opencv_threads


def load_analyzer(spec: PipelineSpec, runtime: Runtime) -> PictureAnalyzer:
    """The pipeline with its pinned models loaded. On a GPU it is one whose frames stay there.

    Models are loaded once per process. Errors as `workers.weights.files.read_files`, and `MaskwatchError` if the device
    isn't there.
    """
    # Imported here, so that an analyser made of other models (in tests, say) needs no runtime.
    from workers.classification.registry import load_classifier
    from workers.detection.registry import load_detector

    if runtime.device != "cpu":
        # Imported here: torch is not installed everywhere.
        from workers.inference.torch_session import torch_device

        torch_device(runtime)  # says what is missing, torch itself included, before torch is needed
        # Imported here: torch is not installed everywhere.
        from workers.analysis.device.analyzer import load_device_analyzer

        return load_device_analyzer(spec, runtime)
    limit_opencv_threads(runtime.threads)
    return Analyzer(spec, load_detector(spec, runtime), load_classifier(spec, runtime))
