"""What our Celery app changes in the libraries below it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport import redis as redis_transport

from common import celery_app


def holding_one(kind: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A count of messages in hand that holds one of at most one, and whose Redis is gone."""
    channel = SimpleNamespace(do_restore=False, unacked_key="unacked", unacked_index_key="unacked_index")
    counted = kind(channel, prefetch_count=1)
    counted._delivered["tag"] = object()

    def gone(*args: Any) -> Any:
        raise ConnectionError("Redis is gone")

    monkeypatch.setattr(counted, "_remove_from_indices", gone)
    assert not counted.can_consume()
    with pytest.raises(ConnectionError):
        counted.ack("tag")
    return counted


def test_a_message_that_redis_could_not_be_told_of_is_not_in_hand_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redis_transport.Channel.QoS is celery_app._QoS
    assert holding_one(redis_transport.Channel.QoS, monkeypatch).can_consume()


def test_with_kombus_own_count_a_worker_would_take_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control. Once this fails, kombu has learned it, and ours can go."""
    assert not holding_one(redis_transport.QoS, monkeypatch).can_consume()
