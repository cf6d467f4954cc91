"""The address of the broker's Redis, its credentials, and sentences for errors of its clients. Imports no Celery.

The user and password never become part of a URL that a library holds, because libraries print and log their URLs: both
clients, kombu's and ours, ask `Credentials` for them at every connection.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from redis import CredentialProvider, Redis, SSLConnection, UnixDomainSocketConnection
from redis.connection import Connection, ConnectionPool
from redis.exceptions import AuthenticationError, NoPermissionError

from common.domain import MaskwatchError
from common.settings import BrokerSettings, Settings, get_settings

#: The forms of a URL, as people write it; `redis+socket` is kombu's word for a Unix socket.
_FORM = "redis://host:6379/0, rediss://host:6380/0 (TLS) or redis+socket:///path/redis.sock?virtual_host=0"
_PORT = 6379


class BrokerDownError(MaskwatchError):
    """Redis can't be reached."""

    def __init__(self, error: BaseException, question: str = "is Redis running?") -> None:
        super().__init__(f"the broker does not answer ({error}): {question}")


class BrokerRefusedError(BrokerDownError):
    """Redis can be reached, but refuses the connection or a command, or has a wrong certificate: waiting won't help."""

    def __init__(self, sentence: str) -> None:
        MaskwatchError.__init__(self, sentence)


class Place(NamedTuple):
    """The address of a Redis: the `path` of a Unix socket, or a host and a port. No secrets."""

    path: str | None
    host: str
    port: int
    database: int
    tls: bool


class Credentials(CredentialProvider):
    """The user's name and password, read again for every connection: when the file with the password changes, the next
    connection uses the new password, and a worker needs no restart."""

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            username, password = credentials(Settings().broker)
        except (ValueError, OSError, MaskwatchError):  # a file is being replaced; the error may hold its text
            username = password = None
        if password is None:
            raise AuthenticationError("MASKWATCH_BROKER__PASSWORD can't be read at this moment")
        return (password,) if username is None else (username, password)


def credentials(settings: BrokerSettings) -> tuple[str | None, str | None]:
    """User and password. The separate settings override those in the URL."""
    url = _split(settings)
    username = settings.username or (unquote(url.username) if url.username else None)
    if settings.password is not None:
        return username, settings.password.get_secret_value()
    return username, unquote(url.password) if url.password else None


def place(settings: BrokerSettings) -> Place:
    """The address in the URL. Raises `MaskwatchError`, which shows no part of it: any part may belong to a password."""
    url = _split(settings)
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    is_socket = url.scheme == "redis+socket"
    database = query.pop("virtual_host", "0") if is_socket else url.path.strip("/") or "0"
    try:
        port = url.port or _PORT
        found = Place(unquote(url.path) if is_socket else None, url.hostname or "", port, int(database), _tls(url))
    except ValueError:
        raise _malformed() from None
    if query or url.fragment or found.database < 0 or not (found.path or found.host):
        raise _malformed()
    if not found.tls and (settings.ca_file or settings.certificate_file or settings.key_file):
        raise MaskwatchError(
            "MASKWATCH_BROKER__CA_FILE, __CERTIFICATE_FILE and __KEY_FILE need TLS: begin MASKWATCH_BROKER__URL "
            "with rediss://, or unset them"
        )
    return found


def transport_url() -> str:
    """The broker's URL in kombu's form, without secrets. Raises `MaskwatchError` if no broker is configured."""
    settings = get_settings().broker
    found = place(settings)
    # By name: kombu reads it from the URL for a host and for a socket alike, and a spawned child can look it up.
    query = f"credential_provider={__name__}:{Credentials.__name__}" if credentials(settings)[1] is not None else ""
    if found.path is not None:
        return f"redis+socket://{found.path}?virtual_host={found.database}" + (f"&{query}" if query else "")
    scheme = "rediss" if found.tls else "redis"
    host = f"[{found.host}]" if ":" in found.host else found.host
    return f"{scheme}://{host}:{found.port}/{found.database}" + (f"?{query}" if query else "")


