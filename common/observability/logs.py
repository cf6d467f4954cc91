"""Structured logs. One line of JSON per event for machines, coloured text on a terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any

import structlog


def configure_logging(level: int = logging.INFO) -> None:
    """Send every log, ours and the libraries', through structlog to standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: Any = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        # Plain tracebacks: structlog's default prints the local variables of every frame, with passwords and pixels.
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Celery logs every task twice at INFO; our own lines say more, once per group.
    for noisy in ("celery.worker.strategy", "celery.app.trace", "celery.beat", "botocore", "kombu"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("celery.beat").addFilter(_in_one_line)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _in_one_line(record: logging.LogRecord) -> bool:
    """Cut a record to one line: Beat logs two stack traces for each tick that it can't send, once a second while Redis
    can't be reached or is full."""
    record.msg, record.args, record.exc_info = record.getMessage().partition("\n")[0], None, None
    return True


# For a process that has not configured its logs: structlog's defaults write to standard output, where results belong,
# and print tracebacks with the local variables of every frame.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ],
    logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
)


def working_on(job_id: int, attempt: int) -> AbstractContextManager[None]:
    """Add a job and its attempt to every line that Maskwatch or a library logs in this block, in this thread and in
    threads that run in a copy of its context."""
    return structlog.contextvars.bound_contextvars(job=job_id, attempt=attempt)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
