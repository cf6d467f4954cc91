"""The pipelines of tests."""

from __future__ import annotations

from typing import Any

from common.domain import PipelineSpec
from common.models.pipeline import spec_of
from common.settings import PipelineSettings, get_settings


def default_spec(**chosen: Any) -> PipelineSpec:
    """The pipeline of a new installation, but for the settings that are chosen, with the weights of this machine."""
    return spec_of(PipelineSettings(**chosen), get_settings().models_dir)
