"""Where the broker is, by its settings: what both clients are told, and that no secret is in it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu import Connection
from pydantic import ValidationError
from redis.exceptions import AuthenticationError, NoPermissionError

from common.domain import MaskwatchError
from common.messaging.broker import (
    BrokerDownError,
    BrokerRefusedError,
    Credentials,
    broker_error,
    credentials,
    place,
    redis_client,
    tls_options,
    transport_url,
)
from common.settings import BrokerSettings, DatabaseSettings, get_settings
from tests.services import forget_settings

SECRET = "s3cr/et@:%#"
QUOTED = "s3cr%2Fet%40%3A%25%23"

Configure = Callable[..., BrokerSettings]


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    def configure(**values: str) -> BrokerSettings:
        for name, value in values.items():
            monkeypatch.setenv(f"MASKWATCH_{name.upper()}", value)
        forget_settings()
        return get_settings().broker

    yield configure
    monkeypatch.undo()
    forget_settings()


@pytest.mark.parametrize(
    ("url", "expected"),
    [("redis://h:1/2", (None, "h", 1, 2, False)), ("rediss://h", (None, "h", 6379, 0, True)),
     ("redis://[::1]:7", (None, "::1", 7, 0, False)), ("redis://u:p@h/", (None, "h", 6379, 0, False)),
     ("redis+socket:///tmp/r.sock?virtual_host=3", ("/tmp/r.sock", "", 6379, 3, False)),
     ("redis+socket:///tmp/r.sock", ("/tmp/r.sock", "", 6379, 0, False))],
)  # fmt: skip
def test_places(url: str, expected: tuple[object, ...]) -> None:
    assert place(BrokerSettings(url=url)) == expected


@pytest.mark.parametrize(
    "url",
    ["http://s3cret@h", "redis://", "redis://u:s3cret/x@h", "redis://u:s3cret#x@h", "redis://h:s3cret", "s3cret",
     "redis://h/s3cret", "redis://h/0?ssl_cert_reqs=none&x=s3cret", "redis://[s3cret", "redis://h/-1",
     "redis+socket://?virtual_host=s3cret", "redis://u:12?s3cret@h:6379/0"],
)  # fmt: skip
def test_what_is_no_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(MaskwatchError, match="MASKWATCH_BROKER__URL is no URL of the form") as refusal:
        place(BrokerSettings(url=url))
    assert "s3cret" not in str(refusal.value)
    assert refusal.value.__context__ is None or refusal.value.__suppress_context__, "a traceback would show it"


@pytest.mark.parametrize(
    "values",
    [{"broker__url": f"redis://me:{QUOTED}@h:1/2"},
     {"broker__url": "redis://h:1/2", "broker__username": "me", "broker__password": SECRET},
     {"broker__url": "redis://other:wrong@h:1/2", "broker__username": "me", "broker__password": SECRET}],
)  # fmt: skip
def test_both_clients_get_the_same_and_no_url_a_secret(configure: Configure, values: dict[str, str]) -> None:
    settings = configure(**values)
    assert credentials(settings) == Credentials().get_credentials() == ("me", SECRET)
    ours = redis_client().connection_pool.make_connection()
    connection = Connection(transport_url(), ssl=tls_options(settings) or False)
    assert (connection.hostname, connection.port, connection.virtual_host) == ("h", 1, "2")
    assert connection.userid is None and connection.password is None
    assert connection.credential_provider == "common.messaging.broker:Credentials"
    assert ours.credential_provider.get_credentials() == ("me", SECRET)
    shown = f"{transport_url()} {connection.as_uri(include_password=True)} {connection!r} {redis_client()!r}"
    assert "s3cr" not in shown


def test_without_a_password_nobody_is_asked_for_one(configure: Configure) -> None:
    configure(broker__url="redis+socket:///tmp/r.sock?virtual_host=1")
    assert transport_url() == "redis+socket:///tmp/r.sock?virtual_host=1"
    assert redis_client().connection_pool.connection_kwargs.get("credential_provider") is None
    configure(broker__url="redis+socket:///tmp/r.sock?virtual_host=1", broker__password=SECRET)
    assert Credentials().get_credentials() == (SECRET,)  # the default user
    assert transport_url().endswith("&credential_provider=common.messaging.broker:Credentials")


def test_tls_always_checks_the_certificate(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("ca_file", "certificate_file", "key_file")}
    for path in files.values():
        path.touch()
    assert tls_options(BrokerSettings(url="redis://h")) is None
    assert tls_options(BrokerSettings(url="rediss://h")) == {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": True,
    }
    assert tls_options(BrokerSettings(url="rediss://h", check_hostname=False, **files)) == {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": False,
        "ssl_ca_certs": str(files["ca_file"]),
        "ssl_certfile": str(files["certificate_file"]),
        "ssl_keyfile": str(files["key_file"]),
    }
    with pytest.raises(MaskwatchError, match="rediss://"):
        place(BrokerSettings(url="redis://h", ca_file=files["ca_file"]))
    with pytest.raises(ValidationError, match="needs MASKWATCH_BROKER__CERTIFICATE_FILE"):
        BrokerSettings(url="rediss://h", key_file=files["key_file"])


def test_a_password_without_a_url_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="MASKWATCH_BROKER__URL is not"):
        BrokerSettings(password="x")
    with pytest.raises(ValidationError, match="MASKWATCH_DATABASE__URL is not"):
        DatabaseSettings(password="x")


def test_files_of_the_secrets_folder(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "MASKWATCH_BROKER__PASSWORD").write_text(f"{SECRET}\n")
    (tmp_path / "maskwatch_database__password").write_text("of the database\n")
    configure(secrets_dir=str(tmp_path), broker__url="redis://h", database__url="postgresql+psycopg://u@h/d")
    settings = get_settings()
    assert settings.broker.password and settings.broker.password.get_secret_value() == SECRET
    assert settings.database.password and settings.database.password.get_secret_value() == "of the database"
    assert SECRET not in f"{settings!r} {settings.model_dump_json()}"
    (tmp_path / "MASKWATCH_BROKER__PASSWORD").write_text("changed")
    assert Credentials().get_credentials() == ("changed",)
    (tmp_path / "MASKWATCH_BROKER__PASSWORD").unlink()
    with pytest.raises(AuthenticationError, match="can't be read"):
        Credentials().get_credentials()
    with pytest.raises(MaskwatchError, match="does not exist"):
        configure(secrets_dir=str(tmp_path / "nowhere"))


def test_a_setting_that_cannot_be_read_is_named_and_not_shown(configure: Configure) -> None:
    with pytest.raises(MaskwatchError, match='"database"') as unreadable:
        configure(database='{"url": "s3cret')
    assert "s3cret" not in str(unreadable.value) and unreadable.value.__suppress_context__
    with pytest.raises(ValidationError) as wrong:
        configure(database="{}", broker__socket_timeout_seconds="s3cret")
    assert "s3cret" not in str(wrong.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [(AuthenticationError("invalid username-password pair"), "refused the login of the user me .*PASSWORD"),
     (NoPermissionError("no permissions to run 'x'"), "refused a command of the user me .*redis.acl"),
     (ssl.SSLCertVerificationError(1, "no"), "certificate is not valid .*CA_FILE"),
     (ssl.SSLError(1, "alert"), "TLS with the broker failed .*CERTIFICATE_FILE")],
)  # fmt: skip
def test_a_refusal_is_known_below_whatever_wraps_it(configure: Configure, error: Exception, words: str) -> None:
    configure(broker__url=f"redis://me:{QUOTED}@h")
    wrapped = OSError("wrapped")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        with pytest.raises(BrokerRefusedError, match=words) as refusal:
            raise broker_error(each)
        assert "s3cr" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_one_that_is_away_is_no_refusal(configure: Configure) -> None:
    configure(broker__url="redis://h")
    away = broker_error(ConnectionRefusedError("Connection refused"))
    assert type(away) is BrokerDownError and "is Redis running?" in str(away)
