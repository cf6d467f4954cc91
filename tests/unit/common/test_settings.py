"""Settings under the names that they had in the version before."""

from __future__ import annotations

import pytest

from common import settings
from common.settings import Settings


def test_an_earlier_name_works_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASKWATCH_DISPATCH__LOOK_SECONDS", "2.5")
    monkeypatch.setenv("MASKWATCH_DISPATCH__INTERVAL_SECONDS", "0.5")
    dispatch = Settings().dispatch
    assert (dispatch.poll_seconds, dispatch.interval_seconds) == (2.5, 0.5)
    assert capsys.readouterr().err == (
        "warning: MASKWATCH_DISPATCH__LOOK_SECONDS is now MASKWATCH_DISPATCH__POLL_SECONDS; the next version ignores "
        "MASKWATCH_DISPATCH__LOOK_SECONDS\n"
    )


def test_the_new_name_counts_where_both_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKWATCH_WORKER__READ_AHEAD", "1")
    monkeypatch.setenv("MASKWATCH_WORKER__PREFETCH_OBJECTS", "2")
    assert Settings().worker.prefetch_objects == 2


def test_every_earlier_name_leads_to_a_setting_that_is_there() -> None:
    for section, field in settings._EARLIER_NAMES.values():
        assert field in type(getattr(Settings(), section)).model_fields
