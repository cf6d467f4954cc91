"""The decorator of commands that work on the database in one transaction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

from sqlalchemy.orm import Session

from common.cli.parts.deployment import deployment
from common.database.sessions import session_scope

P = ParamSpec("P")

#: What a command has to say, said when its transaction has been committed: before, it might not come true, and whoever
#: reads it slowly would hold the transaction open.
Say = Callable[[], object]


def with_session(command: Callable[Concatenate[Session, P], Say]) -> Callable[P, None]:
    """Hands a command a session of the deployment's database as its first argument.

    The command returns what it has to say as a function, which is called after the commit. An error that the command
    raises rolls back; one that this function raises leaves what was done.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with deployment(), session_scope() as session:
            say = command(session, *args, **kwargs)
        say()

    return run
