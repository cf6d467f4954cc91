"""All changes that Maskwatch makes to kombu, each with its reason and with the parts of kombu that it depends on.

kombu's private parts may change in any release. So pyproject.toml pins one version of kombu, and
tests/unit/common/messaging/test_kombu_patches.py keeps a hash of every function of kombu that is replaced or called
here: it fails, with the function's name, if another version has changed it. This module knows neither our app nor our
queues.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any, ClassVar

from kombu.transport import redis as redis_transport
from kombu.transport.virtual import QoS as CountedMessages
from redis import Redis
from redis.exceptions import ResponseError

from common.domain import MaskwatchError
from common.observability.logs import get_logger

log = get_logger(__name__)

#: kombu's separator between the name of a queue and a priority other than 0.
PRIORITY_SEPARATOR = "\x06\x16"

#: Takes bytes from a queue's list, the queue and the priority; returns the message for Celery or raises `ValueError`.
Admit = Callable[[bytes, str, int], dict[str, Any]]


def list_name(queue: str, priority: int) -> str:
    """The Redis list in which kombu keeps the messages of a queue that have a priority (`Channel._q_for_pri`)."""
    return f"{queue}{PRIORITY_SEPARATOR}{priority}" if priority else queue


def apply() -> None:
    """Make every channel of this process count messages with `QoS` and lock with `mutex`."""
    redis_transport.Channel.QoS = QoS
    redis_transport.Mutex = mutex


class QoS(redis_transport.QoS):  # type: ignore[misc]  # kombu carries no types
    """Counts a message as taken, and as acknowledged, even if Redis could not store that.

    Without this, a message stays counted as unacknowledged if the connection breaks at that moment; a worker that takes
    one message at a time then never asks for another, and never notices that the connection is gone. And a full Redis
    refuses to store either: without this the worker ends, although only workers make room in Redis. If Redis delivers
    the message again later, that is harmless: its token has changed.
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        try:
            super().append(message, delivery_tag)
        except ResponseError:
            CountedMessages.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)
        except ResponseError:
            CountedMessages.ack(self, delivery_tag)
        except Exception:
            CountedMessages.ack(self, delivery_tag)
            raise


@contextmanager
def mutex(client: Redis, name: str, expire: int) -> Iterator[None]:
    """Kombu's lock around its search for unacknowledged messages, without the Lua script that releases it: so no Redis
    user of Maskwatch needs the right to run scripts, which can block Redis for all others."""
    ours = uuid.uuid4().hex.encode()
    if not client.set(name, ours, nx=True, ex=expire):
        raise redis_transport.MutexHeld

    def release(pipe: Any) -> None:
        held = pipe.get(name)
        pipe.multi()
        if held == ours:  # else the lock has run out, and belongs to another process
            pipe.delete(name)

    try:
        yield
    finally:
        client.transaction(release, name)


class Channel(redis_transport.Channel):  # type: ignore[misc]  # kombu carries no types
    """Kombu's channel, which passes on only messages that `admit` accepts, and logs and drops all others. Kombu itself
    trusts the contents of a message, and some malformed messages end the worker that reads them."""

    admit: ClassVar[Admit]

    def _brpop_read(self, **options: Any) -> bool:
        """As kombu's own, with a check between reading and delivering."""
        try:
            try:
                found = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if not found:
                raise Empty
            name, item = found
            queue, _, priority = name.decode().partition(self.sep)
            self._queue_cycle.rotate(queue)
            try:
                message = type(self).admit(item, queue, int(priority or 0))
            except ValueError as error:
                log.error("dropped a message that Maskwatch did not send", queue=queue, detail=str(error))
            else:
                self.connection._deliver(message, queue)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()


def deliver_only(admit: Admit) -> None:
    """Pass every message that this process takes from Redis through `admit`.

    Raises `MaskwatchError` if another version of kombu reads its queues in another way, and would bypass `admit`.
    """
    for name in ("_brpop_read", "_flush_brpop_reauth", "sep"):
        if not hasattr(redis_transport.Channel, name):
            raise MaskwatchError(f"this version of kombu has no Channel.{name}; install the one that Maskwatch pins")
    Channel.admit = staticmethod(admit)
    redis_transport.Transport.Channel = Channel
