"""The Celery app and its settings, each with its reason. Imports no task: workers name the modules they run."""

from __future__ import annotations

from typing import Any

from celery import Celery, signals

from common.messaging import kombu_patches
from common.observability.logs import configure_logging
from common.settings import BrokerSettings

kombu_patches.apply()

app = Celery("maskwatch")
app.conf.update(
    # Messages are JSON only: no message is ever unpickled.
    task_serializer="json",
    accept_content=["json"],
    result_accept_content=["json"],
    # The ledger holds results. A backend would add a write per task and one more service that can fail.
    task_ignore_result=True,
    result_backend=None,
    # Acknowledge before running: the ledger recovers jobs, and a late acknowledgement would run them twice.
    task_acks_late=False,
    # One message at a time and no prefetch: a worker that dies holds no waiting messages.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # CUDA and the threads of a model runtime do not survive a fork.
    worker_pool="prefork",
    worker_pool_start_method="spawn",
    # A spawned child imports Python, numpy and onnxruntime before it reports; the default of 4 s kills it
    # on a busy machine.
    worker_proc_alive_timeout=60.0,
    # Only a backstop: our own drain sets a flag that the children read between two images.
    worker_soft_shutdown_timeout=20.0,
    # Nothing reads the events of workers, and nothing needs remote control, which would be a way to attack.
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    # A Redis that can't be reached for an hour must not end a worker.
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # Nor may a Redis that refuses commands for a while, because it is full or a replica that is about to take over.
    broker_channel_error_retry=True,
    # The message was acknowledged before the task began: nothing to cancel when the connection drops.
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={
        # Only for messages that were popped and never acknowledged, because the worker was killed in between. A second
        # delivery is harmless: the token has changed.
        "visibility_timeout": 600,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_keepalive": True,
        "health_check_interval": 15,
    },
    # Publishing is tried again briefly, then raises; the reconciler finds jobs whose message was not published.
    task_publish_retry=True,
    task_publish_retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_step": 0.3},
    # Queues are made when the code names them; none is declared in advance.
    task_create_missing_queues=True,
    task_default_queue="maskwatch.unrouted",
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    enable_utc=True,
    timezone="UTC",
)


def timeouts(settings: BrokerSettings) -> dict[str, float]:
    """Timeouts that notice a Redis that hangs."""
    return {
        "socket_timeout": settings.socket_timeout_seconds,
        "socket_connect_timeout": settings.socket_timeout_seconds,
    }


@signals.setup_logging.connect
def _logging(**_: Any) -> None:
    """Configure our logs instead of Celery's, in the workers and in their children."""
    configure_logging()
