"""Loads the models that a pipeline pins, and makes an analyzer of them, for a CPU or for a GPU."""

from __future__ import annotations

from common.domain import PipelineSpec
from workers.analysis.analyzer import Analyzer, ImageAnalyzer
from workers.inference import Runtime, limit_opencv_threads


def load_analyzer(spec: PipelineSpec, runtime: Runtime) -> ImageAnalyzer:
    """The pipeline with its pinned models loaded. On a GPU, frames stay in its memory.

    Errors as `workers.weights.files.read_files`, and `MaskwatchError` if the device is missing.
    """
    # Imported here, so that an analyser made of other models (in tests, say) needs no runtime.
    from workers.classification.registry import load_classifier
    from workers.detection.registry import load_detector

    if runtime.device != "cpu":
        # Imported here: torch is not installed everywhere.
        from workers.inference.torch_session import torch_device

        torch_device(runtime)  # raises for what is missing, torch included, before the import below needs torch
        # Imported here: torch is not installed everywhere.
        from workers.analysis.device.analyzer import load_device_analyzer

        return load_device_analyzer(spec, runtime)
    limit_opencv_threads(runtime.threads)
    return Analyzer(spec, load_detector(spec, runtime), load_classifier(spec, runtime))
