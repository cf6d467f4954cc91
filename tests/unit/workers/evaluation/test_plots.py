from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from workers.evaluation import plots
from workers.evaluation.calibration import reliability_bins


def pixels(path):
    """A picture that was drawn, as an array; fails where the file is no whole PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def shows(image, colour):
    """Whether a colour, as #rrggbb, is in the picture."""
    wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return bool((image == wanted).all(axis=2).any())


def test_curves_show_what_the_history_has(tmp_path):
    history = [
        {"epoch": 1, "loss": 0.7, "validation_loss": 0.6, "validation_balanced_accuracy": 0.8, "seconds": 3},
        {"epoch": 2, "loss": 0.4, "validation_loss": 0.5, "validation_balanced_accuracy": 0.9, "seconds": 3},
    ]
    plots.curves(tmp_path / "curves.png", history)
    drawn = pixels(tmp_path / "curves.png")
    assert shows(drawn, plots.COLOURS[0]) and shows(drawn, plots.COLOURS[1])
    # `seconds` is neither a loss nor an accuracy; a third line would be of a third colour.
    assert not shows(drawn, plots.COLOURS[2])


def test_a_history_without_epochs_is_an_empty_plot(tmp_path):
    plots.curves(tmp_path / "curves.png", [])
    assert not shows(pixels(tmp_path / "curves.png"), plots.COLOURS[0])


def test_a_confusion_matrix_is_darker_where_more_lie(tmp_path):
    plots.confusion(tmp_path / "right.png", [[99, 1], [1, 99]])
    plots.confusion(tmp_path / "empty.png", [[0, 0], [0, 0]])
    assert pixels(tmp_path / "right.png").mean() < pixels(tmp_path / "empty.png").mean()


def test_reliability_shows_the_filled_bins(tmp_path):
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4]])
    plots.reliability(tmp_path / "some.png", reliability_bins(probabilities, np.array([0, 0])), "faces")
    assert shows(pixels(tmp_path / "some.png"), plots.ORANGE)
    plots.reliability(tmp_path / "none.png", reliability_bins(np.empty((0, 2)), np.empty(0, np.int64)))
    assert pixels(tmp_path / "none.png").mean() > pixels(tmp_path / "some.png").mean()


def test_precision_against_recall_has_a_line_per_name(tmp_path):
    line = ([0.1, 0.5, 0.6], [1.0, 0.9, 0.5])
    plots.precision_recall(tmp_path / "curves.png", {"a": line, "b": line}, {"a": (0.5, 0.9)}, "scenes")
    drawn = pixels(tmp_path / "curves.png")
    assert shows(drawn, plots.COLOURS[1]) and not shows(drawn, plots.COLOURS[2])
    plots.precision_recall(tmp_path / "none.png", {}, {})
    assert not shows(pixels(tmp_path / "none.png"), plots.COLOURS[0])


def test_a_grid_shows_faces_of_any_size_and_takes_words_as_they_are(tmp_path):
    crops = [np.full((side, side + 3, 3), (250, 10, 10), np.uint8) for side in range(1, 11)]
    plots.grid(tmp_path / "grid.png", crops, ["a $broken\\formula_ 0.93"] * 10, "100 $")
    assert shows(pixels(tmp_path / "grid.png"), "#fa0a0a")


def test_a_grid_of_nothing_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="at least one face"):
        plots.grid(tmp_path / "grid.png", [], [])
    assert list(tmp_path.iterdir()) == []


def test_the_same_figures_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plots.confusion(tmp_path / name, [[5, 1], [2, 7]], "twice")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_figure_stays_open_and_no_setting_changes(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.confusion(tmp_path / "confusion.png", [[5, 1], [2, 7]])
    assert dict(mpl.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
