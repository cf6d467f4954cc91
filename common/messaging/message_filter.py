"""What a worker takes from its queue: messages as `common.messaging.queues.send` writes them, and nothing else.

Celery and kombu believe what a message says: its codec, its compression, its time limits, the tasks to run after it.
Some that make no sense end the worker that reads them. Whoever can write to Redis could use that, so each message is
read here first, and what goes on is built anew from the three things that count: task, arguments, expiry.
"""

from __future__ import annotations

import base64
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from common.messaging import kombu_patches
from common.messaging.queues import ROUTES, TaskName, decode_refs

#: A message of 256 jobs, the largest group that may be set, has about 25 kB.
MAX_BYTES = 128 * 1024


def admit(item: bytes, queue: str, priority: int = 0) -> dict[str, Any]:
    """The message that Celery gets to see for these bytes of a queue's list of that priority.

    Raises `ValueError` with the reason for what is not a message to a task of this queue as we send it.
    """
    if len(item) > MAX_BYTES:
        raise ValueError(f"it has {len(item):,} bytes, ours have at most {MAX_BYTES:,}")
    try:
        sent = json.loads(item)
        headers = sent["headers"]
        task = TaskName(headers["task"])
        if sent["content-type"] != "application/json" or "compression" in headers:
            raise ValueError("it is not plain JSON")
        args, kwargs, _ = json.loads(base64.b64decode(sent["body"], validate=True))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        # Its own words may be megabytes, or made for whoever reads the log.
        raise ValueError(f"it can't be read as a message of ours ({type(error).__name__})") from error
    if ROUTES[task].value != queue:
        raise ValueError(f"{task.value} is no task of this queue")
    _check_arguments(task, args, kwargs)
    return _envelope(task, args, _expiry(headers.get("expires")), queue, priority)


def _check_arguments(task: TaskName, args: Any, kwargs: Any) -> None:
    if kwargs != {} or not isinstance(args, list) or len(args) != (1 if task is TaskName.ANALYZE else 0):
        raise ValueError(f"{task.value} has other arguments")
    if task is TaskName.ANALYZE:
        decode_refs(args[0])


def _expiry(value: Any) -> str | None:
    """The time after which nobody wants the message any more, ISO 8601 in UTC, if it names one."""
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value).astimezone(UTC).isoformat()
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its expiry is no time") from error


def _envelope(task: TaskName, args: list[Any], expires: str | None, queue: str, priority: int) -> dict[str, Any]:
    """A message of Celery's protocol 2 (docs.celeryq.dev, "Message Protocol") as kombu keeps it in Redis."""
    # Not the sender's: it becomes a part of `jobs.worker`, and an expired message's id is never run again.
    message_id = str(uuid.uuid4())
    body = [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task.value,
            "id": message_id,
            "root_id": message_id,
            "expires": expires,
            "ignore_result": True,
        },
        "properties": {
            "body_encoding": "base64",
            # Ours, because kombu keeps messages in hand under it, and puts them back where the next line says.
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority,
        },
    }


def guard() -> None:
    """Let whatever this process takes from Redis pass `admit` first. Errors as `kombu_patches.deliver_only`."""
    kombu_patches.deliver_only(admit)
