"""ONNX files that are made from a model's weights, once per machine, and kept in the cache of models.

A pipeline pins the weights; a derived file has their SHA-256 in its name, and its own SHA-256 in a file beside it.
Making the file is left to the module of the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import structlog

from common.domain import MaskwatchError, ModelRef
from common.files import write_atomically
from workers.weights.files import cache_folder

FOLDER = "derived"
#: Beside each file: its SHA-256, as 64 hexadecimal digits.
SIDECAR = ".sha256"

log = structlog.get_logger(__name__)


def derived_path(model: ModelRef, version: str) -> Path:
    """Where the file made from a model lies, or would lie. version: changes when it is made in another way."""
    return cache_folder() / FOLDER / f"{model.sha256}-{version}.onnx"


def derived_onnx(model: ModelRef, version: str, make: Callable[[], bytes]) -> bytes:
    """The ONNX file made from a model's weights: from the cache, or else a new one, which is kept there.

    A file that differs from the SHA-256 beside it is made again. make: returns the file's bytes; needs torch and the
    weights.

    Raises `MaskwatchError` if the file and torch are both missing, else errors as `make`.
    """
    path = derived_path(model, version)
    content = _intact(path)
    if content is not None:
        return content
    if importlib.util.find_spec("torch") is None:
        raise MaskwatchError(
            f"{model.name} under ONNX Runtime needs {path}, which torch makes from the weights: "
            "pip install 'maskwatch[native]', or `maskwatch models import` a bundle of a machine that has it"
        )
    content = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Readable by all users: workers may run as another user than the one that pulled the model.
        write_atomically(path, content, mode=0o644)
        write_atomically(_sidecar(path), hashlib.sha256(content).hexdigest(), mode=0o644)
    except OSError as error:
        # A cache that can't be written to, e.g. read-only in a container, only costs time at each start.
        log.warning("derived model not kept", path=str(path), error=str(error))
    return content


def _intact(path: Path) -> bytes | None:
    try:
        content, told = path.read_bytes(), _sidecar(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return content if hashlib.sha256(content).hexdigest() == told else None


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)
