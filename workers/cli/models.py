"""`maskwatch models`: lists the models of the manifest, and gets, checks, exports and imports their files.

Wiring between the command line and `workers.weights`; loads no model runtime, unless weights without a published hash
have to be checked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from common.cli.parts import console
from common.domain import MaskwatchError
from common.models.pins import is_sha256
from workers.weights import download
from workers.weights.bundles import MANIFEST, export_bundle, import_bundle
from workers.weights.download import Placed, import_files, known_files
from workers.weights.files import USABLE, WRONG, FileStatus, ModelStatus, cache_folder, examine, local_models


@click.group()
def models() -> None:
    """List, download, verify, export and import the files of models.

    Files lie in packages that ship them, or in the cache folder that MASKWATCH_MODELS_DIR names. Each is pinned by its
    SHA-256, and a file with another hash is never used.

    \b
    Examples:
      maskwatch models list                         which models are here, and which are missing
      maskwatch models pull mtcnn                   download it from its authors
      maskwatch models import weights.pth           take a file that you downloaded yourself
      maskwatch models export /media/usb/models     for a machine without a network, and there:
      maskwatch models import /media/usb/models
    """


@models.command("list")
@console.json_option
def list_models(as_json: bool) -> None:
    """List the models: kind, licence, size, hash, state, and where they lie.

    \b
    Example:
      maskwatch models list
    """
    statuses = [examine(model) for model in local_models().values()]
    if as_json:
        console.print_json({"cache": str(cache_folder()), "models": [_as_dict(status) for status in statuses]})
        return
    console.print_table(
        f"Models (cache: {cache_folder()})",
        ("name", "kind", "licence", "size", "SHA-256", "state", "where it lies, or comes from"),
        [_row(status) for status in statuses],
    )


def _as_dict(status: ModelStatus) -> dict[str, Any]:
    model = status.model
    return {
        "name": model.name,
        "kind": model.kind,
        "licence": model.licence,
        "source": model.source,
        "requirement": model.requirement,
        "state": status.state,
        "detail": status.detail,
        "sha256": model.sha256,
        "files": [_file_as_dict(entry) for entry in status.files],
    }


def _file_as_dict(entry: FileStatus) -> dict[str, Any]:
    return {
        "name": entry.file.name,
        "size": entry.path.stat().st_size if entry.path is not None else entry.file.size,
        "sha256": entry.file.sha256,
        "found_sha256": entry.sha256,
        "state": entry.state,
        "path": None if entry.path is None else str(entry.path),
        "url": entry.file.url,
    }


def _row(status: ModelStatus) -> tuple[Any, ...]:
    model = status.model
    files = [_file_as_dict(entry) for entry in status.files]
    sizes = [entry["size"] for entry in files if entry["size"] is not None]
    places = [entry["path"] or entry["url"] for entry in files if entry["path"] or entry["url"]]
    return (
        model.name,
        model.kind,
        model.licence,
        f"{sum(sizes) / 1e6:.1f} MB" if sizes else None,
        model.sha256 and model.sha256[:12],
        status.state,
        "\n".join(places) or model.requirement or model.source,
    )


@models.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="All models that are missing here and can be downloaded.")
@click.option("--url", metavar="URL", help="A mirror: the URL of the file, or of its folder, ending with a slash.")
@click.option("--sha256", metavar="HEX", help="The hash that the file must have, if none is published.")
@console.json_option
def pull(names: tuple[str, ...], everything: bool, url: str | None, sha256: str | None, as_json: bool) -> None:
    """Download models into the cache; each file is checked before it gets its name.

    If no hash is published, the weights must fit their network, and the hash of the file is remembered.

    \b
    Examples:
      maskwatch models pull retinaface-resnet50
      maskwatch models pull --all
      maskwatch models pull --all --url https://mirror.example/models/
      maskwatch models pull retinaface-resnet50 --url http://mirror/r50.pt --sha256 5f3a…
    """
    from workers.detection.structure import check_fits  # needs the worker layer, which looking does not

    if bool(names) == everything:
        raise MaskwatchError("name the models to pull, or give --all")
    sha256 = sha256 and sha256.lower()
    if sha256 is not None and (len(names) != 1 or not is_sha256(sha256)):
        raise MaskwatchError("--sha256 goes with one model, and is 64 characters of 0-9 and a-f")
    placed: list[Placed] = []
    failed: list[str] = []
    for name in dict.fromkeys(names) if names else _pullable(url):
        try:
            with console.bar(name, in_bytes=True) as bar:
                done = download.pull(name, check_fits, url=url, sha256=sha256, on_progress=bar.show)
        except MaskwatchError as error:
            if not everything:
                raise
            # A model that can't be pulled must not stop the others.
            failed.append(name)
            console.note(str(error))
            continue
        _tell(done)
        placed += done
    if as_json:
        console.print_json([_placed_as_dict(entry) for entry in placed])
    if failed:
        raise MaskwatchError(f"could not pull {', '.join(failed)}; the lines above say why")


def _pullable(url: str | None) -> list[str]:
    """The models of `--all`: those with files that are missing or wrong, and have an address."""
    statuses = [examine(model) for model in local_models().values()]
    return [
        status.model.name
        for status in statuses
        if any(entry.state not in USABLE and (entry.file.url or url) for entry in status.files)
    ]


@models.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@console.json_option
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Hash every file again. Exits with 1 if a file is wrong, or if a model that you named is missing.

    \b
    Examples:
      maskwatch models verify
      maskwatch models verify mtcnn && start-my-job
    """
    known = local_models()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MaskwatchError(f"unknown model {unknown[0]!r}; known: {', '.join(sorted(known))}")
    statuses = [examine(known[name]) for name in names or known]
    wrong = [status for status in statuses if status.state in WRONG or (names and status.state not in USABLE)]
    if as_json:
        console.print_json([_as_dict(status) for status in statuses])
    else:
        for status in wrong:
            click.echo(f"{status.model.name}: {status.state}: {status.detail}")
        right = sum(status.state in USABLE for status in statuses)
        console.note(f"{right} model(s) have their pinned hashes, {len(wrong)} are wrong")
    if wrong:
        sys.exit(1)


