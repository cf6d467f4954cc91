"""Lets a worker take only messages as `common.messaging.queues.send` writes them.

Celery and kombu trust the contents of a message: its codec, its compression, its time limits, the tasks to run after
it. Some malformed messages end the worker that reads them. Anybody who can write to Redis could use that. So each
message is checked here first, and the worker gets a new message with only the checked task, arguments and expiry.
"""

from __future__ import annotations

import base64
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from common.messaging import kombu_patches
from common.messaging.queues import ROUTES, TaskName, decode_refs

#: A message of 256 jobs, the largest allowed group, has about 25 kB.
MAX_BYTES = 128 * 1024


def admit(item: bytes, queue: str, priority: int = 0) -> dict[str, Any]:
    """The message that Celery receives for these bytes from a queue's list of that priority.

    Raises `ValueError`, with the reason, for anything that `send` would not write for a task of this queue.
    """
    if len(item) > MAX_BYTES:
        raise ValueError(f"it has {len(item):,} bytes; valid: at most {MAX_BYTES:,}")
    try:
        sent = json.loads(item)
        headers = sent["headers"]
        task = TaskName(headers["task"])
        if sent["content-type"] != "application/json" or "compression" in headers:
            raise ValueError("it is not plain JSON")
        args, kwargs, _ = json.loads(base64.b64decode(sent["body"], validate=True))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        # Without the error's text, which may have megabytes, or be written to deceive the reader of the log.
        raise ValueError(f"it is no valid message ({type(error).__name__})") from error
    if ROUTES[task].value != queue:
        raise ValueError(f"{task.value} is no task of this queue")
    _check_arguments(task, args, kwargs)
    return _envelope(task, args, _expiry(headers.get("expires")), queue, priority)


def _check_arguments(task: TaskName, args: Any, kwargs: Any) -> None:
    if kwargs != {} or not isinstance(args, list) or len(args) != (1 if task is TaskName.ANALYZE else 0):
        raise ValueError(f"its arguments are not those of {task.value}")
    if task is TaskName.ANALYZE:
        decode_refs(args[0])


def _expiry(value: Any) -> str | None:
    """The time after which the message is dropped, ISO 8601 in UTC; None if it names no time."""
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value).astimezone(UTC).isoformat()
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("its expiry is no time") from error


def _envelope(task: TaskName, args: list[Any], expires: str | None, queue: str, priority: int) -> dict[str, Any]:
    """A message of Celery's protocol 2 (docs.celeryq.dev, "Message Protocol") as kombu keeps it in Redis."""
    # Not the sender's id: it becomes a part of `jobs.worker`, and Celery never runs the id of an expired message again.
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
            # Not the sender's: kombu keeps unacknowledged messages by it, and restores them to the queue named below.
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority,
        },
    }


def guard() -> None:
    """Pass every message that this process takes from Redis through `admit`. Errors as `kombu_patches.deliver_only`."""
    kombu_patches.deliver_only(admit)
