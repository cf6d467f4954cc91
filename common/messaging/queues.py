"""Queues and tasks by name, and how to send to them: no module imports a task to send it.

A message carries only job ids and tokens; the ledger decides what they mean.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import RedisError

from common.domain import JobRef, Lane
from common.messaging.broker import BrokerDownError as BrokerDownError
from common.messaging.broker import broker_error, tls_options, transport_url
from common.messaging.broker import redis_client as redis_client
from common.messaging.celery_app import app, timeouts
from common.messaging.kombu_patches import list_name
from common.settings import get_settings


class Queue(StrEnum):
    """Every queue. A test checks that each has a consumer."""

    MEDIA = "maskwatch.media"
    PRODUCER = "maskwatch.producer"
    AGGREGATION = "maskwatch.aggregation"


class TaskName(StrEnum):
    """Every task."""

    ANALYZE = "workers.analyze"
    DISPATCH = "producer.dispatch"
    RECONCILE = "producer.reconcile"
    REQUEST_SUMMARY = "producer.request_summary"
    POLL_CAMERAS = "producer.look_at_cameras"
    SUMMARIZE = "workers.summarize"


#: The queue of each task.
ROUTES: Mapping[TaskName, Queue] = {
    TaskName.ANALYZE: Queue.MEDIA,
    TaskName.DISPATCH: Queue.PRODUCER,
    TaskName.RECONCILE: Queue.PRODUCER,
    TaskName.REQUEST_SUMMARY: Queue.PRODUCER,
    TaskName.POLL_CAMERAS: Queue.PRODUCER,
    TaskName.SUMMARIZE: Queue.AGGREGATION,
}

#: The lanes of `Queue.MEDIA`, as Celery's priorities: kombu keeps a list for each, and takes from the first list that
#: isn't empty. So a free worker takes live footage first, however much of a backfill waits.
PRIORITIES: Mapping[Lane, int] = {Lane.LIVE: 0, Lane.BACKFILL: 3}

#: The key of the epoch, which changes when a Redis loses its data; only the reconciler writes it.
EPOCH_KEY = "maskwatch.epoch"


def read_epoch(client: Redis) -> str | None:
    """The epoch of this Redis; None if it is new or was wiped."""
    try:
        found = client.get(EPOCH_KEY)
    except RedisError as error:
        raise broker_error(error) from error
    return None if found is None else str(found)


def ensure_epoch(client: Redis) -> str:
    """The epoch of this Redis; begins one if there is none. Only the reconciler calls it."""
    try:
        client.set(EPOCH_KEY, uuid.uuid4().hex, nx=True)
    except RedisError as error:
        raise broker_error(error) from error
    epoch = read_epoch(client)
    assert epoch is not None
    return epoch


def queue_length(client: Redis, queue: Queue, lane: Lane | None = None) -> int:
    """Messages that wait in a queue, or in one lane of it (kombu keeps each as a Redis list)."""
    lists = [list_of(queue, each) for each in (Lane if lane is None else (lane,))]
    try:
        return sum(int(client.llen(name)) for name in lists)
    except RedisError as error:
        raise broker_error(error) from error


def list_of(queue: Queue, lane: Lane) -> str:
    """The Redis list that holds a lane of a queue."""
    return list_name(queue.value, PRIORITIES[lane])


def send(task: TaskName, *messages: Sequence[Any], **options: Any) -> None:
    """Publish a task once per message; a message is the task's arguments. Raises `BrokerDownError` when the broker does
    not take one; the messages before it are then sent."""
    broker = get_settings().broker
    try:
        with app.connection_for_write(
            transport_url(), ssl=tls_options(broker), transport_options=timeouts(broker)
        ) as connection:
            for args in messages:
                app.send_task(
                    task.value,
                    args=list(args),
                    queue=ROUTES[task].value,
                    ignore_result=True,
                    connection=connection,
                    **options,
                )
    except (RedisError, OperationalError, OSError) as error:
        raise broker_error(error) from error


def encode_refs(refs: Sequence[JobRef]) -> list[list[Any]]:
    """Jobs as a message carries them: [[id, token], ...]."""
    return [[ref.id, str(ref.token)] for ref in refs]


def decode_refs(message: Any) -> list[JobRef]:
    """The reverse of `encode_refs`. Raises `ValueError` for anything else, without acting on it."""
    if not isinstance(message, list):
        raise ValueError(f"expected a list of [id, token], got {type(message).__name__}")
    refs = []
    for entry in message:
        match entry:
            case [int() as job_id, str() as token] if not isinstance(job_id, bool) and 0 < job_id < 2**63:
                refs.append(JobRef(job_id, uuid.UUID(token)))
            case _:
                raise ValueError("expected [id, token] with a positive integer and a UUID")
    return refs
