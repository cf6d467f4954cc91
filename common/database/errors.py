"""Errors of Postgres as sentences: whether the database can't be reached or a right is missing, and what to do."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from common.domain import MaskwatchError, first_line


class DatabaseDownError(MaskwatchError):
    """Postgres can't be reached, has dropped the connection, or refuses new connections."""


class MissingRightError(MaskwatchError):
    """The database role lacks a right that the statement needs."""


#: Parts of Postgres' messages when it refuses a connection, and what to do. Matched by text, because libpq gives no
#: SQLSTATE for a connection that was not made. In another language (lc_messages) no part matches, and the general
#: sentence quotes the message.
_NOT_LET_IN = (
    ("password authentication failed", "check the user in MASKWATCH_DATABASE__URL and MASKWATCH_DATABASE__PASSWORD"),
    ("no password supplied", "set MASKWATCH_DATABASE__PASSWORD"),
    ("no pg_hba.conf entry", "the server allows no such connection: is sslmode needed, is this host allowed?"),
    ("does not exist", "check MASKWATCH_DATABASE__URL"),
    ("too many clients", "all connections are in use: raise max_connections, or run fewer processes"),
    ("too many connections", "all connections of this role are in use: raise its limit, or run fewer processes"),
    ("remaining connection slots", "all connections are in use: raise max_connections, or run fewer processes"),
    ("certificate", "check sslmode and sslrootcert in MASKWATCH_DATABASE__URL"),
)


def down(error: DBAPIError) -> DatabaseDownError:
    line = first_line(error)
    for words, what_to_do in _NOT_LET_IN:
        if words in line:
            return DatabaseDownError(f"the database refused the connection ({line}): {what_to_do}")
    return DatabaseDownError(f"the database does not answer ({line}): is Postgres running?")


def is_lost(error: DBAPIError) -> bool:
    """Whether an error means that the database can't be reached, rather than that it refused a statement.

    No SQLSTATE: no connection was made. 08: connection exceptions; 53: out of resources, connections among
    them; 57P: shut down, crashed, starting up (PostgreSQL's Appendix A, "Error Codes").
    """
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or state is None or state.startswith(("08", "53", "57P"))
