from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.domain import MaskwatchError
from workers.datasets import annotations, dataset

pytest.importorskip("sklearn", reason="the `train` layer is not installed")


def test_three_voc_classes_become_two_and_wrong_wearing_is_kept(tmp_path, write_scene):
    boxes = [(10, 10, 40, 50), (60, 10, 90, 50), (110, 10, 140, 50)]
    labels = ["with_mask", "without_mask", "mask_weared_incorrect"]
    write_scene(tmp_path, "crowd", list(zip(labels, boxes, strict=True)))
    labelled = annotations.read_boxes(tmp_path / "annotations" / "crowd.xml", 200, 120)
    assert [(entry.label, entry.worn_wrongly) for entry in labelled] == [(0, False), (1, False), (1, True)]
    assert labelled[0].box == (10, 10, 40, 50)
    assert labelled[0].size_px == 40


def test_boxes_are_clipped_to_the_image_and_those_outside_left_out(tmp_path, write_scene):
    write_scene(tmp_path, "edge", [("with_mask", (-5, 100, 30, 140)), ("with_mask", (300, 10, 330, 40))])
    labelled = annotations.read_boxes(tmp_path / "annotations" / "edge.xml", 200, 120)
    assert [entry.box for entry in labelled] == [(0, 100, 30, 120)]


def test_scene_faces_keep_surroundings_and_know_where_the_face_is(tmp_path, write_scene):
    write_scene(tmp_path, "crowd", [("with_mask", (80, 40, 100, 60)), ("without_mask", (0, 0, 20, 24))])
    samples = dataset.load([tmp_path]).samples
    whole = np.asarray(Image.open(tmp_path / "images" / "crowd.png"))
    for sample, (x1, y1, x2, y2) in zip(samples, [(80, 40, 100, 60), (0, 0, 20, 24)], strict=True):
        left, top, right, bottom = (round(value) for value in sample.box)
        assert np.array_equal(sample.pixels[top:bottom, left:right], whole[y1:y2, x1:x2])
    # In the middle it has room on all sides; at the corner the picture ends.
    assert samples[0].pixels.shape[:2] == (48, 48)
    assert samples[1].box[:2] == (0, 0)


def test_faces_too_small_to_be_labelled_reliably_are_left_out(tmp_path, write_scene):
    write_scene(
        tmp_path,
        "far",
        [("with_mask", (10, 10, 17, 17)), ("with_mask", (30, 10, 38, 18)), ("without_mask", (60, 10, 90, 50))],
    )
    assert sorted(sample.size_px for sample in dataset.load([tmp_path]).samples) == [8, 40]


def test_large_faces_are_kept_smaller_with_their_box(tmp_path, write_scene):
    write_scene(tmp_path, "near", [("with_mask", (100, 100, 420, 500)), ("without_mask", (10, 10, 40, 50))], (900, 800))
    near = dataset.load([tmp_path]).samples[0]
    assert near.box[3] - near.box[1] == pytest.approx(dataset.KEEP_FACE_PX, abs=1)
    assert near.size_px == 400


def test_class_folders_give_labels_and_the_manifest_gives_sources(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 2, "without_mask": 1, "mask_weared_incorrect": 1})
    (tmp_path / "manifest.csv").write_text("file,label,source\nwith_mask/face000.png,with_mask,a museum\n")
    faces = dataset.load([tmp_path])
    assert faces.counts() == {"with_mask": 2, "without_mask": 2}
    assert faces.sources() == {"a museum": 1, tmp_path.name: 3}
    assert [sample.name for sample in faces.samples if sample.worn_wrongly] == ["mask_weared_incorrect/face000.png"]


def test_unreadable_files_are_named_and_the_rest_is_read(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 2, "without_mask": 2})
    (tmp_path / "with_mask" / "empty.jpg").touch()
    (tmp_path / "with_mask" / "words.png").write_text("not a picture")
    faces = dataset.load([tmp_path])
    assert len(faces.samples) == 4
    assert [name for name, _ in faces.unreadable] == ["with_mask/empty.jpg", "with_mask/words.png"]
    assert all(reason for _, reason in faces.unreadable)


def test_a_folder_without_classes_says_what_it_needs(tmp_path):
    with pytest.raises(MaskwatchError, match=r"neither class folders \(with_mask, without_mask.* nor images/"):
        dataset.load([tmp_path])


def test_empty_class_folders_are_an_error(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 0, "without_mask": 0})
    with pytest.raises(MaskwatchError, match="holds no readable face"):
        dataset.load([tmp_path])


def test_only_unreadable_files_are_an_error_that_names_the_first(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 0, "without_mask": 0})
    (tmp_path / "with_mask" / "words.png").write_text("not a picture")
    with pytest.raises(MaskwatchError, match=r"1 files unreadable, the first is with_mask/words\.png"):
        dataset.load([tmp_path])


def test_an_unknown_class_folder_is_an_error_that_names_the_known_ones(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 1, "without_mask": 1, "scarf": 1})
    with pytest.raises(MaskwatchError, match=r"unknown class folder 'scarf' .* known: with_mask, without_mask"):
        dataset.load([tmp_path])


