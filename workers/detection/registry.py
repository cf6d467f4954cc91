"""Loads the detector that a pipeline names."""

from __future__ import annotations

from common.domain import PipelineSpec
from common.manifest import model_file
from workers.detection import FaceDetector
from workers.detection.centerface import load_centerface

_LOADERS = {"centerface": load_centerface}


def load_detector(spec: PipelineSpec, threads: int, device: str = "cpu") -> FaceDetector:
    """The detector of a pipeline, with `threads` threads on `device` (`cpu`, `cuda` or `cuda:n`).

    Raises `MaskwatchError` for an unknown name, else errors as `workers.inference.load_session`.
    """
    name = model_file(spec.detector.name, "detector").name
    return _LOADERS[name](spec, threads, device)