def tls_options(settings: BrokerSettings) -> dict[str, Any] | None:
    """The TLS options of kombu and redis-py; None without TLS. The certificate is always checked: TLS to an unknown
    server protects nothing."""
    if not place(settings).tls:
        return None
    files = {
        "ssl_ca_certs": settings.ca_file,
        "ssl_certfile": settings.certificate_file,
        "ssl_keyfile": settings.key_file,
    }
    return {
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
        "ssl_check_hostname": settings.check_hostname,
        **{name: str(path) for name, path in files.items() if path is not None},
    }


def redis_client() -> Redis:
    """A client of the broker's Redis; times out instead of hanging."""
    settings = get_settings().broker
    found = place(settings)
    timeout = settings.socket_timeout_seconds
    options: dict[str, Any] = {"db": found.database, "socket_timeout": timeout, "decode_responses": True}
    if credentials(settings)[1] is not None:
        options["credential_provider"] = Credentials()
    kind: type[Connection | UnixDomainSocketConnection] = Connection
    if found.path is not None:
        kind = UnixDomainSocketConnection
        options["path"] = found.path
    else:
        options |= {"host": found.host, "port": found.port, "socket_connect_timeout": timeout}
    if (tls := tls_options(settings)) is not None:
        kind = SSLConnection
        options |= tls
    return Redis.from_pool(ConnectionPool(connection_class=kind, **options))


def broker_error(error: BaseException) -> BrokerDownError:
    """A client's error as a sentence: what is wrong and what to do. Shows no secret."""
    for cause in _chain(error):
        sentence = _refusal(cause)
        if sentence is not None:
            return BrokerRefusedError(sentence)
    with suppress(MaskwatchError):
        if place(get_settings().broker).tls:
            # A port without TLS takes the handshake for a command and waits for the rest of it.
            return BrokerDownError(error, "is Redis running, and does this port speak TLS?")
        if any(word in str(error) for word in ("closed", "reset")):
            return BrokerDownError(error, "does it need TLS, with a MASKWATCH_BROKER__URL that begins with rediss://?")
    return BrokerDownError(error)


def _refusal(error: BaseException) -> str | None:
    """The sentence for an error that waiting won't fix; None for other errors."""
    if isinstance(error, NoPermissionError):
        return (
            f"the broker refused a command of {_user()} ({error}): give the user the rights of its role, "
            "which docs/redis.acl lists"
        )
    if isinstance(error, AuthenticationError):
        return (
            f"the broker refused the login of {_user()} ({error}): check MASKWATCH_BROKER__USERNAME and "
            "MASKWATCH_BROKER__PASSWORD, or the user and password in MASKWATCH_BROKER__URL"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the broker's certificate is not valid ({getattr(error, 'verify_message', error)}): check the host in "
            "MASKWATCH_BROKER__URL and the authority in MASKWATCH_BROKER__CA_FILE"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"TLS with the broker failed ({getattr(error, 'reason', None) or error}): does this port speak TLS, and "
            "does it need a client certificate (MASKWATCH_BROKER__CERTIFICATE_FILE and __KEY_FILE)?"
        )
    return None


def _user() -> str:
    with suppress(MaskwatchError):
        username, password = credentials(get_settings().broker)
        if username is not None:
            return f"the user {username}"
        return "the default user" if password else "a user without a password"
    return "this user"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _split(settings: BrokerSettings) -> SplitResult:
    if settings.url is None:
        raise MaskwatchError(
            "no broker is configured: set MASKWATCH_BROKER__URL, or install the embedded one "
            "(pip install 'maskwatch[local]')"
        )
    try:
        url = urlsplit(settings.url.get_secret_value())
    except ValueError:
        raise _malformed() from None
    if url.scheme not in ("redis", "rediss", "redis+socket"):
        raise _malformed()
    return url


def _tls(url: SplitResult) -> bool:
    return url.scheme == "rediss"


def _malformed() -> MaskwatchError:
    return MaskwatchError(
        f"MASKWATCH_BROKER__URL is no URL of the form {_FORM}. Set a user and password in "
        "MASKWATCH_BROKER__USERNAME and MASKWATCH_BROKER__PASSWORD, or before the host as user:password@, "
        "percent-encoded; the URL takes no other options"
    )
