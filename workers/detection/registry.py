"""Loads the detector that a pipeline names, and lists the known ones."""

from __future__ import annotations

from collections.abc import Callable

from common.domain import PipelineSpec
from common.models.manifest import ModelKind, known_model
from workers.detection import FaceDetector
from workers.detection.centerface import load_centerface
from workers.detection.fdet_package import load_fdet_mtcnn, load_fdet_retinaface
from workers.detection.haar import load_haar
from workers.detection.hog import load_hog
from workers.detection.mtcnn import load_mtcnn
from workers.detection.retinaface import load_retinaface
from workers.inference import Runtime

_LOADERS: dict[str, Callable[[PipelineSpec, Runtime], FaceDetector]] = {
    "centerface": load_centerface,
    "retinaface-resnet50": load_retinaface,
    "retinaface-mobilenet": load_retinaface,
    "mtcnn": load_mtcnn,
    "haar": load_haar,
    "hog": load_hog,
    "fdet-retinaface": load_fdet_retinaface,
    "fdet-retinaface-mobilenet": load_fdet_retinaface,
    "fdet-mtcnn": load_fdet_mtcnn,
}


def detector_names() -> tuple[str, ...]:
    """All detectors, ours first, even if their weights are not on this machine."""
    return tuple(_LOADERS)


def load_detector(spec: PipelineSpec, runtime: Runtime) -> FaceDetector:
    """The detector of a pipeline.

    Raises `MaskwatchError` for an unknown name, else errors as `workers.analysis.load.load_analyzer`.
    """
    name = known_model(spec.detector.name, ModelKind.DETECTOR).name
    return _LOADERS[name](spec, runtime)
