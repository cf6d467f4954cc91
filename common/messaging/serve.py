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
    """Take over what the deployment sets. Not when this module is imported: where the broker of the embedded stack is,
    is known only when that runs."""
    app.conf.update(
        broker_url=transport_url(),
        broker_use_ssl=tls_options(settings.broker),
        worker_concurrency=settings.worker.processes,
        # Recycle children: native libraries leak a little over days, and a lot at once is caught by the memory. Not
        # more often than it helps: a new child takes seconds to start.
        worker_max_tasks_per_child=settings.worker.max_tasks_per_child,
        worker_max_memory_per_child=settings.worker.max_memory_per_child_mb * 1024,
        # A group that hangs in native code is ended from outside; its lease then runs out. The soft limit is
        # ours (`workers/jobs/run.py`): Celery's raises anywhere, and would look like a broken picture.
        task_time_limit=settings.worker.hard_time_limit_seconds,
    )
    app.conf.broker_transport_options |= timeouts(settings.broker)


def serve(queue: str, name: str, *, pool: str, tasks: str, beat: bool = False) -> None:
    """Run a worker of one queue in this process until SIGTERM; `tasks` is the module that holds its tasks. With `beat`
    this process also ticks the schedule of the app.

    Raises `MaskwatchError` where no broker is configured.
    A broker that is away is waited for, at the start and later. One that refuses us at the start ends it
    (`BrokerRefusedError`), because somebody has to put a setting right; later it is asked again until it lets us in.
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
    # Kept apart by queue: a consumer puts back what others of its kind left, and needs no right to other queues.
    app.conf.broker_transport_options |= {
        "unacked_key": f"{queue}.unacked",
        "unacked_index_key": f"{queue}.unacked_index",
        "unacked_mutex_key": f"{queue}.unacked_mutex",
    }
    # By way of the settings, because spawned children get those and not the command line.
    app.conf.include = (tasks,)
    guard()
    if beat:
        # In memory: what is due follows from the ledger, so a restarted beat needs to remember nothing.
        EmbeddedService(app, thread=True, scheduler_cls=Scheduler).start()
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    app.worker_main(["worker", "-Q", queue, "-n", f"{name}@%h", "-P", pool, "-l", "INFO", *quiet])
