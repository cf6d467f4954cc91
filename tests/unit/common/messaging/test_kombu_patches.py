"""What we change in kombu does what it is for; and kombu is still what these changes were written for."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport import redis as redis_transport

from common.domain import MaskwatchError
from common.messaging import kombu_patches, message_filter
from common.messaging.kombu_patches import list_name
from tests import ROOT

#: Every function of kombu's that is replaced, or called from what replaces it, or that finds what we put in its place;
#: and the beginning of the SHA-256 of its source. A new version of kombu: read what changed in each that a test names,
#: adapt common/messaging/kombu_patches.py, then put the new hash and the new version in.
STANDS_ON: dict[str, str] = {
    "kombu.transport.redis:QoS.append": "aad84d629d937931",
    "kombu.transport.redis:QoS.ack": "a05f28e127f4f04a",
    "kombu.transport.redis:QoS._remove_from_indices": "bc88c11e650c8824",
    "kombu.transport.redis:QoS.restore_visible": "947a45d32b26a5e7",
    "kombu.transport.redis:Mutex": "36ac88eb394cbf7b",
    "kombu.transport.redis:Channel._brpop_start": "24c5e342fddaffa7",
    "kombu.transport.redis:Channel._brpop_read": "5643c7e26598c5d4",
    "kombu.transport.redis:Channel._flush_brpop_reauth": "70284f351f64a2c1",
    "kombu.transport.redis:Channel._q_for_pri": "6fce69e510a3bbcf",
    "kombu.transport.virtual.base:QoS.append": "b1577a76dbe4b81d",
    "kombu.transport.virtual.base:QoS.ack": "7e8637eb2de3e43b",
    "kombu.transport.virtual.base:QoS.can_consume": "126344fb2c7651a6",
    "kombu.transport.virtual.base:Channel.qos": "785d09962388c396",
    "kombu.transport.virtual.base:Transport.create_channel": "eeac2f4539545701",
    "kombu.transport.virtual.base:Transport._deliver": "23eb22f3542e2d1b",
}
PYPROJECT = ROOT / "pyproject.toml"


@lru_cache
def sources(module: str) -> Mapping[str, str]:
    """The source of each function of a module, by its name in it. Read from the file: what is loaded may be patched."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for outer in ast.parse(text).body:
        for node in outer.body if isinstance(outer, ast.ClassDef) else [outer]:
            if isinstance(node, ast.FunctionDef):
                name = f"{outer.name}.{node.name}" if isinstance(outer, ast.ClassDef) else node.name
                found[name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def changed(stands_on: dict[str, str], read: Callable[[str], Mapping[str, str]] = sources) -> list[str]:
    """The functions whose source is another one than when the patches were written, each with its hash."""
    found = {}
    for name in stands_on:
        module, _, function = name.partition(":")
        found[name] = hashlib.sha256(read(module).get(function, "is gone").encode()).hexdigest()[:16]
    return [f"{name} is now {found[name]}" for name, known in stands_on.items() if found[name] != known]


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
    kombu_patches.apply()
    assert redis_transport.Channel.QoS is kombu_patches.QoS
    assert holding_one(redis_transport.Channel.QoS, monkeypatch).can_consume()


def test_with_kombus_own_count_a_worker_would_take_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control. Once this fails, kombu has learned it, and ours can go."""
    assert not holding_one(redis_transport.QoS, monkeypatch).can_consume()


# --- the door -----------------------------------------------------------------------------------------------


def test_the_door_is_where_kombu_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_transport.Transport, "Channel", redis_transport.Channel)
    message_filter.guard()
    assert redis_transport.Transport.Channel is kombu_patches.Channel
    assert kombu_patches.Channel.admit is message_filter.admit
    monkeypatch.delattr(redis_transport.Channel, "_flush_brpop_reauth")
    with pytest.raises(MaskwatchError, match="_flush_brpop_reauth"):
        message_filter.guard()


@pytest.mark.parametrize("priority", [0, 3])
def test_lists_are_called_what_kombu_calls_them(priority: int) -> None:
    channel = object.__new__(redis_transport.Channel)
    assert list_name("media", priority) == channel._q_for_pri("media", priority)


# --- kombu as we know it ------------------------------------------------------------------------------------


def test_what_the_patches_stand_on_has_not_changed() -> None:
    assert changed(STANDS_ON) == []


@pytest.mark.parametrize("name", STANDS_ON)
def test_a_function_that_has_changed_is_named(name: str) -> None:
    """The control: one more line in it, then none of it."""
    module, _, function = name.partition(":")
    here = {each.partition(":")[0]: dict(sources(each.partition(":")[0])) for each in STANDS_ON}
    here[module][function] += "\n        pass"
    assert [line.split(" ")[0] for line in changed(STANDS_ON, here.__getitem__)] == [name]
    del here[module][function]
    assert [line.split(" ")[0] for line in changed(STANDS_ON, here.__getitem__)] == [name]


def test_every_function_that_we_replace_is_among_them() -> None:
    replaced = {
        f"kombu.transport.redis:{ours.__name__}.{name}"
        for ours in (kombu_patches.QoS, kombu_patches.Channel)
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and hasattr(ours.__base__, name)
    }
    assert len(replaced) == 3 and replaced <= set(STANDS_ON)


def test_kombu_is_pinned_to_the_version_that_the_patches_were_written_for() -> None:
    needed = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    (pinned,) = (match[1] for name in needed if (match := re.fullmatch(r"kombu==([\d.]+)", name)))
    assert version("kombu") == pinned


def test_private_parts_of_kombu_are_used_in_one_file() -> None:
    root = PYPROJECT.parent
    users = {
        str(path.relative_to(root))
        for package in ("common", "producer", "workers")
        for path in (root / package).rglob("*.py")
        if re.search(r"^\s*(from|import) kombu\b(?!\.exceptions)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert users == {"common/messaging/kombu_patches.py"}
