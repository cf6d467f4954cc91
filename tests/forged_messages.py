"""Messages as somebody would write them who can reach Redis, and not the ledger: for the queues' lists, raw."""

from __future__ import annotations

import base64
import json
import pickle
import random
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.messaging.queues import Queue

#: Tasks that Celery adds to every app, some of which run others.
BUILT_IN = (
    "celery.accumulate", "celery.backend_cleanup", "celery.chain", "celery.chord", "celery.chord_unlock",
    "celery.chunks", "celery.group", "celery.map", "celery.starmap", "celery.ping",
)  # fmt: skip
NOBODY = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def signature(task: str, *args: Any) -> dict[str, Any]:
    """A task with its arguments, as Celery writes one into a message."""
    return {"task": task, "args": list(args), "kwargs": {}, "options": {}, "subtask_type": None, "immutable": True}


def message(
    task: Any,
    args: Any,
    *,
    kwargs: Any = None,
    embed: Any = None,
    body: bytes | None = None,
    headers: dict[str, Any] | None = None,
    properties: dict[str, Any] | None = None,
    **envelope: Any,
) -> bytes:
    """A message of Celery's protocol 2, whole and valid but for what is said otherwise. body: raw."""
    number = str(uuid.uuid4())
    if body is None:
        body = json.dumps([args, kwargs or {}, NOBODY if embed is None else embed]).encode()
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": task, "id": number, "root_id": number, **(headers or {})},
            "properties": {
                "correlation_id": number,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": Queue.MEDIA.value},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
                **(properties or {}),
            },
            **envelope,
        }
    ).encode()


def without(item: bytes, *names: str) -> bytes:
    """A message that lacks the part at this path."""
    whole = part = json.loads(item)
    for name in names[:-1]:
        part = part[name]
    del part[names[-1]]
    return json.dumps(whole).encode()


def pickled(content: bytes) -> bytes:
    """A message to the workers whose body is a pickle."""
    return message(
        "workers.analyze", None, body=content,
        **{"content-type": "application/x-python-serialize", "content-encoding": "binary"},
    )  # fmt: skip


def forged(chance: random.Random, ids: Sequence[int], pickles: Sequence[bytes]) -> Iterator[tuple[str, bytes]]:
    """Endlessly: (the queue it is for, a message). ids: of jobs that are there; pickles: that run something."""
    while True:
        for make in (_tokens, _arguments, _headers, _tasks, _envelopes, _bytes):
            made = make(chance, ids)
            for item in made:
                yield chance.choice(list(Queue)).value, item
        for content in pickles:
            yield chance.choice(list(Queue)).value, pickled(content)
            yield chance.choice(list(Queue)).value, content


Maker = Callable[[random.Random, Sequence[int]], list[bytes]]


def _refs(chance: random.Random, ids: Sequence[int]) -> list[list[Any]]:
    return [[chance.choice(ids), str(uuid.UUID(int=chance.getrandbits(128)))] for _ in range(chance.randint(1, 16))]


def _tokens(chance: random.Random, ids: Sequence[int]) -> list[bytes]:
    """Jobs that are there, under tokens that are not theirs."""
    job = chance.choice(ids)
    tokens: tuple[Any, ...] = (str(uuid.UUID(int=0)), "", "x", "' OR 1=1 --", None, 1, "0" * 32, "\0", "{" + "0" * 32)
    guesses = [message("workers.analyze", [[[job, token]]]) for token in tokens]
    return [*guesses, *[message("workers.analyze", [_refs(chance, ids)]) for _ in range(8)]]


def _arguments(chance: random.Random, ids: Sequence[int]) -> list[bytes]:
    """What is no list of jobs."""
    job, token = chance.choice(ids), str(uuid.UUID(int=chance.getrandbits(128)))
    strange: list[Any] = [str(job), float(job), True, None, -job, 0, 2**63, 2**200, 1e308, [job], {"id": job}]
    nested: Any = [job, token]
    for _ in range(500):
        nested = [nested]
    calls: list[Any] = [[], [[]], [None], ["x"], [{}], [[job]], [[[job, token, "more"]]], [[job, token]], [nested]]
    found = [message("workers.analyze", [[[value, token]]]) for value in strange]
    found += [message("workers.analyze", args) for args in calls]
    found += [
        message("workers.analyze", [_refs(chance, ids)], kwargs={"self": 1}),
        message("workers.analyze", {"message": _refs(chance, ids)}),
        message("workers.analyze", [_refs(chance, ids) * 5000]),
        message("producer.dispatch", ["; DROP TABLE jobs"]),
        message("workers.summarize", [], kwargs={"session": None}),
        message("workers.analyze", [], body=json.dumps({"task": "workers.analyze", "args": [], "id": "1"}).encode()),
    ]
    return found


