"""Tests of this folder need an NVIDIA GPU; without one they are skipped, and say why."""

from __future__ import annotations

import pytest


def _why_not() -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return "no torch: pip install 'maskwatch[native]'"
    return None if torch.cuda.is_available() else "no NVIDIA GPU: torch.cuda.is_available() is False"


@pytest.fixture(autouse=True, scope="session")
def _a_gpu() -> None:
    if reason := _why_not():
        pytest.skip(reason)
