from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from common.domain import MaskwatchError
from workers.datasets.annotations import LabelledBox
from workers.datasets.dataset import load
from workers.evaluation.faces import (
    WORST,
    Mistake,
    ScoredDetections,
    balanced_accuracy,
    evaluate_faces,
    match,
    said,
    size_bin,
    two_probabilities,
    uncertain_bands,
    worst,
)

SQUARE = LabelledBox((0, 0, 10, 10), 0)


def scored(*detections: tuple[float, bool]) -> ScoredDetections:
    return ScoredDetections([score for score, _ in detections], [hit for _, hit in detections])


def test_two_detections_of_one_face_count_once_and_the_surer_one_counts():
    assert match([SQUARE], [(0, 0, 10, 9), (0, 0, 10, 8)], [0.6, 0.8]) == [1]


def test_one_detection_matches_one_face_only():
    assert match([SQUARE, LabelledBox((0, 0, 10, 9), 0)], [(0, 0, 10, 10)], [0.9]) == [0, None]


def test_a_detection_takes_the_free_face_it_overlaps_next_best():
    labelled = [SQUARE, LabelledBox((2, 0, 12, 10), 0)]
    assert match(labelled, [(0, 0, 10, 10), (1, 0, 10, 10)], [0.9, 0.8]) == [0, 1]


def test_less_than_half_an_overlap_is_no_match():
    assert match([SQUARE], [(0, 0, 10, 4.9)], [0.9]) == [None]
    assert match([SQUARE], [(0, 0, 10, 5)], [0.9]) == [0]


def test_images_without_labels_or_without_detections_match_nothing():
    assert match([], [(0, 0, 10, 10)], [0.9]) == []
    assert match([SQUARE], [], []) == [None]


@pytest.mark.parametrize(
    ("size_px", "name"),
    [
        (0.5, "<16"), (15.99, "<16"), (16, "16–24"), (23.99, "16–24"), (24, "24–32"), (31.99, "24–32"), (32, "32–64"),
        (63.99, "32–64"), (64, "≥64"), (9000, "≥64"),
    ],
)  # fmt: skip
def test_size_bins_are_half_open(size_px, name):
    assert size_bin(size_px) == name


def test_balanced_accuracy_counts_classes_alike():
    assert balanced_accuracy([[9, 1], [1, 1]]) == pytest.approx(0.7)
    assert balanced_accuracy([[9, 1], [0, 0]]) is None


def test_average_precision_by_hand():
    # Recall goes to 1/3 at precision 1 and to 2/3 at 2/3; the third face is never found.
    detections = scored((0.9, True), (0.8, False), (0.7, True))
    assert detections.curve(3) == ([1 / 3, 1 / 3, 2 / 3], [1, 1 / 2, 2 / 3])
    assert detections.average_precision(3) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)


def test_average_precision_takes_the_best_precision_to_come():
    # At the first step precision is 0, but recall 1/2 can be had at 1/2 and recall 1 at 2/3.
    detections = scored((0.9, False), (0.8, True), (0.7, True))
    assert detections.average_precision(2) == pytest.approx(2 / 3)


def test_average_precision_of_nothing_found_and_of_everything_found():
    assert scored().average_precision(4) == 0
    assert scored((0.9, False)).average_precision(4) == 0
    assert scored((0.9, True), (0.2, True)).average_precision(2) == 1
    with pytest.raises(ValueError, match="labelled is 0"):
        scored((0.9, False)).average_precision(0)


def test_detections_of_equal_score_come_in_together_in_whatever_order_they_were_counted():
    one, other = scored((0.5, True), (0.5, False)), scored((0.5, False), (0.5, True))
    assert one.curve(1) == other.curve(1) == ([1.0], [0.5])
    assert one.average_precision(1) == other.average_precision(1) == 0.5


def test_a_image_is_counted_by_what_was_matched():
    detections = ScoredDetections()
    detections.add([0.9, 0.4, 0.7], [2, None])
    assert (detections.scores, detections.hits) == ([0.9, 0.4, 0.7], [False, False, True])


def test_a_tie_is_with_mask_as_in_production():
    assert (said(0.5), said(0.49999)) == (0, 1)


def test_what_becomes_uncertain_and_how_often_the_rest_is_right():
    probabilities = two_probabilities([0.95, 0.55, 0.2, 0.35])
    labels = np.array([0, 1, 1, 0])
    rows = uncertain_bands(probabilities, labels, configured=0.7)
    by_threshold = {row["below"]: row for row in rows}
    assert [row["below"] for row in rows if row["configured"]] == [0.7]
    assert (by_threshold[0.5]["uncertain_share"], by_threshold[0.5]["accuracy"]) == (0, 0.5)
    assert (by_threshold[0.6]["uncertain_share"], by_threshold[0.6]["accuracy"]) == (0.25, pytest.approx(2 / 3))
    assert by_threshold[0.7]["confusion"] == [[1, 0], [0, 1]]
    assert by_threshold[0.7]["balanced_accuracy"] == 1
    # Below 0.9 the only face without a mask is uncertain, too.
    assert by_threshold[0.9]["balanced_accuracy"] is None
    assert by_threshold[0.99] == {
        "below": 0.99, "configured": False, "uncertain_share": 1, "accuracy": None, "balanced_accuracy": None,
        "confusion": [[0, 0], [0, 0]],
    }  # fmt: skip


