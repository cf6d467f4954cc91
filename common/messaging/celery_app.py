"""The Celery app and its settings, each with its reason. Imports no task: workers name the modules they run."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals
from celery.beat import EmbeddedService, Scheduler
from redis.exceptions import RedisError

from common.messaging import kombu_patches
from common.messaging.broker import BrokerRefusedError, broker_error, redis_client, tls_options, transport_url
from common.observability.logs import configure_logging, get_logger
from common.settings import BrokerSettings, Settings, get_settings

kombu_patches.apply()

app = Celery("maskwatch")
app.conf.update(
    # Messages are JSON only: nothing is ever unpickled.
    task_serializer="json",
    accept_content=["json"],
    result_accept_content=["json"],
    # The ledger holds results. A backend would add a write per task and one more thing that can be down.
    task_ignore_result=True,
    result_backend=None,
    # Acknowledge before running: the ledger recovers jobs, and a late acknowledgement would run them twice.
    task_acks_late=False,
    # One message at a time and none in advance: a worker that dies takes no waiting messages along.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # CUDA does not survive a fork, and neither do the threads of a model runtime.
    worker_pool="prefork",
    worker_pool_start_method="spawn",
    # A spawned child imports Python, numpy and onnxruntime before it reports; the default of 4 s kills it
    # on a busy machine.
    worker_proc_alive_timeout=60.0,
    # Backstop behind our own drain, which children see as a flag between two pictures.
    worker_soft_shutdown_timeout=20.0,
    # Chatter between workers that nobody reads, and a way in that nobody needs.
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    # A Redis that is away for an hour must not end a worker.
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Nor may one that refuses something for a while: it is full, or a replica that is about to take over.
    broker_channel_error_retry=True,
    # The message was acknowledged before the task began: nothing to cancel when the connection drops.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={
        # Only for messages popped and never acknowledged (a worker killed in between). A second delivery
        # is harmless: the token has changed.
        "visibility_timeout": 600,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_keepalive": True,
        "health_check_interval": 15,
    },
    # Publishing tries again briefly, then says so; what was not published is found by the reconciler.
    task_publish_retry=True,
    task_publish_retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.3},
    # Queues are made by name; nothing is declared that no code names.
    task_create_missing_queues=True,
    task_default_queue="maskwatch.unrouted",
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    enable_utc=True,
    timezone="UTC",
)


def timeouts(settings: BrokerSettings) -> dict[str, float]:
    """A frozen Redis is noticed instead of waited for."""
    return {
        "socket_timeout": settings.socket_timeout_seconds,
        "socket_connect_timeout": settings.socket_timeout_seconds,
    }


def _configure(settings: Settings) -> None:
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


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    """Ours instead of Celery's, in the workers and in their children."""
    configure_logging()


def serve(queue: str, name: str, *, pool: str, tasks: str, beat: bool = False) -> None:
    """Run a worker of one queue in this process until SIGTERM; `tasks` is the module that holds its tasks. With `beat`
    this process also ticks the schedule of the app.

    Raises `MaskwatchError` where no broker is configured.
    A broker that is away is waited for, at the start and later. One that refuses us at the start ends it
    (`BrokerRefusedError`), because somebody has to put a setting right; later it is asked again until it lets us in.
    """
    _configure(get_settings())
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
    # Imported here: it needs the names of the queues, and these need the app.
    from common.messaging.message_filter import guard

    guard()
    if beat:
        # In memory: what is due follows from the ledger, so a restarted beat needs to remember nothing.
        EmbeddedService(app, thread=True, scheduler_cls=Scheduler).start()
    quiet = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    app.worker_main(["worker", "-Q", queue, "-n", f"{name}@%h", "-P", pool, "-l", "INFO", *quiet])
