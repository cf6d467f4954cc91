"""The record of what people did: every retry, cancel, rerun, resume, purge and erase, with who and when."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.orm import Session

from common.domain import MaskwatchError
from common.settings import get_settings


def operator() -> str:
    """The person who gives the command: MASKWATCH_OPERATOR, or USER@HOST of this process.

    The name is not verified; the name of the database role is recorded beside it.
    """
    named = get_settings().operator
    if named is not None:
        if not named.strip() or not named.isprintable() or len(named) > 200:
            raise MaskwatchError("MASKWATCH_OPERATOR must be a name of 1 to 200 printable characters")
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def record(session: Session, action: str, by: str, *, detail: str | None = None, job_ids: Sequence[int] = ()) -> int:
    """Record an action and the jobs that it changed; returns its id."""
    action_id = session.scalar(
        text('INSERT INTO operator_actions (action, "by", detail) VALUES (:action, :by, :detail) RETURNING id'),
        {"action": action, "by": by, "detail": detail},
    )
    assert isinstance(action_id, int)
    if job_ids:
        session.execute(
            text(
                "INSERT INTO operator_action_jobs (action_id, job_id) SELECT :action, unnest(CAST(:jobs AS bigint[]))"
            ),
            {"action": action_id, "jobs": list(job_ids)},
        )
    return action_id
