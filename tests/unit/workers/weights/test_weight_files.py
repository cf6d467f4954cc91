"""How a model stands on this machine, and what its bare name means here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from common.domain import MaskwatchError
from common.models import manifest
from common.models.manifest import MODELS, Model, ModelFile, ModelKind, pinned_model
from common.models.pins import PINS_FILE, read_pins, remember_pins
from common.models.pipeline import pipeline_spec, spec_of
from common.settings import PipelineSettings, Settings, get_settings
from tests.pipelines import default_spec
from workers.weights.files import State, examine, file_path, local_models, read_files, read_pieces, require

CONTENTS = {"one.pt": b"one", "two.pt": b"two"}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, which the settings name."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("MASKWATCH_MODELS_DIR", str(folder))
    get_settings.cache_clear()
    yield folder
    get_settings.cache_clear()


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A detector of two files, one of which has an address."""
    files = tuple(ModelFile(name, digest(content), len(content)) for name, content in CONTENTS.items())
    files = (files[0], replace(files[1], url="https://nowhere.invalid/two.pt"))
    model = Model("pair", ModelKind.DETECTOR, files, "MIT", "this test", threshold=0.5)
    monkeypatch.setitem(manifest.MODELS, "pair", model)
    return model


def fill(cache: Path, **changed: bytes) -> None:
    for name, content in (CONTENTS | {f"{stem}.pt": content for stem, content in changed.items()}).items():
        (cache / name).write_bytes(content)


def test_a_model_is_in_the_state_of_its_worst_file(cache: Path, pair: Model) -> None:
    assert examine(pair).state is State.TO_IMPORT
    (cache / "one.pt").write_bytes(b"one")
    assert examine(pair).state is State.TO_PULL
    assert "maskwatch models pull pair" in examine(pair).detail
    fill(cache)
    assert (examine(pair).state, examine(pair).detail) == (State.CACHED, "")
    fill(cache, one=b"0ne")
    status = examine(pair)
    assert status.state is State.DIFFERS
    assert digest(b"0ne") in status.detail and digest(b"one") in status.detail
    assert [entry.state for entry in status.files] == [State.DIFFERS, State.CACHED]


def test_a_model_of_two_files_is_read_whole_or_not_at_all(cache: Path, pair: Model) -> None:
    fill(cache)
    assert read_files(pair.ref) == [b"one", b"two"]
    fill(cache, two=b"tw0")
    with pytest.raises(MaskwatchError, match=f"has SHA-256 .* the pipeline wants {pair.ref.sha256[:12]}"):
        require(pair.ref)


def test_what_ships_in_a_package_may_also_lie_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = MODELS["compact"]
    elsewhere = replace(shipped, files=(replace(shipped.files[0], package="not_installed_here"),))
    monkeypatch.setitem(MODELS, "compact", elsewhere)
    assert examine(elsewhere).state is State.PACKAGE_MISSING
    content = file_path(shipped, shipped.files[0]).read_bytes()
    (cache / "compact.onnx").write_bytes(content)
    assert examine(elsewhere).state is State.CACHED
    assert read_files(shipped.ref) == [content]


def test_a_model_that_is_code_is_its_installed_version() -> None:
    code = Model("code", ModelKind.DETECTOR, (), "MIT", "this test", requirement="not-installed-here==1.0")
    assert examine(code).state is State.PACKAGE_MISSING
    other = examine(replace(code, requirement="numpy==0.1"))
    assert other.state is State.DIFFERS and "0.1 is pinned" in other.detail
    assert examine(replace(code, requirement=f"numpy=={version('numpy')}")).state is State.SHIPPED


def test_code_and_files_are_pinned_together(cache: Path, pair: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(pair, requirement="numpy==0.1")
    assert len({pair.sha256, both.sha256, replace(both, requirement="numpy==0.2").sha256}) == 3
    monkeypatch.setitem(MODELS, "pair", both)
    fill(cache)
    assert read_files(both.ref) == [b"one", b"two"]
    with pytest.raises(MaskwatchError, match=r"0\.1 is pinned"):
        require(both.ref)


@pytest.fixture
def unpublished(pair: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The same detector, where nobody has published the hash of its first file."""
    model = replace(pair, files=(replace(pair.files[0], sha256=None, size=None), pair.files[1]))
    monkeypatch.setitem(manifest.MODELS, "pair", model)
    return model


def test_a_bare_name_means_what_this_machine_has_pinned(cache: Path, unpublished: Model, pair: Model) -> None:
    with pytest.raises(MaskwatchError, match="nobody has published a hash for pair: `maskwatch models pull pair`"):
        default_spec(detector="pair")
    fill(cache)
    assert examine(local_models()["pair"]).state is State.UNPINNED
    remember_pins(cache, {"one.pt": digest(b"one")})
    assert default_spec(detector="pair").detector == pair.ref
    assert examine(local_models()["pair"]).state is State.CACHED
    assert default_spec(detector=f"pair@{pair.sha256}").detector == pair.ref


def test_a_pipeline_takes_its_pins_from_the_folder_of_its_own_settings(
    cache: Path, unpublished: Model, pair: Model, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    remember_pins(other, {"one.pt": digest(b"one")})
    settings = Settings(models_dir=other, pipeline=PipelineSettings(detector="pair"))
    assert pipeline_spec(settings).detector == pair.ref
    # The folder of this process's settings, where nothing is pinned.
    with pytest.raises(MaskwatchError, match="nobody has published a hash for pair"):
        spec_of(settings.pipeline, cache)


def test_a_published_hash_is_not_overruled_by_a_pin(cache: Path, pair: Model) -> None:
    remember_pins(cache, {"one.pt": "0" * 64})
    assert local_models()["pair"] == pair
    assert default_spec(detector="pair").detector == pair.ref


@pytest.mark.parametrize("name", ["pair@", "pair@abc", f"pair@{'A' * 64}", f"pair@{'g' * 64}"])
def test_something_that_is_no_hash_is_refused(cache: Path, pair: Model, name: str) -> None:
    with pytest.raises(MaskwatchError, match="is no SHA-256"):
        pinned_model(name, ModelKind.DETECTOR, cache)


def test_pins_are_added_and_kept(tmp_path: Path) -> None:
    assert read_pins(tmp_path / "no folder") == {}
    remember_pins(tmp_path, {"a": "0" * 64})
    remember_pins(tmp_path, {"b": "1" * 64})
    assert read_pins(tmp_path) == {"a": "0" * 64, "b": "1" * 64}
    assert [path.name for path in tmp_path.iterdir()] == [PINS_FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "abc"}', '{"a": 5}'])
def test_a_damaged_file_of_pins_is_named_and_trusted_in_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / PINS_FILE).write_text(text)
    with pytest.raises(MaskwatchError, match=r"pins\.json"):
        read_pins(tmp_path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert b"".join(read_pieces(tmp_path / "link")) == b"content"
    for name, said in (("pipe", "not a regular file"), (".", "Is a directory"), ("gone", "No such file")):
        with pytest.raises(MaskwatchError, match=said):
            list(read_pieces(tmp_path / name))
    with pytest.raises(MaskwatchError, match="is a link"):
        list(read_pieces(tmp_path / "link", follow_links=False))


def test_no_two_files_of_the_manifest_share_a_name_and_differ() -> None:
    files = {file for model in MODELS.values() for file in model.files}
    assert len({file.name for file in files}) == len(files)
