"""The decorator of commands that work on the database in one transaction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from sqlalchemy.orm import Session

from common.cli.parts.deployment import deployment
from common.database.sessions import session_scope

P = ParamSpec("P")

#: Prints a command's output, after its transaction has been committed: before, the commit might still fail, and a slow
#: reader would hold the transaction open.
Say = Callable[[], object]


def with_session(command: Callable[Concatenate[Session, P], Say]) -> Callable[P, None]:
    """Hands a command a session of the deployment's database as its first argument.

    The command returns a function that prints its output, which is called after the commit. An error that the command
    raises rolls back; an error that the returned function raises does not.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with deployment(), session_scope() as session:
            say = command(session, *args, **kwargs)
        say()

    return run
