"""The `annotate` command on real files: what is written, what is said, and what never happens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from common.domain import MaskwatchError, ModelRef, ObjectInfo
from common.sample.source_images import astronaut
from common.settings import get_settings
from workers.annotation.images import image_name
from workers.cli.annotate import annotate


@pytest.fixture(autouse=True)
def stand_in_classifier(ship_brightness: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch) -> None:
    ship_brightness()
    monkeypatch.setenv("MASKWATCH_PIPELINE__CLASSIFIER", "bright")
    monkeypatch.setenv("MASKWATCH_WORKER__THREADS", "1")
    get_settings.cache_clear()


@pytest.fixture(autouse=True)
def settings_of_others_again() -> None:
    yield
    get_settings.cache_clear()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of one face each, in folders, with the same name; a text; a broken picture."""
    folder = tmp_path / "photos"
    for camera in ("a", "b"):
        (folder / camera).mkdir(parents=True)
        Image.fromarray(astronaut()).save(folder / camera / "door.png")
    (folder / "a" / "notes.txt").write_text("not a picture")
    (folder / "b" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much of a picture")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(annotate, [str(a) for a in arguments])


def test_images_are_annotated_and_the_broken_one_is_named(photos: Path, tmp_path: Path) -> None:
    result = run(photos, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["other_objects"] == 1
    (failed,) = report["failed"]
    assert failed["source"].endswith("/photos/b/broken.jpg")
    assert "cut off" in failed["error"]
    assert result.stderr.count("\n") == 1
    assert failed["source"] in result.stderr

    written = sorted((tmp_path / "out").iterdir())
    assert sorted(Path(entry["picture"]) for entry in report["annotated"]) == written
    assert len(written) == 2  # one each, although both are called door.png
    for entry in report["annotated"]:
        (face,) = entry["faces"]
        assert face["p_with_mask"] + face["p_without_mask"] == pytest.approx(1)
        with Image.open(entry["picture"]) as drawn:
            assert drawn.format == "JPEG"
            assert drawn.size == (1024, 1024)
            original = np.asarray(Image.fromarray(astronaut()).resize((1024, 1024)), int)
            assert np.abs(np.asarray(drawn, int) - original).max() > 100


def test_people_get_a_sentence(photos: Path, tmp_path: Path) -> None:
    result = run(photos, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"2 pictures in {tmp_path / 'out'}: 2 faces (")
    assert "1 failed, 1 other objects skipped" in result.stdout


def test_again_gives_the_same_files(photos: Path, tmp_path: Path) -> None:
    run(photos, "--out", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(photos, "--out", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_its_own_images_are_not_annotated_again(photos: Path) -> None:
    for _ in range(2):
        result = run(photos, "--out", photos / "annotated", "--json")
        assert len(json.loads(result.stdout)["annotated"]) == 2


def test_the_limit_is_kept(photos: Path, tmp_path: Path) -> None:
    result = run(photos, "--out", tmp_path / "out", "--limit", 1, "--json")
    assert len(json.loads(result.stdout)["annotated"]) == 1
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_single_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(astronaut()).save(buffer, "PNG")
    (tmp_path / "upload.dat").write_bytes(buffer.getvalue())
    result = run(tmp_path / "upload.dat", "--out", tmp_path / "out", "--json")
    assert len(json.loads(result.stdout)["annotated"]) == 1


def test_if_none_could_be_annotated_it_fails(photos: Path, tmp_path: Path) -> None:
    result = run(photos / "b" / "broken.jpg", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, MaskwatchError)
    assert str(result.exception) == "none of the 1 pictures could be annotated; the lines above say why"


@pytest.mark.parametrize("content", ["", "notes.txt"])
def test_a_folder_without_images_fails_in_words(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    if content:
        (folder / content).write_text("words")
    result = run(folder, "--out", tmp_path / "out")
    assert isinstance(result.exception, MaskwatchError)
    assert f"no pictures in {folder} ({1 if content else 0} other objects)" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_missing_source_fails_in_words(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere", "--out", tmp_path / "out")
    assert isinstance(result.exception, MaskwatchError)
    assert "nowhere" in str(result.exception)


def test_an_output_that_is_a_file_fails_in_words(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    result = run(photos, "--out", tmp_path / "out")
    assert isinstance(result.exception, MaskwatchError)
    assert f"can't make the folder {tmp_path / 'out'}" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "folder"], "name a SOURCE"),
        (["a.mp4", "--face", 1, "--out", "face.png"], "leave out SOURCE"),
        (["--face", 1, "--at", 3, "--out", "face.png"], "leave out --at"),
        (["--face", 1, "--out", "faces"], "--out NAME.png instead of faces"),
        (["a.mp4", "--at", 3, "--out", "at.mp4"], "--out NAME.png instead of at.mp4"),
        (["a.jpg", "--out", "a.png"], "for pictures, name a folder"),
        (["a.mp4", "--out", "b.mov"], "b.mov can't be written"),
        (["a.jpg", "--out", "b.jpg"], "b.jpg can't be written"),
        (["photos", "--out", "folder", "--sample-fps", 1], "--sample-fps is for a video"),
        (["a.mp4", "--out", "b.mp4", "--blur", "--sample-fps", 1], "faces would slip through"),
        (["a.mp4", "--out", "b.mp4", "--limit", 1], "--limit counts pictures"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, MaskwatchError), result.output
    assert says in str(result.exception)
    assert not list(tmp_path.glob("*.m*")) + list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("at", ["1:2:3:4", "1m", "-1", "", "1:234:00", "NaN", "1e3"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, at: str) -> None:
    result = run("a.mp4", "--at", at, "--out", tmp_path / "at.png")
    assert result.exit_code == 2
    assert "expected 00:01:30.5, 01:30.5 or 90.5" in result.stderr


@pytest.fixture
def with_videos(photos: Path) -> Path:
    """The pictures, and a GIF and an MP4 among them; what is in those nobody reads."""
    (photos / "a" / "gate one.gif").write_bytes(b"GIF89a")
    (photos / "b" / "gate.mp4").write_bytes(b"an mp4")
    return photos


def test_in_a_folder_videos_are_passed_over_with_a_hint(with_videos: Path, tmp_path: Path) -> None:
    result = run(with_videos, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (len(report["annotated"]), report["other_objects"]) == (2, 3)
    assert f"maskwatch annotate 'file://{with_videos}/a/gate one.gif' --out gate_one-annotated.mp4" in result.stderr


def test_a_video_alone_or_without_images_is_told_how(with_videos: Path, tmp_path: Path) -> None:
    alone = run(with_videos / "b" / "gate.mp4", "--out", tmp_path / "out").exception
    assert isinstance(alone, MaskwatchError)
    assert "gate.mp4 is a video: maskwatch annotate file:///" in str(alone)
    for file in with_videos.rglob("*.[pj]*g"):
        file.unlink()
    among = run(with_videos, "--out", tmp_path / "out").exception
    assert isinstance(among, MaskwatchError)
    assert "videos and no pictures; annotate each by itself: maskwatch annotate" in str(among)
    assert not (tmp_path / "out").exists()


def test_a_video_is_written_of_one_video_only(with_videos: Path, tmp_path: Path) -> None:
    def refused(source: Path, out: Path) -> str:
        result = run(source, "--out", out)
        assert isinstance(result.exception, MaskwatchError), result.output
        return str(result.exception)

    assert "holds several objects" in refused(with_videos, tmp_path / "out.mp4")
    assert "door.png is a picture" in refused(with_videos / "a" / "door.png", tmp_path / "out.mp4")
    video = with_videos / "b" / "gate.mp4"
    (tmp_path / "link.mp4").symlink_to(video)
    for out in (video, tmp_path / "link.mp4"):
        assert "is the source video" in refused(video, out)
    assert video.read_bytes() == b"an mp4"
    (tmp_path / "nothing").mkdir()
    assert "there is nothing at" in refused(tmp_path / "nothing", tmp_path / "out.mp4")


def test_faces_of_images_are_hidden(photos: Path, tmp_path: Path) -> None:
    (entry,) = json.loads(run(photos, "--out", tmp_path / "out", "--blur", "--limit", 1, "--json").stdout)["annotated"]
    (face,) = entry["faces"]
    # Inside the box, enlarged twice; below it lies nobody's face.
    x1, y1, x2, y2 = (round(2 * face[side]) for side in ("x1", "y1", "x2", "y2"))
    inside = (slice(y1 + 20, y2 - 20), slice(x1 + 20, x2 - 20))
    with Image.open(entry["picture"]) as drawn:
        after = np.asarray(drawn, float)
    before = np.asarray(Image.fromarray(astronaut()).resize((1024, 1024)), float)
    assert np.abs(after[inside] - before[inside]).mean() > 15
    assert np.abs(after[800:] - before[800:]).mean() < 8


def info(key: str, bucket: str = "s3://footage") -> ObjectInfo:
    return ObjectInfo(bucket, key, "etag", 1, datetime(2026, 1, 1, tzinfo=UTC))


KEYS = st.text(min_size=1) | st.sampled_from(
    ["../../etc/passwd", "a/../b.jpg", "..", "/", "a\\..\\b.jpg", "\0.png", "CON.jpg"]
)


@given(KEYS)
@example("-")
@example("../../-rf")
def test_no_key_leaves_the_folder(key: str) -> None:
    name = image_name(info(key))
    assert name == Path(name).name
    assert name.isascii()
    assert name.isprintable()
    assert not name.startswith((".", "-"))
    assert len(name) < 128
    assert Path("/out", name).resolve().parent == Path("/out")


@given(KEYS, KEYS)
def test_no_two_objects_share_a_name(one: str, other: str) -> None:
    names = {image_name(info(one)).lower(), image_name(info(other)).lower()}
    assert len(names) == len({one, other})
    assert image_name(info(one)) != image_name(info(one, bucket="s3://archive"))


def test_a_name_stays_recognisable() -> None:
    assert image_name(info("2026/05/lobby cam 1.jpg")).startswith("lobby_cam_1-")
