"""Where the broker's Redis is, how one gets in, and what was wrong where one doesn't. Imports no Celery.

The name and password of the user never become part of a URL that a library holds, because libraries print and log
their URLs: both clients, kombu's and ours, ask `Credentials` for them at every connection.
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
    """Redis, or its certificate, can be reached and does not fit: waiting alone won't put it right."""

    def __init__(self, sentence: str) -> None:
        MaskwatchError.__init__(self, sentence)


class Place(NamedTuple):
    """Where a Redis is; `path` of a Unix socket, or else a host and a port. No secrets."""

    path: str | None
    host: str
    port: int
    database: int
    tls: bool


class Credentials(CredentialProvider):
    """The user's name and password, read anew for every connection: a password that was changed in its file is used
    by the next one, so a worker needs no restart."""

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            username, password = credentials(Settings().broker)
        except (ValueError, OSError, MaskwatchError):  # a file is being replaced; its text may be in the error
            username = password = None
        if password is None:
            raise AuthenticationError("MASKWATCH_BROKER__PASSWORD can't be read at the moment")
        return (password,) if username is None else (username, password)


def credentials(settings: BrokerSettings) -> tuple[str | None, str | None]:
    """User and password. What is set on its own goes before what the URL says."""
    url = _split(settings)
    username = settings.username or (unquote(url.username) if url.username else None)
    if settings.password is not None:
        return username, settings.password.get_secret_value()
    return username, unquote(url.password) if url.password else None


def place(settings: BrokerSettings) -> Place:
    """Where the URL points. Raises `MaskwatchError`, which shows nothing of it: all of it may be part of a password."""
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
            "MASKWATCH_BROKER__CA_FILE, __CERTIFICATE_FILE and __KEY_FILE are for TLS: begin MASKWATCH_BROKER__URL "
            "with rediss://, or leave them out"
        )
    return found


def transport_url() -> str:
    """The broker's URL as kombu wants it, without a secret. Raises `MaskwatchError` where none is configured."""
    settings = get_settings().broker
    found = place(settings)
    # By name: kombu takes it from the URL for a host and for a socket alike, and a spawned child can look it up.
    query = f"credential_provider={__name__}:{Credentials.__name__}" if credentials(settings)[1] is not None else ""
    if found.path is not None:
        return f"redis+socket://{found.path}?virtual_host={found.database}" + (f"&{query}" if query else "")
    scheme = "rediss" if found.tls else "redis"
    host = f"[{found.host}]" if ":" in found.host else found.host
    return f"{scheme}://{host}:{found.port}/{found.database}" + (f"?{query}" if query else "")


def tls_options(settings: BrokerSettings) -> dict[str, Any] | None:
    """What kombu and redis-py alike want to know of TLS; None where it is not used. The certificate is always
    checked: TLS with just anybody protects nothing."""
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
    """What to tell people of an error of a client: what was wrong and what to do. Shows no secret."""
    for cause in _chain(error):
        sentence = _refusal(cause)
        if sentence is not None:
            return BrokerRefusedError(sentence)
    with suppress(MaskwatchError):
        if place(get_settings().broker).tls:
            # A port without TLS waits for the rest of what it takes for a command.
            return BrokerDownError(error, "is Redis running, and does this port speak TLS?")
        if any(word in str(error) for word in ("closed", "reset")):
            return BrokerDownError(error, "does it want TLS, and so a URL that begins with rediss://?")
    return BrokerDownError(error)


def _refusal(error: BaseException) -> str | None:
    """The sentence for one that waiting alone won't put right; None for others."""
    if isinstance(error, NoPermissionError):
        return (
            f"the broker does not let {_user()} do this ({error}): give the user the rights of its role, "
            "which docs/redis.acl lists"
        )
    if isinstance(error, AuthenticationError):
        return (
            f"the broker did not let {_user()} in ({error}): check MASKWATCH_BROKER__USERNAME and "
            "MASKWATCH_BROKER__PASSWORD, or what MASKWATCH_BROKER__URL says of them"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the broker's certificate does not fit ({getattr(error, 'verify_message', error)}): check the host in "
            "MASKWATCH_BROKER__URL and the authority in MASKWATCH_BROKER__CA_FILE"
        )
    if isinstance(error, ssl.SSLError):
        return (
            f"no TLS with the broker ({getattr(error, 'reason', None) or error}): is this a port with TLS, and does it "
            "want a client certificate (MASKWATCH_BROKER__CERTIFICATE_FILE and __KEY_FILE)?"
        )
    return None


def _user() -> str:
    with suppress(MaskwatchError):
        username, password = credentials(get_settings().broker)
        if username is not None:
            return f"the user {username}"
        return "its default user" if password else "us in without a password"
    return "us"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
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
        f"MASKWATCH_BROKER__URL is no URL of the form {_FORM}. A user and password belong into "
        "MASKWATCH_BROKER__USERNAME and MASKWATCH_BROKER__PASSWORD, or before the host as user:password@, "
        "percent-encoded; nothing else of Redis is set in the URL"
    )
