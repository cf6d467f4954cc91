"""The decorator that hands a command its session: what is said comes after the commit, and errors roll back."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from common.catalog import places
from common.cli.parts.sessions import Say, with_session
from common.domain import MaskwatchError
from tests.ledger_rows import scalar


def locations(session: Session) -> int:
    session.rollback()  # sees what others have committed meanwhile
    return int(scalar(session, "SELECT count(*) FROM locations"))


def test_what_a_command_says_comes_after_the_commit(session: Session) -> None:
    seen: list[int] = []

    @with_session
    def command(given: Session, name: str) -> Say:
        places.add_location(given, name, "UTC")
        given.flush()
        seen.append(locations(session))
        return lambda: seen.append(locations(session))

    command("lobby")
    assert seen == [0, 1]


def test_an_error_of_the_command_rolls_back_and_one_of_what_it_says_does_not(session: Session) -> None:
    @with_session
    def fails(given: Session) -> Say:
        places.add_location(given, "lobby", "UTC")
        raise MaskwatchError("no")

    @with_session
    def says_no(given: Session) -> Say:
        places.add_location(given, "yard", "UTC")

        def say() -> None:
            raise MaskwatchError("done, but not all of it")

        return say

    with pytest.raises(MaskwatchError, match="no"):
        fails()
    assert locations(session) == 0
    with pytest.raises(MaskwatchError, match="not all"):
        says_no()
    assert locations(session) == 1
