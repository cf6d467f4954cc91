from __future__ import annotations

from dataclasses import replace

import pytest

from common.domain import MaskwatchError
from common.models import figures
from common.models.figures import Confusion, confusion_of, keep_confusion, read_confusions
from common.models.manifest import MODELS
from tests.pipelines import default_spec

SPEC = default_spec()
KEPT = Confusion("compact", SPEC.classifier.sha256, (90, 5, 5), (2, 78, 0), SPEC.uncertain_below, "180 faces")


def test_what_is_kept_is_read_again(tmp_path):
    path = tmp_path / "figures.json"
    other = replace(KEPT, classifier="xception", sha256="b" * 64)
    keep_confusion(path, other)
    keep_confusion(path, KEPT)
    assert read_confusions(path) == {KEPT.sha256: KEPT, other.sha256: other}


def test_new_weights_of_a_classifier_take_the_place_of_the_old(tmp_path):
    path = tmp_path / "figures.json"
    keep_confusion(path, KEPT)
    newer = replace(KEPT, sha256="c" * 64)
    keep_confusion(path, newer)
    assert read_confusions(path) == {newer.sha256: newer}
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def test_shares_leave_out_uncertain_faces():
    assert KEPT.faces == 180
    assert KEPT.right_with_mask == pytest.approx(90 / 95)
    assert KEPT.right_without_mask == pytest.approx(78 / 80)
    assert replace(KEPT, with_mask=(0, 0, 9)).right_with_mask is None


def test_a_pipeline_finds_the_figures_of_its_own_weights_and_threshold_only(tmp_path, monkeypatch):
    keep_confusion(tmp_path / "figures.json", KEPT)
    monkeypatch.setattr(figures, "SHIPPED", tmp_path / "figures.json")
    figures._shipped.cache_clear()
    try:
        assert confusion_of(SPEC) == KEPT
        assert confusion_of(replace(SPEC, uncertain_below=0.9)) is None
        assert confusion_of(replace(SPEC, classifier=replace(SPEC.classifier, sha256="d" * 64))) is None
    finally:
        figures._shipped.cache_clear()


@pytest.mark.parametrize("content", ["{", "{}x", '[{"classifier": "compact"}]', "[3]", '{"a": 1}'])
def test_a_file_that_holds_something_else_is_named(tmp_path, content):
    path = tmp_path / "figures.json"
    path.write_text(content)
    with pytest.raises(MaskwatchError, match=r"figures\.json does not hold confusion matrices"):
        read_confusions(path)


def test_counts_are_counts():
    with pytest.raises(ValueError, match="with_mask is \\(1, 2\\); valid: three counts"):
        replace(KEPT, with_mask=(1, 2))


def test_the_shipped_file_speaks_of_weights_that_the_manifest_pins():
    for confusion in read_confusions(figures.SHIPPED).values():
        assert MODELS[confusion.classifier].sha256 == confusion.sha256
        assert confusion.faces > 0
