"""`maskwatch pipelines list` tells an analyst how far the classifier behind a figure can be believed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from common.catalog import places
from common.cli import cli
from common.models import figures
from common.models.figures import Confusion, keep_confusion
from tests.pipelines import default_spec

SPEC = default_spec()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    confusion = Confusion("compact", SPEC.classifier.sha256, (96, 4, 7), (1, 99, 3), SPEC.uncertain_below, "200 faces")
    keep_confusion(tmp_path / "figures.json", confusion)
    monkeypatch.setattr(figures, "SHIPPED", tmp_path / "figures.json")
    figures._shipped.cache_clear()
    yield confusion
    figures._shipped.cache_clear()


def test_a_pipeline_shows_how_often_its_classifier_is_right(kept, session):
    places.ensure_pipeline(session, SPEC)
    places.ensure_pipeline(session, replace(SPEC, uncertain_below=0.9))
    session.commit()
    result = CliRunner().invoke(cli, ["pipelines", "list", "--json"], catch_exceptions=False)
    known, unknown = json.loads(result.stdout)
    assert known["classifier_confusion"]["with_mask"] == [96, 4, 7]
    assert known["classifier_confusion"]["data"] == "200 faces"
    # Measured with another threshold for uncertain faces: no figure rather than a wrong one.
    assert unknown["classifier_confusion"] is None
    table = CliRunner().invoke(cli, ["pipelines", "list"], catch_exceptions=False).stdout
    assert "96.0 % / 99.0 %" in table