def test_an_unknown_label_in_an_annotation_is_an_error(tmp_path, write_scene):
    write_scene(tmp_path, "crowd", [("helmet", (10, 10, 40, 50))])
    with pytest.raises(MaskwatchError, match="unknown label 'helmet' in"):
        dataset.load([tmp_path])


def test_a_broken_annotation_is_an_error(tmp_path, write_scene):
    write_scene(tmp_path, "crowd", [("with_mask", (10, 10, 40, 50))])
    (tmp_path / "annotations" / "crowd.xml").write_text("<annotation><object>")
    with pytest.raises(MaskwatchError, match=r"crowd\.xml is not a Pascal VOC annotation"):
        dataset.load([tmp_path])


def test_a_image_without_annotation_is_an_error(tmp_path, write_scene):
    write_scene(tmp_path, "crowd", [("with_mask", (10, 10, 40, 50))])
    (tmp_path / "annotations" / "crowd.xml").unlink()
    with pytest.raises(MaskwatchError, match=r"crowd\.png has no annotation"):
        dataset.load([tmp_path])


def test_one_class_only_is_an_error(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 3})
    with pytest.raises(MaskwatchError, match="no face of class without_mask"):
        dataset.load([tmp_path])


def test_a_face_and_its_copy_with_a_pasted_mask_share_a_group_and_strangers_do_not(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 3, "without_mask": 3})
    bare = Image.open(tmp_path / "without_mask" / "face001.png")
    ImageDraw.Draw(bare).rectangle((4, 26, 36, 46), fill=(150, 200, 230))
    bare.save(tmp_path / "with_mask" / "pasted.png")
    groups = {sample.name: sample.group for sample in dataset.load([tmp_path]).samples}
    assert groups["with_mask/pasted.png"] == groups["without_mask/face001.png"]
    assert len(set(groups.values())) == len(groups) - 1


def test_the_split_keeps_groups_whole_and_spreads_classes(tmp_path, write_faces, write_scene):
    write_faces(tmp_path / "faces", {"with_mask": 40, "without_mask": 30})
    for number in range(20):
        boxes = [(10, 10, 40, 50), (60, 10, 90, 50), (110, 10, 140, 50)]
        labels = ["with_mask", "with_mask", "without_mask"]
        write_scene(tmp_path / "scenes", f"scene{number:02}", list(zip(labels, boxes, strict=True)))
    samples = dataset.load([tmp_path / "faces", tmp_path / "scenes"]).samples
    split = dataset.split_by_group(samples, seed=1)
    sides = (split.training, split.validation, split.held_out)
    assert sum(map(len, sides)) == len(samples)
    groups = [{sample.group for sample in side} for side in sides]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for label in (0, 1):
        for from_scene in (True, False):
            parts = [
                sum(sample.label == label and sample.from_scene == from_scene for sample in side) for side in sides
            ]
            assert parts[1] / sum(parts) == pytest.approx(1 / 10, abs=0.06)
            assert parts[2] / sum(parts) == pytest.approx(1 / 10, abs=0.06)
    assert dataset.split_by_group(samples, seed=1).held_out == split.held_out
    assert dataset.split_by_group(samples, seed=2).held_out != split.held_out  # identity tells: the same samples


def test_the_notebooks_split_is_scikit_learns_and_stratified_by_class(tmp_path, write_faces):
    from sklearn.model_selection import train_test_split

    samples = dataset.load([write_faces(tmp_path, {"with_mask": 40, "without_mask": 20})]).samples
    split = dataset.split_as_notebook(samples, seed=42)
    labels = [sample.label for sample in samples]
    training, held_out = train_test_split(samples, test_size=0.1, stratify=labels, random_state=42)
    assert split.training == training
    assert split.held_out == split.validation == held_out
    assert [sample.label for sample in held_out].count(1) == 2


def test_a_limit_keeps_the_proportions_of_the_classes(tmp_path, write_faces):
    samples = dataset.load([write_faces(tmp_path, {"with_mask": 40, "without_mask": 20})]).samples
    few = dataset.limited(samples, 30, seed=1)
    assert [sum(sample.label == label for sample in few) for label in (0, 1)] == [20, 10]
    assert dataset.limited(samples, 30, seed=1) == few
    assert dataset.limited(samples, 100, seed=1) == samples


def test_too_few_faces_to_split_is_an_error(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 3, "without_mask": 30})
    with pytest.raises(MaskwatchError, match="too few to hold out one part in 10"):
        dataset.split_by_group(dataset.load([tmp_path]).samples, seed=0)


def test_a_missing_folder_is_an_error():
    with pytest.raises(MaskwatchError, match="nowhere is neither a folder nor a CSV manifest"):
        dataset.load([Path("nowhere")])


def yolo(folder: Path, lines: str, names: str | None = "with_mask\nwithout_mask\nmask_weared_incorrect\n") -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    Image.new("RGB", (200, 100), "grey").save(folder / "images" / "crowd.png")
    (folder / "labels" / "crowd.txt").write_text(lines)
    if names is not None:
        (folder / "classes.txt").write_text(names)
    return folder


