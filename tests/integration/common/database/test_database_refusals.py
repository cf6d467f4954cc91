"""A Postgres that refuses the connection, or a right to our role: one clear line, without a secret."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from common.database.errors import DatabaseDownError, MissingRightError
from common.database.sessions import address, engine, make_engine, session_scope, transact
from common.domain import MaskwatchError
from common.settings import DatabaseSettings, Settings
from tests.services import Services, maskwatch

SECRET = "s3cr/et@x"

Configure = Callable[..., Settings]


@pytest.fixture
def url(services: Services) -> Iterator[URL]:
    """Of a role that may log in, twice at most, and do nothing; without its password."""
    owner = create_engine(services.endpoints.database_url)
    with owner.begin() as connection:
        connection.execute(text(f"CREATE ROLE weak LOGIN CONNECTION LIMIT 2 PASSWORD '{SECRET}'"))
    yield make_url(services.endpoints.database_url).set(username="weak", password=None)
    with owner.begin() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'weak'"))
        connection.execute(text("DROP ROLE weak"))
    owner.dispose()


def words(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def test_the_password_may_stand_on_its_own(url: URL, configure: Configure) -> None:
    configure(database__url=words(url.set(password="another")), database__password=SECRET)
    with session_scope() as session:
        assert session.scalar(text("SELECT current_user")) == "weak"
    assert SECRET not in repr(engine()) + repr(engine().url)


@pytest.mark.parametrize("given", ["apart", "in the URL"])
def test_a_wrong_password_is_named(url: URL, configure: Configure, given: str) -> None:
    if given == "apart":
        configure(database__url=words(url), database__password="wr0ng")
    else:
        configure(database__url=words(url.set(password="wr0ng")))
    with (
        pytest.raises(DatabaseDownError, match=r'refused the connection .*"weak".*MASKWATCH_DATABASE__PASSWORD'),
        session_scope() as s,
    ):
        s.scalar(text("SELECT 1"))
    done = maskwatch("status")
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and "the database refused the connection" in done.stderr
    )
    assert "wr0ng" not in done.stderr


def test_a_missing_right_names_the_role(url: URL, configure: Configure) -> None:
    configure(database__url=words(url), database__password=SECRET)
    with (
        pytest.raises(MissingRightError, match=r"the database role weak .*\(.*jobs.*maskwatch db grant"),
        session_scope() as s,
    ):
        s.execute(text("DELETE FROM jobs"))


def test_too_many_connections_are_named(url: URL, configure: Configure) -> None:
    configure(database__url=words(url), database__password=SECRET)
    held = [psycopg.connect(words(url.set(drivername="postgresql", password=SECRET))) for _ in range(2)]
    try:
        with (
            pytest.raises(DatabaseDownError, match="all connections of this role are in use"),
            session_scope() as session,
        ):
            session.scalar(text("SELECT 1"))
    finally:
        for connection in held:
            connection.close()


def test_one_that_is_away_is_not_taken_for_one_that_refuses(services: Services, configure: Configure) -> None:
    configure(database__url="postgresql+psycopg://weak@127.0.0.1:1/x")
    with pytest.raises(DatabaseDownError, match=r"does not answer .*is Postgres running"), session_scope() as session:
        session.scalar(text("SELECT 1"))


@pytest.mark.parametrize(
    "text_of_url",
    ["mysql://u:s3cret@h/d", "postgresql://u:s3cret@h/d", "s3cret", "postgresql+psycopg://u:pass@s3cret@h/d",
     "postgresql+psycopg://u@h:s3cret/d"],
)  # fmt: skip
def test_what_is_no_url_is_refused_and_not_shown(text_of_url: str) -> None:
    for use in (make_engine, address):
        with pytest.raises(MaskwatchError, match="no URL of the form") as refusal:
            use(DatabaseSettings(url=text_of_url))
        assert "s3cret" not in str(refusal.value)
        assert refusal.value.__context__ is None or refusal.value.__suppress_context__


def test_tls_is_a_matter_of_the_url() -> None:
    settings = DatabaseSettings(
        url="postgresql+psycopg://u:s3cret@h:5/d?sslmode=verify-full&sslrootcert=/ca.pem&sslpassword=s3cret",
        password="another-s3cret",
    )
    made = make_engine(settings)
    _, arguments = made.dialect.create_connect_args(made.url)
    assert arguments["sslmode"] == "verify-full" and arguments["sslrootcert"] == "/ca.pem"
    assert arguments["password"] == "another-s3cret"
    assert address(settings) == "postgresql+psycopg://u:***@h:5/d?sslmode=verify-full&sslrootcert=%2Fca.pem"
    made.dispose()


@pytest.mark.parametrize("tries", [3, 1])
def test_who_waited_in_a_circle_does_it_again(session: Session, tries: int) -> None:
    """Two take two locks, each in another order. With one try, which is the control, one of them is turned away."""
    engine()  # made here: two threads that need it first would make two
    both = threading.Barrier(2)
    tried: list[int] = []

    def take(first: int, second: int) -> bool:
        def work(own: Session) -> None:
            own.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": first})
            tried.append(first)
            if tried.count(first) == 1:
                both.wait(30)
            own.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": second})

        try:
            transact(work, tries=tries)
        except OperationalError as error:
            assert isinstance(error.orig, psycopg.errors.DeadlockDetected)
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(take, (1, 2), (2, 1)))
    assert sorted(done) == ([True, True] if tries > 1 else [False, True])
    assert len(tried) == (3 if tries > 1 else 2)
