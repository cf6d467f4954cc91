from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from tests.temperature import apply_temperature
from workers.evaluation.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    brier_score,
    calibration_error,
    calibration_figures,
    fit_temperature,
    negative_log_likelihood,
    reliability_bins,
)


def two_columns(p_with_mask):
    p_with_mask = np.asarray(p_with_mask, np.float64)
    return np.stack([p_with_mask, 1 - p_with_mask], axis=1)


@pytest.fixture(scope="module")
def calibrated():
    """A classifier that means what it says: each label is drawn with the probability it gave."""
    rng = np.random.default_rng(7)
    probabilities = two_columns(rng.beta(0.4, 0.4, 20_000))
    labels = (rng.random(len(probabilities)) < probabilities[:, 1]).astype(np.int64)
    return probabilities, labels


def test_a_calibrated_classifier_has_no_error_to_speak_of_and_temperature_1(calibrated):
    probabilities, labels = calibrated
    assert calibration_error(reliability_bins(probabilities, labels)) < 0.01
    assert fit_temperature(probabilities, labels) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sharpened", [0.4, 2.5])
def test_a_classifier_that_is_too_sure_or_not_sure_enough_is_brought_back(calibrated, sharpened):
    probabilities, labels = calibrated
    spoilt = apply_temperature(probabilities, sharpened)
    before = calibration_error(reliability_bins(spoilt, labels))
    assert before > 0.05, "nothing to repair would prove nothing"
    temperature = fit_temperature(spoilt, labels)
    assert temperature == pytest.approx(1 / sharpened, rel=0.05)
    repaired = apply_temperature(spoilt, temperature)
    assert calibration_error(reliability_bins(repaired, labels)) < 0.01
    assert negative_log_likelihood(repaired, labels) < negative_log_likelihood(spoilt, labels)
    assert brier_score(repaired, labels) < brier_score(spoilt, labels)


def test_too_sure_shows_as_gaps_above_0_and_too_modest_below(calibrated):
    probabilities, labels = calibrated
    for temperature, sign in ((0.4, 1), (2.5, -1)):
        bins = reliability_bins(apply_temperature(probabilities, temperature), labels)
        filled = [entry.gap for entry in bins if entry.count > 300 and entry.low > 0.6]
        assert filled and all(sign * gap > 0 for gap in filled)


def test_the_temperature_found_has_the_lowest_loss_of_its_surroundings(calibrated):
    probabilities, labels = calibrated
    spoilt = apply_temperature(probabilities, 0.5)
    best = fit_temperature(spoilt, labels)
    loss = negative_log_likelihood(apply_temperature(spoilt, best), labels)
    for other in (best * 0.97, best * 1.03):
        assert negative_log_likelihood(apply_temperature(spoilt, other), labels) > loss


def test_labels_without_a_best_temperature_give_an_end_of_the_range():
    probabilities = two_columns([0.9, 0.8, 0.3])
    assert fit_temperature(probabilities, np.array([0, 0, 1])) == pytest.approx(LOWEST_TEMPERATURE)
    assert fit_temperature(probabilities, np.array([1, 1, 0])) == pytest.approx(HIGHEST_TEMPERATURE)


def test_probabilities_of_exactly_0_and_1_are_borne():
    probabilities = two_columns([1.0, 1.0, 0.0]).astype(np.float32)
    labels = np.array([0, 1, 1])
    assert LOWEST_TEMPERATURE < fit_temperature(probabilities, labels) <= HIGHEST_TEMPERATURE
    assert np.isfinite(negative_log_likelihood(probabilities, labels))
    assert apply_temperature(probabilities, 1) == pytest.approx(probabilities, abs=1e-30)


@given(
    p_with_mask=hypothesis_numpy.arrays(np.float32, st.integers(1, 30), elements=st.floats(0, 1, width=32)),
    temperature=st.floats(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE),
)
def test_a_temperature_changes_neither_the_class_nor_the_order_of_faces(p_with_mask, temperature):
    probabilities = two_columns(p_with_mask)
    scaled = apply_temperature(probabilities, temperature)
    assert scaled.sum(axis=1) == pytest.approx(1)
    order = np.argsort(probabilities[:, 0], kind="stable")
    assert (np.diff(scaled[order, 0]) >= -1e-12).all()
    decided = np.abs(probabilities[:, 0] - 0.5) > 1e-6
    assert (scaled.argmax(axis=1) == probabilities.argmax(axis=1))[decided].all()


def test_bins_by_hand():
    probabilities = two_columns([0.7, 0.72, 0.3, 0.98, 1.0, 0.5])
    labels = np.array([0, 1, 1, 0, 0, 1])
    bins = reliability_bins(probabilities, labels, bins=10)
    filled = {(round(entry.low, 1), round(entry.high, 1)): entry for entry in bins if entry.count}
    # An upper edge belongs to its bin; a tie goes to the first class.
    assert {edges: entry.count for edges, entry in filled.items()} == {
        (0.4, 0.5): 1, (0.6, 0.7): 2, (0.7, 0.8): 1, (0.9, 1.0): 2,
    }  # fmt: skip
    assert filled[(0.4, 0.5)].gap == pytest.approx(0.5)
    assert filled[(0.6, 0.7)].gap == pytest.approx(0.7 - 1)
    assert filled[(0.7, 0.8)].gap == pytest.approx(0.72)
    assert filled[(0.9, 1.0)].gap == pytest.approx(-0.01)
    assert calibration_error(bins) == pytest.approx((0.5 + 2 * 0.3 + 0.72 + 2 * 0.01) / 6)


def test_scores_by_hand():
    probabilities, labels = two_columns([0.9, 0.4]), np.array([0, 0])
    assert brier_score(probabilities, labels) == pytest.approx((0.01 + 0.36) / 2)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(-np.log([0.9, 0.4]).mean())


def test_figures_are_ready_for_json_with_and_without_faces():
    figures = calibration_figures(two_columns([0.9, 0.4]), np.array([0, 0]))
    assert [entry["count"] for entry in json.loads(json.dumps(figures))["bins"]] == [1, 1]
    assert figures["expected_calibration_error"] == pytest.approx((0.1 + 0.6) / 2)
    nothing = calibration_figures(np.empty((0, 2)), np.empty(0, np.int64))
    assert nothing == {
        "expected_calibration_error": None, "brier_score": None, "negative_log_likelihood": None, "bins": [],
    }  # fmt: skip


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"probabilities have shape \(3, 2\); valid: \(2, classes\)"):
        reliability_bins(two_columns([0.1, 0.2, 0.3]), np.array([0, 1]))
    with pytest.raises(ValueError, match="labels reach from 0 to 2; valid: 0 to 1"):
        brier_score(two_columns([0.1, 0.2]), np.array([0, 2]))
    with pytest.raises(ValueError, match="without faces"):
        fit_temperature(np.empty((0, 2)), np.empty(0, np.int64))