def test_yolo_boxes_are_parts_of_the_image_with_numbered_classes(tmp_path):
    folder = yolo(tmp_path / "scenes", "0 0.25 0.5 0.1 0.4\n\n2 0.75 0.5 0.2 0.2\n1 0.0 0.0 0.2 0.4\n")
    ((_, path),) = annotations.scene_pairs(folder)
    labelled = annotations.read_boxes(path, 200, 100)
    assert [(entry.label, entry.worn_wrongly) for entry in labelled] == [(0, False), (1, True), (1, False)]
    assert labelled[0].box == pytest.approx((40, 30, 60, 70))
    assert labelled[2].box == pytest.approx((0, 0, 20, 20))  # clipped at the corner
    assert dataset.load([folder]).counts() == {"with_mask": 1, "without_mask": 2}


@pytest.mark.parametrize(
    ("lines", "names", "message"),
    [
        ("0 0.5 0.5 0.1\n", "with_mask\n", "is not a YOLO annotation"),
        ("7 0.5 0.5 0.1 0.1\n", "with_mask\n", "is not a YOLO annotation of 1 classes"),
        ("0 a b c d\n", "with_mask\n", "is not a YOLO annotation"),
        ("0 0.5 0.5 0.1 0.1\n", "helmet\n", "unknown label 'helmet'"),
        ("0 0.5 0.5 0.1 0.1\n", None, "put a classes.txt there"),
    ],
)
def test_a_broken_yolo_annotation_says_what_is_wrong(tmp_path, lines, names, message):
    with pytest.raises(MaskwatchError, match=message):
        dataset.load([yolo(tmp_path / "scenes", lines, names)])


def test_a_box_outside_the_image_is_named(tmp_path, write_scene):
    good = [("with_mask", (10, 10, 40, 50)), ("without_mask", (60, 10, 90, 50))]
    write_scene(tmp_path, "edge", [*good, ("with_mask", (300, 10, 330, 40))])
    faces = dataset.load([tmp_path])
    assert len(faces.samples) == 2
    assert faces.unreadable == [("edge.xml#2", "box (300, 10, 330, 40) is outside the picture of 200×120")]


def manifest(folder: Path, text: str) -> Path:
    path = folder / "faces.csv"
    path.write_text(text)
    return path


def test_a_manifest_names_files_labels_groups_and_boxes(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 2, "without_mask": 1})
    path = manifest(
        tmp_path,
        "file,label,source,group,x1,y1,x2,y2\n"
        "with_mask/face000.png,with_mask,a museum,ann,,,,\n"
        "with_mask/face001.png,with_mask,,ann,5,6,25,40\n"
        "with_mask/face001.png,mask_weared_incorrect,,bob,100,6,125,40\n"
        "without_mask/face000.png,without_mask,,cleo,,,,\n"
        "gone.png,without_mask,,dora,,,,\n",
    )
    faces = dataset.load([path])
    assert [(sample.name, sample.label, sample.from_scene) for sample in faces.samples] == [
        ("with_mask/face000.png", 0, False),
        ("with_mask/face001.png#0", 0, True),
        ("without_mask/face000.png", 1, False),
    ]
    assert faces.samples[0].group == faces.samples[1].group != faces.samples[2].group
    assert faces.sources() == {"a museum": 1, "faces": 2}
    assert [name for name, _ in faces.unreadable] == ["with_mask/face001.png#1", "gone.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,kind\na.png,with_mask\n", "lacks the columns file and label"),
        ("file,label\na.png,helmet\n", "unknown label 'helmet' in .*faces.csv; known: with_mask"),
        ("file,label,x1,y1,x2,y2\nwith_mask/face000.png,with_mask,1,2,x,4\n", "is not x1,y1,x2,y2"),
    ],
)
def test_a_broken_manifest_says_what_is_wrong(tmp_path, write_faces, text, message):
    write_faces(tmp_path, {"with_mask": 1})
    with pytest.raises(MaskwatchError, match=message):
        dataset.load([manifest(tmp_path, text)])


def test_a_manifest_with_a_short_row_names_its_line(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 1})
    with pytest.raises(MaskwatchError, match=r"line 3 of .* lacks file or label"):
        dataset.load([manifest(tmp_path, "file,label\nwith_mask/face000.png,with_mask\nonly-a-file.png\n")])


def test_text_that_is_not_utf8_is_one_line(tmp_path):
    path = tmp_path / "faces.csv"
    path.write_bytes(b"file,label\n\xff\xfe.png,with_mask\n")
    with pytest.raises(MaskwatchError, match=r"faces.csv can't be read as CSV in UTF-8"):
        dataset.load([path])
    folder = yolo(tmp_path / "scenes", "")
    (folder / "labels" / "crowd.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(MaskwatchError, match=r"crowd.txt can't be read as text in UTF-8"):
        dataset.load([folder])
