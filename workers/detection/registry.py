"""Loads the detector that a pipeline names."""

from __future__ import annotations

from common.domain import PipelineSpec
from common.manifest import ModelKind, known_model
from workers.detection import FaceDetector
from workers.detection.centerface import load_centerface
from workers.inference import Runtime

_LOADERS = {"centerface": load_centerface}


def load_detector(spec: PipelineSpec, runtime: Runtime) -> FaceDetector:
    """The detector of a pipeline.

    Raises `MaskwatchError` for an unknown name, else errors as `workers.pipeline.load_analyzer`.
    """
    name = known_model(spec.detector.name, ModelKind.DETECTOR).name
    return _LOADERS[name](spec, runtime)
