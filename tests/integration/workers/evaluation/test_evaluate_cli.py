"""`maskwatch evaluate` as people type it, on scenes and faces small enough to be quick."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from common.models.figures import read_confusions
from common.models.manifest import MODELS
from common.sample.source_images import astronaut
from common.settings import PipelineSettings
from tests import commands

#: The classifier that a new installation has.
CLASSIFIER = PipelineSettings.model_fields["classifier"].default

pytest.importorskip("sklearn", reason="the `train` layer is not installed")


def maskwatch(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with these settings instead of those of the person who runs the tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKWATCH_")}
    return commands.run(("evaluate", *map(str, arguments)), environment | settings, None, timeout=300)


def refusal(*arguments: str | Path) -> str:
    """The one line of an error that a person can put right."""
    result = maskwatch(*arguments)
    assert result.returncode == 1, result.stdout
    (line,) = result.stderr.splitlines()
    return line


def is_image(path: Path) -> bool:
    with Image.open(path) as opened:
        return opened.format == "PNG" and min(opened.size) > 100


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    """A photograph with one face, which every detector finds."""
    return Image.fromarray(astronaut())


#: Where the face of the photograph is.
FACE = (170, 75, 280, 200)


@pytest.fixture
def scenes(tmp_path: Path, portrait: Image.Image) -> Path:
    """The photograph, the same mirrored with a mask claimed, and a broken file."""
    folder = tmp_path / "scenes"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    x1, y1, x2, y2 = FACE
    mirrored = (portrait.width - x2, y1, portrait.width - x1, y2)
    for name, image, label, box in (
        ("a", portrait, "without_mask", FACE),
        ("b", portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "mask_weared_incorrect", mirrored),
        ("c", None, "with_mask", FACE),
    ):
        path = folder / "images" / f"{name}.png"
        path.write_bytes(b"no picture") if image is None else image.save(path)
        corners = "".join(
            f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        (folder / "annotations" / f"{name}.xml").write_text(
            f"<annotation><object><name>{label}</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    return folder


@pytest.fixture
def faces(tmp_path: Path, portrait: Image.Image) -> Path:
    """A bare face, four times; as often a face whose lower half is covered."""
    folder = tmp_path / "faces"
    for label in ("with_mask", "without_mask"):
        (folder / label).mkdir(parents=True)
        for number in range(4):
            face = portrait.crop((FACE[0] - 3 * number, FACE[1] - 3 * number, FACE[2], FACE[3]))
            if label == "with_mask":
                face.paste((235, 240, 245), (10, face.height * 11 // 20, face.width - 10, face.height - 4))
            face.save(folder / label / f"{number}.png")
    (folder / "with_mask" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_scenes_give_figures_plots_and_mistakes(scenes, tmp_path):
    out = tmp_path / "figures"
    out.mkdir()
    (out / "missed.png").write_bytes(b"of an earlier run")
    result = maskwatch("scenes", scenes, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["images"], values["labelled_faces"], values["recall"]) == (2, 2, 1)
    assert [entry["file"] for entry in values["unreadable"]] == ["c.png"]
    assert "c.png" in result.stderr
    assert values["judged"]["worn_wrongly"]["matched"] == 1
    assert values["pipeline"]["detector"]["name"] == "centerface"
    assert json.loads((out / "metrics.json").read_text()) == values
    assert all(is_image(out / f"{name}.png") for name in ("reliability", "confusion", "precision_recall"))
    assert not (out / "missed.png").exists(), "nothing was missed: a grid of an earlier run would mislead"


def test_another_detector_runs_at_its_own_threshold_and_people_read_tables(scenes):
    result = maskwatch("scenes", scenes, "--detector", "haar")
    assert result.returncode == 0, result.stderr
    # A title breaks its line where the folder's name is long.
    assert f"haar at {MODELS['haar'].threshold:g}, {CLASSIFIER}" in " ".join(result.stdout.split())
    for words in ("calibration error", "0.6 (configured)", "average precision", "masks worn wrongly"):
        assert words in result.stdout


def test_faces_give_scikit_learns_report_plots_and_what_to_keep(faces, tmp_path):
    out, kept = tmp_path / "figures", tmp_path / "kept.json"
    result = maskwatch("faces", faces, "--out", out, "--keep-confusion", kept)
    assert result.returncode == 0, result.stderr
    assert "precision    recall  f1-score   support" in result.stdout
    assert "with_mask/torn.jpg" in result.stderr
    values = json.loads((out / "metrics.json").read_text())
    assert [entry["file"] for entry in values["unreadable"]] == ["with_mask/torn.jpg"]
    assert values["all"]["faces"] == 8
    assert is_image(out / "reliability.png") and is_image(out / "confusion.png")
    (confusion,) = read_confusions(kept).values()
    assert (confusion.classifier, confusion.faces, confusion.data) == (CLASSIFIER, 8, "8 faces of faces")
    (configured,) = (row for row in values["uncertain"] if row["configured"])
    assert [list(confusion.with_mask[:2]), list(confusion.without_mask[:2])] == configured["confusion"]
    assert sum(confusion.with_mask) == sum(confusion.without_mask) == 4


def test_only_the_faces_that_a_file_names_are_measured(faces, tmp_path):
    held_out, kept = tmp_path / "held_out.txt", tmp_path / "kept.json"
    held_out.write_text("with_mask/0.png\nwithout_mask/2.png\nwithout_mask/3.png\n")
    result = maskwatch("faces", faces, "--only", held_out, "--keep-confusion", kept, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["all"]["faces"] == 3
    (confusion,) = read_confusions(kept).values()
    assert (confusion.faces, confusion.data) == (3, "3 faces of faces")
    held_out.write_text("with_mask/0.png\n")
    assert "names 1 of these faces, but not of both classes" in maskwatch("faces", faces, "--only", held_out).stderr


def test_faces_can_be_seen_scaled_down(faces):
    result = maskwatch("faces", faces, "--at", "20", "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["at_px"] == 20
    assert list(values["sizes"]) == ["16–24"]


def test_detectors_stand_side_by_side(scenes, tmp_path):
    out = tmp_path / "figures"
    result = maskwatch("detectors", scenes, "--only", "centerface", "--only", "haar", "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert list(values["detectors"]) == ["centerface", "haar"]
    for row in values["detectors"].values():
        assert (row["images"], row["labelled_faces"]) == (2, 2)
        assert row["sizes"]["≥64"]["recall"] == row["recall"] > 0
        assert 0 < row["average_precision"] <= 1
        assert row["median_ms"] > 0
    assert is_image(out / "precision_recall.png")
    assert json.loads((out / "metrics.json").read_text()) == values


def test_detectors_agree_with_the_pipeline_on_what_is_found(scenes):
    alone = json.loads(maskwatch("detectors", scenes, "--only", "centerface", "--json").stdout)
    whole = json.loads(maskwatch("scenes", scenes, "--json").stdout)
    row = alone["detectors"]["centerface"]
    for name in ("recall", "precision", "detections"):
        assert row[name] == whole[name]


def test_what_can_be_put_right_is_one_line(scenes, faces, tmp_path):
    assert refusal("detectors", scenes, "--only", "yolo").startswith("error: unknown detector 'yolo'; known: ")
    assert refusal("scenes", scenes, "--detector", "yolo").startswith("error: unknown detector 'yolo'; known: ")
    assert refusal("faces", faces, "--classifier", "haar").startswith("error: unknown classifier 'haar'; known: ")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not a scene folder" in refusal("detectors", empty, "--only", "centerface")
    assert "is not a scene folder" in refusal("scenes", empty)
    assert "holds neither class folders" in refusal("faces", empty)


def test_one_class_alone_is_one_line(faces):
    for path in (faces / "without_mask").iterdir():
        path.unlink()
    assert "no face of class without_mask" in maskwatch("faces", faces).stderr


def test_a_pinned_model_that_differs_is_one_line(scenes):
    result = maskwatch("scenes", scenes, MASKWATCH_PIPELINE__CLASSIFIER=f"{CLASSIFIER}@{64 * '0'}")
    assert result.returncode == 1, result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: model {CLASSIFIER} here has SHA-256 ")
    assert "the pipeline wants 000000000000…" in line


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(scenes, tmp_path):
    (tmp_path / "file").touch()
    line = refusal("scenes", scenes, "--out", tmp_path / "file" / "out")
    assert line == f"error: {tmp_path / 'file' / 'out'} can't be made: Not a directory"


def test_weights_that_are_not_here_are_named_before_the_others_are_run(scenes, tmp_path):
    only = ("--only", "centerface", "--only", "mtcnn")
    result = maskwatch("detectors", scenes, *only, MASKWATCH_MODELS_DIR=str(tmp_path / "no-models"))
    assert (result.returncode, result.stdout) == (1, "")
    assert "maskwatch models pull mtcnn" in result.stderr
