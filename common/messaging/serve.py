"""Runs a Celery worker of one queue in this process: what `maskwatch worker`, `aggregator` and `producer` do."""

from __future__ import annotations

from celery.beat import EmbeddedService, Scheduler
from redis.exceptions import RedisError

from common.messaging.broker import BrokerRefusedError, broker_error, redis_client, tls_options, transport_url
from common.messaging.celery_app import app, timeouts
from common.messaging.message_filter import guard
from common.observability.logs import get_logger
from common.settings import Settings, get_settings


def configure(settings: Settings) -> None:
    """Configure the app from the settings. Not at import: the broker of the embedded stack is known only when the stack
    runs."""
    app.conf.update(
        broker_url=transport_url(),
        broker_use_ssl=tls_options(settings.broker),
        worker_concurrency=settings.worker.processes,
        # Replace children: native libraries leak a little memory over days; the memory limit catches a large leak. Not
        # often, because a new child takes seconds to start.
        worker_max_tasks_per_child=settings.worker.max_tasks_per_child,
        worker_max_memory_per_child=settings.worker.max_memory_per_child_mb * 1024,
        # A child that hangs in native code is killed by its parent; its leases then run out. The soft limit is our own
        # (`workers/jobs/run.py`): Celery's raises anywhere in the code, and would look like a broken image.
        task_time_limit=settings.worker.hard_time_limit_seconds,
    )
    app.conf.broker_transport_options |= timeouts(settings.broker)


def serve(queue: str, name: str, *, pool: str, tasks: str, beat: bool = False) -> None:
    """Run a worker of one queue in this process until SIGTERM; `tasks` is the module that holds its tasks. With `beat`
    this process also runs the schedule of the app.

    Raises `MaskwatchError` if no broker is configured. Waits for a broker that can't be reached, at the start and
    later. Raises `BrokerRefusedError` if the broker refuses the connection at the start, because a setting must be
    corrected; later it tries again until the broker accepts the connection.
    """
    configure(get_settings())
    try:
        with redis_client() as client:
            client.llen(queue)
    except (RedisError, OSError) as error:
        problem = broker_error(error)
        if isinstance(problem, BrokerRefusedError):
            raise problem from error
        get_logger(__name__).warning(str(problem))
    # Separate keys per queue: a consumer restores the messages of its own queue only, and needs no right to others.
    app.conf.broker_transport_options |= {
        "unacked_key": f"{queue}.unacked",
        "unacked_index_key": f"{queue}.unacked_index",
        "unacked_mutex_key": f"{queue}.unacked_mutex",
    }
    # Through the app's settings, because spawned children get those and not the command line.
    app.conf.include = (tasks,)
    guard()
    if beat:
        # In memory: the ledger tells what is due, so a restarted beat needs no stored state.
        EmbeddedService(app, thread=True, scheduler_cls=Scheduler).start()
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    app.worker_main(["worker", "-Q", queue, "-n", f"{name}@%h", "-P", pool, "-l", "INFO", *quiet])