def _headers(chance: random.Random, ids: Sequence[int]) -> list[bytes]:
    """What Celery would act upon, beside a task and its arguments."""
    other = signature("producer.reconcile")
    chord = signature("celery.chord", [other] * 5, other)
    embeds = [{**NOBODY, name: chord if name == "chord" else [other, chord]} for name in NOBODY]
    headers: list[dict[str, Any]] = [
        {"eta": "2999-01-01T00:00:00+00:00"}, {"eta": "0001-01-01T00:00:00"}, {"eta": "soon"}, {"eta": 1e308},
        {"eta": {"a": 1}}, {"expires": "0001-01-01T00:00:00+00:00"}, {"expires": "9999-12-31T23:59:59-23:59"},
        {"expires": "2001-01-01T00:00:00+00:00"}, {"expires": -1}, {"expires": ["x"]}, {"timelimit": [0.001, 0.001]},
        {"timelimit": [1e308, 1e308]}, {"timelimit": "x"}, {"timelimit": [None]}, {"id": "%"}, {"id": None},
        {"id": ["x"]}, {"id": "x" * 10_000}, {"id": "\0"}, {"root_id": {"a": 1}}, {"parent_id": "%"}, {"group": "x"},
        {"retries": "x"}, {"retries": 2**70}, {"shadow": "\x1b[2J"}, {"meth": "__class__"}, {"origin": "\n\n"},
        {"hostname": "../../x"}, {"lang": "lisp"}, {"ignore_result": False}, {"replaced_task_nesting": 2**70},
        {"stamped_headers": ["x"], "stamps": {"x": 1}}, {"argsrepr": "x" * 50_000}, {"compression": "zlib"},
        {"compression": "application/x-bz2"}, {"compression": "x"}, {"redelivered": {"a": 1}},
    ]  # fmt: skip
    return [
        *[message("workers.analyze", [_refs(chance, ids)], embed=embed) for embed in embeds],
        *[message("producer.dispatch", [], embed=embed) for embed in embeds],
        *[message("workers.analyze", [_refs(chance, ids)], headers=each) for each in headers],
        message("workers.analyze", [], body=zlib.compress(bytes(2**26)), headers={"compression": "application/x-gzip"}),
    ]


def _tasks(chance: random.Random, ids: Sequence[int]) -> list[bytes]:
    """Tasks that nobody knows, that belong to others, and Celery's own, which would run others."""
    run = signature("workers.analyze", _refs(chance, ids))
    arguments: list[list[Any]] = [[], [run, [[_refs(chance, ids)]]], [run, [[_refs(chance, ids)]], 1], [[run], run]]
    names: list[Any] = ["os.system", "", "__import__", "workers.tasks.analyze", None, 1, ["workers.analyze"], {"a": 1}]
    return [
        *[message(name, chance.choice(arguments)) for name in BUILT_IN],
        *[message("celery.group", [[run, run], [], "x", []])],
        *[message(name, [_refs(chance, ids)]) for name in names],
        *[message(name, []) for name in ("producer.dispatch", "producer.reconcile", "workers.summarize")],
    ]


def _envelopes(chance: random.Random, ids: Sequence[int]) -> list[bytes]:
    """Messages that lack a part, or whose parts are others than kombu expects."""
    whole = message("workers.analyze", [_refs(chance, ids)])
    kinds = (
        "application/x-yaml",
        "application/x-msgpack",
        "application/x-python-serialize",
        "text/plain",
        "x",
        None,
        1,
    )
    properties: list[Any] = [
        {"delivery_tag": ["x"]}, {"delivery_tag": None}, {"delivery_info": None}, {"delivery_info": {}},
        {"delivery_info": {"exchange": "x", "routing_key": "*"}}, {"delivery_info": "x"}, {"body_encoding": "rot13"},
        {"body_encoding": None}, {"priority": "x"}, {"priority": 2**70}, {"reply_to": "x", "correlation_id": None},
    ]  # fmt: skip
    paths = [
        ("body",), ("headers",), ("properties",), ("content-type",), ("content-encoding",), ("headers", "task"),
        ("headers", "id"), ("properties", "delivery_tag"), ("properties", "delivery_info"),
        ("properties", "delivery_info", "exchange"), ("properties", "delivery_info", "routing_key"),
    ]  # fmt: skip
    bodies = (b"", b"{", b"\xff", b"[" * 100_000, b"null", b"[1,2,3]")
    return [
        *[without(whole, *path) for path in paths],
        *[message("workers.analyze", [_refs(chance, ids)], **{"content-type": kind}) for kind in kinds],
        *[message("workers.analyze", [_refs(chance, ids)], properties=each) for each in properties],
        *[
            json.dumps({**json.loads(whole), name: value}).encode()
            for name in ("body", "headers", "properties")
            for value in (None, "x", ["x"], 1)
        ],
        *[message("workers.analyze", [], body=raw) for raw in bodies],
    ]


def _bytes(chance: random.Random, ids: Sequence[int]) -> list[bytes]:
    """What is no message at all, or one that is too large."""
    megabytes = chance.randint(1, 10)
    whole = message("workers.analyze", [_refs(chance, ids)])
    return [
        b"", b"\0", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000 + b"]" * 100_000,
        b"9" * 100_000, b'{"a":' * 50_000, b"*1\r\n$4\r\nPING\r\n", whole[: chance.randrange(len(whole))],
        pickle.dumps([1, 2]),
        bytes(chance.getrandbits(8) for _ in range(200)), b" " * (megabytes * 2**20),
        message("workers.analyze", [["x" * (megabytes * 2**20)]]),
    ]  # fmt: skip
