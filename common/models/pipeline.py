"""Makes a pipeline's spec from settings, with the weights that the manifest or this machine pins."""

from __future__ import annotations

from pathlib import Path

from common.domain import PipelineSpec
from common.models.manifest import ModelKind, pinned_model
from common.settings import PipelineSettings, Settings


def pipeline_spec(settings: Settings) -> PipelineSpec:
    """The configured pipeline, with the weights that the manifest or this machine pins."""
    return spec_of(settings.pipeline, settings.models_dir)


def spec_of(pipeline: PipelineSettings, models_dir: Path) -> PipelineSpec:
    """The pipeline these settings describe, with the weights that the manifest or the files in `models_dir` pin."""
    values = pipeline.model_dump(exclude={"detector", "classifier", "detector_threshold"})
    model, detector = pinned_model(pipeline.detector, ModelKind.DETECTOR, models_dir)
    _, classifier = pinned_model(pipeline.classifier, ModelKind.CLASSIFIER, models_dir)
    threshold = model.threshold if pipeline.detector_threshold is None else pipeline.detector_threshold
    assert threshold is not None, f"{model.name} has no threshold in the manifest"
    return PipelineSpec(detector=detector, classifier=classifier, detector_threshold=threshold, **values)
