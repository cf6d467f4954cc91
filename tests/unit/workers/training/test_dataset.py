from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.domain import MaskwatchError
from workers.training import dataset

pytest.importorskip("sklearn", reason="the `train` layer is not installed")


def test_three_voc_classes_become_two_and_wrong_wearing_is_kept(tmp_path, write_scene):
    boxes = [(10, 10, 40, 50), (60, 10, 90, 50), (110, 10, 140, 50)]
    labels = ["with_mask", "without_mask", "mask_weared_incorrect"]
    write_scene(tmp_path, "crowd", list(zip(labels, boxes, strict=True)))
    labelled = dataset.read_voc(tmp_path / "annotations" / "crowd.xml", 200, 120)
    assert [(entry.label, entry.worn_wrongly) for entry in labelled] == [(0, False), (1, False), (1, True)]
    assert labelled[0].box == (10, 10, 40, 50)
    assert labelled[0].size_px == 40


def test_boxes_are_clipped_to_the_picture_and_those_outside_left_out(tmp_path, write_scene):
    write_scene(tmp_path, "edge", [("with_mask", (-5, 100, 30, 140)), ("with_mask", (300, 10, 330, 40))])
    labelled = dataset.read_voc(tmp_path / "annotations" / "edge.xml", 200, 120)
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
    with pytest.raises(MaskwatchError, match=r"crowd\.xml is no Pascal VOC annotation"):
        dataset.load([tmp_path])


def test_a_picture_without_annotation_is_an_error(tmp_path, write_scene):
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
    training, validation = dataset.split(samples, 5, seed=1)
    assert len(training) + len(validation) == len(samples)
    assert not {sample.group for sample in training} & {sample.group for sample in validation}
    for label in (0, 1):
        for from_scene in (True, False):
            parts = [
                sum(sample.label == label and sample.from_scene == from_scene for sample in side)
                for side in (training, validation)
            ]
            assert parts[1] / sum(parts) == pytest.approx(1 / 5, abs=0.06)
    assert dataset.split(samples, 5, seed=1)[1] == validation
    assert dataset.split(samples, 5, seed=2)[1] != validation  # the same samples in memory, so identity tells


def test_too_few_faces_to_split_is_an_error(tmp_path, write_faces):
    write_faces(tmp_path, {"with_mask": 3, "without_mask": 30})
    with pytest.raises(MaskwatchError, match="too few to hold out one part in 5"):
        dataset.split(dataset.load([tmp_path]).samples, 5, seed=0)


def test_a_missing_folder_is_an_error():
    with pytest.raises(MaskwatchError, match="nowhere is no folder"):
        dataset.load([Path("nowhere")])
