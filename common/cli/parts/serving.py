"""What `producer`, `worker` and `aggregator` do before they serve a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.cli.parts.deployment import deployment
from common.database.versions import Part
from common.messaging.broker import place
from common.observability.exporter import serving
from common.observability.metrics import Role
from common.settings import Settings

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


#: The part of the deployment that each program is, for the check of its version.
_PARTS = {Role.PRODUCER: Part.PRODUCER, Role.WORKER: Part.WORKER, Role.AGGREGATOR: Part.AGGREGATOR}


@contextmanager
def ready_to_serve(role: Role, gauges: Callable[[], Iterable[Collector]] = tuple) -> Iterator[Settings]:
    """Use the deployment (the embedded stack is started if nothing else is configured), and serve the metrics of
    `role`. Yields the settings.

    Raises `MaskwatchError` if no broker is configured.
    """
    with deployment(part=_PARTS[role]) as settings:
        place(settings.broker)
        # Before the children start: they find the metrics' folder in their environment.
        with serving(role, settings.metrics, gauges):
            yield settings
