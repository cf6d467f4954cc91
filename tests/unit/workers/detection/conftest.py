"""What the tests of detectors share: a cache of models of their own, and networks with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.domain import ModelRef
from common.settings import get_settings
from tests.detector_files import put_in_cache, random_retinaface, saved, use_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of models, which the settings name."""
    yield use_cache(tmp_path / "models", monkeypatch)
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def random_mobilenet() -> Any:
    return random_retinaface("mobilenet")


@pytest.fixture
def mobilenet(cache: Path, random_mobilenet: Any) -> ModelRef:
    """A RetinaFace of random weights in the cache."""
    content = saved(random_mobilenet.state_dict())
    return put_in_cache(cache, "retinaface-mobilenet", {"retinaface_mobilenet0.25_Final.pth": content})