@models.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@console.json_option
def export(folder: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Copy models into a new FOLDER, to carry to a machine without a network.

    It holds the files, the networks that were derived from them here, and manifest.json: names, sizes, hashes,
    licences and sources. Without a NAME, all models that are here are copied.

    \b
    Examples:
      maskwatch models export /media/usb/models
      maskwatch models export bundle/ retinaface-mobilenet mtcnn
    """
    from workers.detection.structure import derive  # needs the worker layer, which looking does not

    statuses = export_bundle(folder, names, derive)
    if as_json:
        console.print_json({"folder": str(folder), "models": [_as_dict(status) for status in statuses]})
    else:
        carried = ", ".join(status.model.name for status in statuses)
        console.note(f"{folder} holds {carried}; on the other machine: maskwatch models import {folder.name}")


@models.command("import")
@click.argument(
    "paths", nargs=-1, required=True, metavar="FOLDER|FILE...", type=click.Path(exists=True, path_type=Path)
)
@click.option("--as", "as_name", metavar="NAME", help="The model of the file, if neither its hash nor its name tells.")
@console.json_option
def import_models(paths: tuple[Path, ...], as_name: str | None, as_json: bool) -> None:
    """Copy files into the cache: a FOLDER made by `export`, or weights that you downloaded yourself, by their FILE, or
    all known ones below a FOLDER.

    A file is recognised by its hash, by its name or by --as. It must have the published hash; if there is none, the
    weights must fit their network, and the hash is remembered. No code in a file is ever executed, and a refused import
    leaves nothing behind.

    \b
    Examples:
      maskwatch models import /media/usb/models
      maskwatch models import pnet.pt rnet.pt onet.pt
      maskwatch models import Resnet50_Final.pth --as retinaface-resnet50
    """
    from workers.detection.structure import check_fits  # needs the worker layer, which looking does not

    folders = [path for path in paths if path.is_dir()]
    if folders and (len(paths) > 1 or as_name is not None):
        raise MaskwatchError("give one folder without --as, or files")
    if folders and (folders[0] / MANIFEST).exists():
        placed = import_bundle(folders[0], check_fits)
    else:
        placed = import_files(known_files(folders[0]) if folders else paths, check_fits, as_name)
    _tell(placed)
    if as_json:
        console.print_json([_placed_as_dict(entry) for entry in placed])


def _placed_as_dict(entry: Placed) -> dict[str, Any]:
    return {
        "model": entry.model,
        "path": str(entry.path),
        "sha256": entry.sha256,
        "new": entry.new,
        "pinned_now": entry.pinned_now,
    }


def _tell(placed: list[Placed]) -> None:
    for entry in placed:
        if not entry.new:
            console.note(f"{entry.model}: {entry.path} is there already, with its pinned hash")
            continue
        console.note(f"{entry.model}: {entry.path}, SHA-256 {entry.sha256}")
        if entry.pinned_now:
            console.note(
                f"  no hash is published: the file fits its network, and its hash is remembered; on other machines, "
                f"name it {entry.model}@{entry.sha256}"
            )
