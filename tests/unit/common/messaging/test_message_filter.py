"""What passes the door to a worker: messages as we send them, rebuilt; of all others a reason."""

from __future__ import annotations

import base64
import json
import pickle
import uuid
from typing import Any

import pytest

from common.messaging.celery_app import app
from common.messaging.message_filter import MAX_BYTES, admit
from common.messaging.queues import ROUTES, Queue, TaskName

MEDIA = Queue.MEDIA.value
REFS = [[n, str(uuid.uuid4())] for n in range(1, 257)]


def sent(task: TaskName = TaskName.ANALYZE, args: Any = None, **options: Any) -> dict[str, Any]:
    """The message as Celery and kombu put it into Redis, taken from a transport that keeps it in memory."""
    with app.connection_for_write("memory://") as connection:
        args = [REFS] if args is None else args
        app.send_task(task.value, args=args, queue=ROUTES[task].value, connection=connection, **options)
        taken = connection.default_channel._get(ROUTES[task].value)
    assert isinstance(taken, dict)
    return taken


def raw(message: Any) -> bytes:
    return json.dumps(message).encode()


def body_of(message: dict[str, Any]) -> Any:
    return json.loads(base64.b64decode(message["body"]))


def with_body(body: Any, **headers: Any) -> bytes:
    message = sent()
    message["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    return raw({**message, "headers": {**message["headers"], **headers}})


@pytest.mark.parametrize("task", list(TaskName))
def test_what_we_send_is_let_in(task: TaskName) -> None:
    args = [REFS] if task is TaskName.ANALYZE else []
    expires = None if task is TaskName.ANALYZE else 60
    item = raw(sent(task, args, expires=expires))
    assert len(item) < MAX_BYTES / 4
    message = admit(item, ROUTES[task].value)
    assert body_of(message)[:2] == [args, {}]
    assert message["headers"]["task"] == task.value
    assert (message["headers"]["expires"] is None) == (expires is None)
    # What kombu puts back after a while is let in again.
    message["headers"]["redelivered"] = message["properties"]["delivery_info"]["redelivered"] = True
    assert body_of(admit(raw(message), ROUTES[task].value)) == body_of(message)


def test_nothing_but_task_arguments_and_expiry_comes_through() -> None:
    forged = sent()
    forged["headers"] |= {
        "eta": "2999-01-01T00:00:00+00:00", "timelimit": [0.001, 0.001], "id": "%", "root_id": "%", "shadow": "\x1b[2J",
        "meth": "x", "ignore_result": False, "retries": 7, "stamps": {"a": 1}, "stamped_headers": ["a"], "origin": "x",
    }  # fmt: skip
    forged["properties"] = {
        "delivery_tag": ["x"],
        "delivery_info": {"exchange": "e", "routing_key": "r"},
        "reply_to": 1,
    }
    link = {"task": "workers.summarize", "args": [], "kwargs": {}, "options": {}}
    every = {"callbacks": [link], "errbacks": [link], "chain": [link], "chord": link}
    forged["body"] = base64.b64encode(json.dumps([[REFS], {}, every]).encode()).decode()
    message = admit(raw(forged), MEDIA)
    assert body_of(message) == [[REFS], {}, dict.fromkeys(every)]
    assert set(message["headers"]) == {"lang", "task", "id", "root_id", "expires", "ignore_result"}
    assert message["headers"]["id"] != "%" and message["headers"]["ignore_result"] is True
    assert message["properties"]["delivery_info"] == {"exchange": "", "routing_key": MEDIA}
    assert isinstance(message["properties"]["delivery_tag"], str) and "reply_to" not in message["properties"]


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "no json": b"{",
    "no text": b"\xff\xfe\0",
    "not an object": b"[1, 2]",
    "a pickle": pickle.dumps({"a": 1}),
    "nested too deep": b"[" * 50_000 + b"]" * 50_000,
    "a number too long": b"1" * 50_000,
    "too large": raw({**sent(), "padding": "x" * MAX_BYTES}),
    "pickled body": raw({**sent(), "content-type": "application/x-python-serialize"}),
    "yaml body": raw({**sent(), "content-type": "application/x-yaml"}),
    "compressed": with_body([[REFS], {}, {}], compression="application/x-gzip"),
    "body in no base64": raw({**sent(), "body": "*" * 99}),
    "body is no text": raw({**sent(), "body": {"a": 1}}),
    "no headers": raw({name: value for name, value in sent().items() if name != "headers"}),
    "headers are a list": raw({**sent(), "headers": ["task"]}),
    "headers are a text": raw({**sent(), "headers": "task"}),
    "no task": with_body([[REFS], {}, {}], task=None),
    "a task that is a list": with_body([[REFS], {}, {}], task=["workers.analyze"]),
    "an unknown task": with_body([[REFS], {}, {}], task="os.system"),
    "a task of Celery's": with_body([[REFS], {}, {}], task="celery.chunks"),
    "a task of another queue": with_body([[], {}, {}], task="workers.summarize"),
    "keywords": with_body([[REFS], {"self": 1}, {}]),
    "two arguments": with_body([[REFS, REFS], {}, {}]),
    "no arguments": with_body([[], {}, {}]),
    "protocol 1": with_body({"task": "workers.analyze", "id": "x", "args": [REFS], "kwargs": {}}),
    "ids as texts": with_body([[[["1", str(uuid.uuid4())]]], {}, {}]),
    "ids as numbers with a point": with_body([[[[1.0, str(uuid.uuid4())]]], {}, {}]),
    "an expiry that is none": with_body([[REFS], {}, {}], expires="soon"),
    "an expiry that is a number": with_body([[REFS], {}, {}], expires=1e308),
    "an expiry at the end of time": with_body([[REFS], {}, {}], expires="9999-12-31T23:59:59-23:59"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused_in_a_few_words(name: str) -> None:
    with pytest.raises(ValueError) as refused:
        admit(HOSTILE[name], MEDIA)
    assert len(str(refused.value)) < 120 and "\n" not in str(refused.value)
