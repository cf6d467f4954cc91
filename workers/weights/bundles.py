"""A bundle is a folder that carries models to a machine without a network: their files, and `manifest.json`.

A bundle comes from outside, so only what this machine's own manifest allows is taken from it: models that it knows,
files with the names and hashes that it has. Placing files in the cache is left to `workers.weights.download`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.domain import MaskwatchError, first_line
from common.files import new_folder
from common.models.manifest import Model, ModelFile
from common.models.pins import is_sha256
from workers.weights.download import MAX_BYTES, Fits, Placed, Staging, staging, with_files
from workers.weights.files import (
    USABLE,
    ModelStatus,
    State,
    cache_folder,
    examine,
    local_models,
    read_pieces,
    sha256_of,
)

MANIFEST = "manifest.json"
#: Version of the manifest's form, increased when an older version of Maskwatch could not read it.
FORM = 1
#: Limit of a manifest's size; a hundred models need less.
MAX_MANIFEST_BYTES = 2**20
#: Networks made from weights, which lie in this folder of the cache: `SHA256_OF_THE_WEIGHTS-ANYTHING`.
DERIVED = "derived"
_DERIVED_NAME = re.compile(r"([0-9a-f]{64})-[A-Za-z0-9_][A-Za-z0-9._-]{0,80}")


def export_bundle(folder: Path, names: Sequence[str], derive: Callable[[Model], None]) -> list[ModelStatus]:
    """Copy models and what was derived from them into a new folder, and write its manifest; returns what was copied.

    names: of the models; empty for all that are here. derive: makes the network that ONNX Runtime needs in the cache,
    as `workers.detection.structure.derive`, because torch may be missing on the other machine. Raises `MaskwatchError`
    for a folder that isn't empty, and for a named model that isn't here or isn't the pinned one. The folder is made
    whole or not at all.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MaskwatchError(f"{folder} is not empty; name a new folder")
    if names:
        statuses = [examine(with_files(name)) for name in dict.fromkeys(names)]
        for status in statuses:
            if not _is_here(status):
                raise MaskwatchError(f"{status.model.name} can't be exported: {status.detail}")
    else:
        statuses = [status for model in local_models().values() if _is_here(status := examine(model))]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as bundle:
            entries = [_copy_model(status, bundle, derive) for status in statuses]
            text = json.dumps({"maskwatch_models": FORM, "models": entries}, indent=2, ensure_ascii=False)
            (bundle / MANIFEST).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise MaskwatchError(f"{folder} can't be written: {first_line(error)}") from error
    return statuses


def _is_here(status: ModelStatus) -> bool:
    return bool(status.files) and all(file.state in USABLE for file in status.files)


def _copy_model(status: ModelStatus, bundle: Path, derive: Callable[[Model], None]) -> dict[str, Any]:
    model = status.model
    if status.state is State.CACHED:
        derive(model)
    files = []
    for entry in status.files:
        assert entry.path is not None and entry.sha256 is not None
        files.append(_copy(entry.path, bundle / entry.file.name, entry.sha256))
    derived = [
        _copy(path, bundle / path.name, sha256_of(path))
        for path in sorted((cache_folder() / DERIVED).glob("*"))
        if _is_derived_from(model, path.name)
    ]
    return {
        "name": model.name,
        "kind": model.kind.value,
        "licence": model.licence,
        "source": model.source,
        "files": files,
        "derived": derived,
    }