def test_a_threshold_between_those_of_the_table_has_its_own_row():
    rows = uncertain_bands(two_probabilities([0.7]), np.array([0]), configured=0.65)
    assert [row["below"] for row in rows if row["configured"]] == [0.65]
    assert [row["below"] for row in rows] == sorted(row["below"] for row in rows)


def test_the_worst_mistakes_are_kept_and_come_first():
    pixels = np.zeros((2, 2, 3), np.uint8)
    kept = worst([Mistake(pixels, badness, "") for badness in range(WORST + 5)])
    assert [mistake.badness for mistake in kept] == list(range(WORST + 4, 4, -1))


@pytest.fixture
def samples(tmp_path, write_faces, write_scene):
    write_faces(tmp_path / "faces", {"with_mask": 3, "without_mask": 2})
    write_scene(
        tmp_path / "scenes", "a", [("without_mask", (10, 10, 30, 30)), ("mask_weared_incorrect", (60, 10, 84, 36))]
    )
    return load([tmp_path / "faces", tmp_path / "scenes"]).samples


def always_with_mask(crops):
    return np.tile(np.float32([0.9, 0.1]), (len(crops), 1))


def test_figures_of_a_classifier_alone(samples):
    pytest.importorskip("sklearn", reason="the `train` layer is not installed")
    sizes: list[tuple[int, ...]] = []
    steps = []

    def classify(crops):
        sizes.extend(crop.shape[:2] for crop in crops)
        return always_with_mask(crops)

    results = evaluate_faces(samples, classify, on_faces=lambda done, total: steps.append((done, total)))
    figures = results.summary(uncertain_below=0.6)
    # Pictures of class folders whole, faces of scenes widened by a quarter, to whole pixels.
    assert sizes == [(48, 40)] * 5 + [(26, 26), (34, 30)]
    assert steps == [(7, 7)]
    assert figures["all"] == {"faces": 7, "balanced_accuracy": 0.5, "confusion": [[3, 0], [4, 0]]}
    assert figures["sizes"]["16–24"] == {"faces": 1, "balanced_accuracy": None, "confusion": [[0, 0], [1, 0]]}
    assert figures["worn_wrongly"] == {"faces": 1, "called_without_mask": 0}
    assert figures["calibration"]["expected_calibration_error"] == pytest.approx(0.9 - 3 / 7)
    assert figures["report"]["with_mask"]["precision"] == pytest.approx(3 / 7)
    assert "without_mask" in figures["report_text"]
    json.dumps(figures)


def test_the_report_is_scikit_learns_own(samples):
    metrics = pytest.importorskip("sklearn.metrics", reason="the `train` layer is not installed")
    answers = np.float32([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2]])
    figures = evaluate_faces(samples, lambda crops: answers).summary(0.6)
    ground_truth = [sample.label for sample in samples]
    expected = metrics.precision_recall_fscore_support(ground_truth, answers.argmax(axis=1))
    for label, name in enumerate(("with_mask", "without_mask")):
        row = figures["report"][name]
        found = [row["precision"], row["recall"], row["f1-score"], row["support"]]
        assert found == pytest.approx([part[label] for part in expected])


def test_faces_can_be_seen_as_small_as_cameras_give_them(samples):
    pytest.importorskip("sklearn", reason="the `train` layer is not installed")
    shapes: list[int] = []

    def classify(crops):
        shapes.extend(max(crop.shape[:2]) for crop in crops)
        return always_with_mask(crops)

    figures = evaluate_faces(samples, classify, face_px=12).summary(0.6)
    assert max(shapes) <= 17  # twelve pixels of face, and its surroundings
    assert list(figures["sizes"]) == ["<16"]
    at_20 = evaluate_faces(samples, classify, face_px=20).summary(0.6)["sizes"]
    assert {name: row["faces"] for name, row in at_20.items()} == {"16–24": 7}


def test_mistakes_are_shown_the_surest_first(samples):
    answers = np.float32([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.99, 0.01]])
    mistakes = evaluate_faces(samples, lambda crops: answers).mislabelled()
    assert [round(mistake.badness, 2) for mistake in mistakes] == [0.99, 0.8, 0.6]
    assert mistakes[0].words == "without_mask, called with_mask 0.99, 26 px: a.png#1"


def test_one_class_alone_is_refused(samples):
    with pytest.raises(MaskwatchError, match="none of the 3 faces is without_mask: measuring a classifier needs both"):
        evaluate_faces([sample for sample in samples if sample.label == 0], always_with_mask)


@pytest.mark.parametrize("command", ["train", "evaluate scenes", "evaluate faces", "evaluate detectors"])
def test_help_loads_no_model_runtime(command):
    code = (
        "import sys; from common.cli import cli; "
        f"cli({command.split()!r} + ['--help'], standalone_mode=False); "
        "sys.exit(sorted({'tensorflow', 'torch', 'onnxruntime', 'cv2', 'sklearn'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Example" in result.stdout
