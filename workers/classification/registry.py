"""Loads the classifier that a pipeline names, in the runtime that is asked for."""

from __future__ import annotations

from common.domain import PipelineSpec
from common.models.manifest import ModelKind, known_model
from workers.classification import MaskClassifier, keras_session
from workers.classification.network_classifier import NetworkMaskClassifier
from workers.inference import Engine, Runtime, onnx_session


def load_classifier(spec: PipelineSpec, runtime: Runtime) -> MaskClassifier:
    """The classifier of a pipeline.

    Raises `MaskwatchError` for an unknown name, else errors as `workers.analysis.load.load_analyzer`.
    """
    known_model(spec.classifier.name, ModelKind.CLASSIFIER)
    engine = keras_session if runtime.engine is Engine.NATIVE else onnx_session
    return NetworkMaskClassifier(engine.load_session(spec.classifier, runtime))
