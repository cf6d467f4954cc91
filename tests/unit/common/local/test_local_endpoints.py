"""What a stack hands out is what the settings and the drivers understand."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from common.local.postgres import psql_command
from common.local.stack import Endpoints
from common.settings import Settings

ENDPOINTS = Endpoints(
    database_url="postgresql+psycopg://maskwatch:s3cr-et_@/maskwatch?host=/tmp/maskwatch-abc/postgres&port=5432",
    broker_url="redis+socket:///tmp/maskwatch-abc/redis/redis.sock?virtual_host=0",
    redis_url="unix:///tmp/maskwatch-abc/redis/redis.sock?db=0",
    s3_endpoint_url="http://127.0.0.1:5000",
    s3_access_key="maskwatch",
    s3_secret_key="maskwatch",
    s3_region="us-east-1",
)


def test_the_environment_is_read_back_by_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENDPOINTS.environment().items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.database.url is not None
    assert settings.database.url.get_secret_value() == ENDPOINTS.database_url
    assert settings.broker.url is not None
    assert settings.broker.url.get_secret_value() == ENDPOINTS.broker_url
    assert settings.storage.endpoint_url == ENDPOINTS.s3_endpoint_url


def test_printing_them_shows_no_password() -> None:
    assert "s3cr-et_" not in repr(ENDPOINTS)


def test_psql_gets_the_password_by_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICE", "production")
    argv, environment = psql_command(ENDPOINTS.database_url)
    url = make_url(ENDPOINTS.database_url)
    assert {name: value for name, value in environment.items() if name.startswith("PG")} == {
        "PGHOST": url.query["host"],
        "PGPORT": url.query["port"],
        "PGDATABASE": url.database,
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
    }
    assert len(argv) == 1
    assert "s3cr-et_" not in argv[0]