def _copy(source: Path, target: Path, sha256: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    with target.open("wb") as stream:
        for piece in read_pieces(source):
            digest.update(piece)
            stream.write(piece)
    if digest.hexdigest() != sha256:
        raise MaskwatchError(f"{source} changed while it was copied; try again")
    return {"name": target.name, "size": target.stat().st_size, "sha256": sha256}


def _is_derived_from(model: Model, name: str) -> bool:
    match = _DERIVED_NAME.fullmatch(name)
    return match is not None and match[1] in {model.sha256, *(file.sha256 for file in model.files)}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file as a bundle's manifest names it; name, size and hash have a valid form."""

    name: str
    size: int
    sha256: str


def import_bundle(folder: Path, fits: Fits) -> list[Placed]:
    """Copy the models of a bundle into the cache: all or none.

    Raises `MaskwatchError` for a manifest that names anything but plain files of known models, and for a file that
    differs from the manifest, this machine's pins or the bundle. If a hash isn't published, the bundle's is taken:
    it can be trusted as far as the bundle's maker. The same holds for derived networks.
    """
    placed: list[Placed] = []
    with staging(fits) as stage:
        for name, files, derived in _read_manifest(folder):
            placed += _receive(stage, folder, name, files)
            # With the hashes of the bundle, which `_receive` has compared with those of the manifest.
            model = with_files(name).with_pins({entry.name: entry.sha256 for entry in files})
            for entry in derived:
                if not _is_derived_from(model, entry.name):
                    raise MaskwatchError(f"{folder / MANIFEST}: {entry.name!r} is not derived from {name}")
                _write(stage, f"{DERIVED}/{entry.name}", folder, entry)
        pinned = stage.install()
    return [replace(entry, pinned_now=entry.path.name in pinned) for entry in placed]


def _receive(stage: Staging, folder: Path, name: str, entries: list[_Entry]) -> Iterator[Placed]:
    model = with_files(name)
    there = {status.file.name: status for status in examine(model).files}
    given = {entry.name: entry for entry in entries}
    if set(given) != set(there) or len(given) != len(entries):
        raise MaskwatchError(
            f"{folder / MANIFEST}: the files of {name} are {', '.join(sorted(there))}, "
            f"and the bundle has {', '.join(repr(entry.name) for entry in entries) or 'none'}"
        )
    trusted = model.with_pins({entry.name: entry.sha256 for entry in entries})
    for file in trusted.files:
        entry, status = given[file.name], there[file.name]
        if entry.sha256 != file.sha256:
            raise MaskwatchError(
                f"{folder / MANIFEST} gives {file.name} the SHA-256 {entry.sha256}, and it is pinned to {file.sha256}"
            )
        found = stage.receive(trusted, _sized(file, entry), _open(folder, entry), str(folder / entry.name))
        if status.state in USABLE and status.path is not None:
            stage.drop(file.name)
            yield Placed(name, status.path, found, new=False)
        else:
            yield Placed(name, stage.folder / file.name, found, new=True)


def _sized(file: ModelFile, entry: _Entry) -> ModelFile:
    return file if file.size is not None else replace(file, size=entry.size)


def _write(stage: Staging, name: str, folder: Path, entry: _Entry) -> None:
    stage.write(name, _open(folder, entry), str(folder / entry.name), size=entry.size, sha256=entry.sha256)


def _open(folder: Path, entry: _Entry) -> Iterator[bytes]:
    return read_pieces(folder / entry.name, follow_links=False)


def _read_manifest(folder: Path) -> list[tuple[str, list[_Entry], list[_Entry]]]:
    """(model, its files, the networks derived from them) of each entry, with names that stay inside the folder."""
    path = folder / MANIFEST
    text = b""
    for piece in read_pieces(path, follow_links=False):
        text += piece
        if len(text) > MAX_MANIFEST_BYTES:
            raise MaskwatchError(f"{path} is larger than any manifest ({MAX_MANIFEST_BYTES:,} bytes)")
    try:
        content = json.loads(text)
        if content["maskwatch_models"] != FORM:
            raise MaskwatchError(
                f"{path} has form {content['maskwatch_models']!r}, but this version of Maskwatch reads only {FORM}; "
                "use the version that exported it"
            )
        models = [
            (model["name"], [_entry(path, e) for e in model["files"]], [_entry(path, e) for e in model["derived"]])
            for model in content["models"]
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MaskwatchError(f"{path} is not a manifest of models ({type(error).__name__}: {error})") from error
    if not models:
        raise MaskwatchError(f"{path} names no model: nothing to import")
    names = [name for name, _, _ in models]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise MaskwatchError(f"{path}: every model needs a name of its own")
    return models


def _entry(path: Path, value: Any) -> _Entry:
    entry = _Entry(value["name"], value["size"], value["sha256"])
    plain = isinstance(entry.name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}", entry.name)
    if not plain:
        raise MaskwatchError(f"{path}: {entry.name!r} is not a plain file name")
    if type(entry.size) is not int or not 0 < entry.size <= MAX_BYTES or not is_sha256(entry.sha256):
        raise MaskwatchError(f"{path}: size or SHA-256 of {entry.name} is not valid")
    return entry
