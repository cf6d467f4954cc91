"""What all tests share: one embedded Postgres, Redis and S3 server for the run, emptied before each test
that asks for them, and the shared data set where it is present."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.orm import Session

from common.domain import ObjectInfo
from common.settings import Settings, get_settings
from common.storage.s3 import S3Store
from tests import ROOT
from tests.services import Bucket, Services, forget_settings, start_services

# How long an example takes says something about the machine, not about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def _services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with start_services(tmp_path_factory.mktemp("stack")) as services:
        yield services


@pytest.fixture
def services(_services: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """The running services, empty, and this process configured to use them."""
    for name in [name for name in os.environ if name.startswith(("MASKWATCH_", "AWS_")) and name not in KEPT]:
        monkeypatch.delenv(name)
    for name, value in _services.environment.items():
        monkeypatch.setenv(name, value)
    forget_settings()
    _services.empty()
    yield _services
    forget_settings()


#: Variables that say something of the machine rather than of the deployment.
KEPT = ("AWS_CA_BUNDLE", "MASKWATCH_TEST_DATA")


@pytest.fixture
def configure(services: Services, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Settings by the names of their variables, without the prefix, for this process and those it starts."""

    def configure(**values: object) -> Settings:
        for name, value in values.items():
            monkeypatch.setenv(f"MASKWATCH_{name.upper()}", str(value))
        forget_settings()
        return get_settings()

    return configure


@pytest.fixture
def database_url(services: Services) -> str:
    """A migrated, empty database, which the settings name, too."""
    return services.environment["MASKWATCH_DATABASE__URL"]


@pytest.fixture
def empty_database(services: Services) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    name = f"test_{uuid.uuid4().hex[:8]}"
    server = create_engine(services.endpoints.database_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(services.endpoints.database_url).set(database=name).render_as_string(hide_password=False)
    yield url
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def session(database_url: str) -> Iterator[Session]:
    """A session in the empty database; the test commits when others must see what it wrote."""
    # An engine of its own, because tests let this process forget the one of the settings.
    engine = create_engine(database_url)
    with Session(engine, expire_on_commit=False) as session:
        yield session
        session.rollback()
    engine.dispose()


@pytest.fixture
def bucket(services: Services) -> Bucket:
    """A new bucket on the S3 server."""
    return Bucket.create(f"test-{uuid.uuid4().hex[:12]}", services.environment["MASKWATCH_STORAGE__ENDPOINT_URL"])


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where listings of buckets began, in the order they did."""
    begun: list[str] = []
    pages = S3Store.list_pages

    def list_pages(self: S3Store, prefix: str, start_after: str = "") -> Iterator[list[ObjectInfo]]:
        begun.append(start_after)
        return pages(self, prefix, start_after)

    monkeypatch.setattr(S3Store, "list_pages", list_pages)
    return begun


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared data set. It is not part of the project; tests that need it skip without it."""
    found = Path(os.environ.get("MASKWATCH_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not found.is_dir():
        pytest.skip(f"the shared data set is not at {found} (set MASKWATCH_TEST_DATA to its folder)")
    return found
