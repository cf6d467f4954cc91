"""The embedded stack of one machine: real Postgres, real Redis and an S3 server, all in one state directory.

Used if no database, broker or bucket is configured. Two rules:

- A stack that was started with `up` runs until `down`. A command that needs the stack opens a `session`; the end of the
  last session stops a stack that was not started with `up`.
- Running processes are recorded in `state.json`, which is changed only under a lock that the kernel releases when its
  holder dies. After a crash the next start adopts processes that still run and forgets those that don't.

The embedded S3 server keeps objects in memory; data in Postgres survive `down` and are removed by `down(purge=True)`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from common.domain import MaskwatchError, first_line
from common.files import PART, LockHeldError, hold, remove_parts, write_atomically
from common.local.postgres import (
    DATABASE,
    PORT,
    ROLE,
    Postgres,
    make_cluster,
    move_cluster,
    open_to_postgres,
    remove_abandoned_cluster,
    remove_cluster,
)
from common.local.processes import TAG, ProcessRef, start_detached, stop_session, stop_stack, stop_tagged, tag
from common.local.services import S3, Redis, Service, log_file

S3_REGION = "us-east-1"

#: How long a worker may take to finish its jobs before it is killed.
WORKER_STOP_SECONDS = 20.0

SERVICES = (Postgres.name, Redis.name, S3.name)

#: Files that a folder may hold before it becomes a state directory: an interrupted start left them.
_BEGINNINGS = {"lock", "in-use", "logs"}


@dataclass(frozen=True)
class Endpoints:
    """How to reach the services. The URLs hold passwords, so `repr` doesn't show them."""

    database_url: str = field(repr=False)
    broker_url: str
    redis_url: str
    s3_endpoint_url: str
    s3_access_key: str
    s3_secret_key: str = field(repr=False)
    s3_region: str

    def environment(self) -> dict[str, str]:
        """The endpoints as environment variables, for child processes and other tools."""
        return {
            "MASKWATCH_DATABASE__URL": self.database_url,
            "MASKWATCH_BROKER__URL": self.broker_url,
            "MASKWATCH_STORAGE__ENDPOINT_URL": self.s3_endpoint_url,
            "AWS_ACCESS_KEY_ID": self.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret_key,
            "AWS_DEFAULT_REGION": self.s3_region,
        }


@dataclass(frozen=True)
class ServiceStatus:
    """The status of one service, or of one process that was started beside the services."""

    name: str
    running: bool
    pid: int | None
    address: str | None


class Worker(BaseModel):
    """A process started beside the services, and the process that started it."""

    name: str
    tag: str
    owner: ProcessRef
    process: ProcessRef | None = None  # None: it was about to be started


class State(BaseModel):
    """The contents of `state.json`."""

    state_dir: Path
    password: str = Field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)  # of Postgres
    kept: bool = False  # started explicitly: no session stops it
    sockets: Path | None = None
    cluster: Path | None = None
    s3_port: int = 0
    services: dict[str, ProcessRef] = {}
    workers: list[Worker] = []


class LocalStack:
    """The stack of one state directory. Any number of processes may use it at the same time."""

    def __init__(self, state_dir: Path, lock_seconds: float = 120.0) -> None:
        self.state_dir = Path(state_dir).resolve()
        self.lock_seconds = lock_seconds
        self._file = self.state_dir / "state.json"
        self._lock = self.state_dir / "lock"
        self._in_use = self.state_dir / "in-use"

    # What people and commands call.

    def up(self) -> Endpoints:
        """Start the services that don't run, adopt those that do, and keep them running until `down`."""
        return self._start(keep=True)

    def down(self, purge: bool = False) -> None:
        """Stop all services and workers, even if they are in use; `purge` also removes the data and the state."""
        if self._load_file() is None:  # never started, or deleted by hand
            stop_stack(self.state_dir)
            if purge:
                remove_abandoned_cluster(self.state_dir)
            return
        self._open_state_dir()
        with self._held(self._lock):
            state = self._load_here()
            self._stop_everything(state)
            if purge:
                if state.cluster is not None:
                    remove_cluster(state.cluster)
                shutil.rmtree(self.state_dir)
            else:
                self._save(state)

    def status(self) -> list[ServiceStatus]:
        """The status of every service and of every process started beside them; starts and changes nothing."""
        state = self._load()
        if state is None or state.sockets is None:
            return [ServiceStatus(name, False, None, None) for name in SERVICES]
        services = [_status(service, state.services.get(service.name)) for service in self._services(state)]
        workers = []
        for worker in state.workers:
            alive = worker.process if worker.process is not None and worker.process.alive() else None
            workers.append(ServiceStatus(worker.name, alive is not None, alive.pid if alive else None, None))
        return services + workers

    def endpoints(self) -> Endpoints | None:
        """How to reach the stack if it runs; None if it doesn't."""
        state = self._load()
        if state is None or state.sockets is None:
            return None
        if not all(_status(service, state.services.get(service.name)).running for service in self._services(state)):
            return None
        return self._endpoints(state)

    @contextmanager
    def session(self, keep: bool = False) -> Iterator[Endpoints]:
        """Start the stack if needed, and use it. The end of the last session stops it, unless it is kept.

        Workers that this process spawned are stopped at the end in any case.
        """
        self._open_state_dir()
        try:
            with self._held(self._in_use, shared=True):
                try:
                    yield self._start(keep)
                finally:
                    self._stop_workers()
        finally:
            self._stop_if_unused()

    def spawn(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """Start a detached process beside the services, with `env` added to our environment; returns its pid.

        Its output goes to `logs/NAME.log`. It is stopped at the end of this process's session, by `down`, or by the
        next start after this process has died.
        """
        if self._load() is None:
            raise MaskwatchError(f"the embedded services in {self.state_dir} are not running: start them first")
        program = shutil.which(argv[0])
        if program is None:
            raise MaskwatchError(f"{argv[0]} is not an executable program")
        worker = Worker(name=name, tag=tag(f"worker-{secrets.token_hex(8)}", self.state_dir), owner=_ourselves())
        with self._changing() as state:
            earlier = [other for other in state.workers if other.name == name and other.owner == worker.owner]
            if any(other.process is not None and other.process.alive() for other in earlier):
                raise MaskwatchError(f"this process already has a process named {name}; stop it first")
            _stop_in_parallel(earlier)
            # Recorded before it exists: after a kill at any moment, the next start knows of it.
            state.workers = [other for other in state.workers if other not in earlier] + [worker]
            self._save(state)
            environment = {**os.environ, **env, TAG: worker.tag}
            worker.process = start_detached([program, *argv[1:]], environment, log_file(name, self.state_dir))
        return worker.process.pid

    # Starting and stopping.

    def _start(self, keep: bool) -> Endpoints:
        self._open_state_dir()
        with self._changing() as state:
            orphans = [worker for worker in state.workers if not worker.owner.alive()]
            _stop_in_parallel(orphans)
            state.workers = [worker for worker in state.workers if worker not in orphans]
            state.sockets = _socket_folder(state.sockets)
            if state.cluster is None or not state.cluster.is_dir():
                state.cluster = make_cluster(self.state_dir)
            self._save(state)  # before anything runs in these folders
            services = self._services(state)
            with ThreadPoolExecutor(len(services)) as pool:
                starts = {s.name: pool.submit(_ensure, s, state.services.get(s.name)) for s in services}
            state.services = {name: start.result() for name, start in starts.items() if start.exception() is None}
            state.s3_port = next(service.port for service in services if isinstance(service, S3))
            for start in starts.values():
                start.result()  # the first error, now that what did start is recorded
            state.kept = state.kept or keep
            return self._endpoints(state)

    def _stop_everything(self, state: State) -> None:
        _stop_in_parallel(state.workers)
        if state.sockets is not None:
            with ThreadPoolExecutor(len(SERVICES)) as pool:
                list(pool.map(lambda s: s.stop(state.services.get(s.name)), self._services(state)))
            shutil.rmtree(state.sockets, ignore_errors=True)
        stop_stack(self.state_dir)
        state.services, state.workers, state.sockets, state.kept = {}, [], None, False

    def _stop_if_unused(self) -> None:
        if not self._file.exists():
            return
        with self._changing() as state:
            if state.kept:
                return
            with suppress(LockHeldError), hold(self._in_use, seconds=0):
                self._stop_everything(state)

    def _stop_workers(self) -> None:
        """Stop the workers of this process: SIGTERM, and SIGKILL after a deadline."""
        state, ourselves = self._load(), _ourselves()
        if state is None:
            return
        ours = [w for w in state.workers if w.owner == ourselves]
        if not ours:
            return
        _stop_in_parallel(ours)  # without the lock: it may take its time
        tags = {worker.tag for worker in ours}
        with self._changing() as state:
            state.workers = [worker for worker in state.workers if worker.tag not in tags]

    # The state directory.

    def _open_state_dir(self) -> None:
        """Make the state directory, or check that the existing one is a state directory of this user."""
        try:
            self.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner, entries = self.state_dir.stat().st_uid, {path.name for path in self.state_dir.iterdir()}
        except OSError as error:
            raise MaskwatchError(
                f"the state directory {self.state_dir} can't be used ({first_line(error)}); "
                "name another in MASKWATCH_STATE_DIR"
            ) from error
        if owner != os.geteuid():
            raise MaskwatchError(
                f"the state directory {self.state_dir} belongs to another user (uid {owner}); name one of your own in "
                "MASKWATCH_STATE_DIR"
            )
        if not os.access(self.state_dir, os.W_OK | os.X_OK):
            raise MaskwatchError(
                f"the state directory {self.state_dir} is not writable; name another in MASKWATCH_STATE_DIR"
            )
        others = {name for name in entries - _BEGINNINGS if not name.endswith(PART)}
        if self._file.name not in entries and others:
            raise MaskwatchError(
                f"{self.state_dir} holds other files; MASKWATCH_STATE_DIR has to name a folder that is new or empty"
            )
        self.state_dir.chmod(0o700)

    @contextmanager
    def _held(self, lock: Path, *, shared: bool = False) -> Iterator[None]:
        with ExitStack() as held:
            try:
                held.enter_context(hold(lock, shared=shared, seconds=self.lock_seconds))
            except LockHeldError as holder:
                raise MaskwatchError(
                    f"the embedded services are being started or stopped by {holder}; waited {self.lock_seconds:.0f} s"
                ) from None
            yield

    @contextmanager
    def _changing(self) -> Iterator[State]:
        """The state, under the lock; it is saved at the end, also after an error."""
        with self._held(self._lock):
            remove_parts(self.state_dir)
            log_file("", self.state_dir).parent.mkdir(mode=0o700, exist_ok=True)
            state = self._load_here()
            try:
                yield state
            finally:
                self._save(state)

    def _load_here(self) -> State:
        """The state to change; call it under the lock. A new, moved or copied directory gets a state of its own."""
        state = self._load_file()
        if state is not None and state.state_dir == self.state_dir:
            return state
        if state is None:
            stop_stack(self.state_dir)  # processes whose state was deleted
            state = State(state_dir=self.state_dir)
        elif _is_there(state.state_dir / self._file.name):  # a copy: the processes and root's data are the original's
            state = State(state_dir=self.state_dir, password=state.password)
        else:
            stop_stack(state.state_dir)
            cluster = move_cluster(state.cluster, self.state_dir) if state.cluster else None
            state = State(state_dir=self.state_dir, password=state.password, cluster=cluster)
        self._save(state)
        return state

    def _load(self) -> State | None:
        """The state to read; None if this directory has no state of its own yet."""
        state = self._load_file()
        return state if state is not None and state.state_dir == self.state_dir else None

    def _load_file(self) -> State | None:
        try:
            return State.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MaskwatchError(f"{self._file} can't be read ({first_line(error)})") from error
        except ValidationError as error:
            raise MaskwatchError(f"{self._file} is damaged; remove {self.state_dir} to start again") from error

    def _save(self, state: State) -> None:
        # Readable by this user only: it holds a password.
        write_atomically(self._file, state.model_dump_json(indent=2), mode=0o600)

    def _services(self, state: State) -> list[Service]:
        assert state.sockets is not None and state.cluster is not None, "the state was prepared by _start"
        return [
            Postgres(self.state_dir, state.cluster, state.sockets / "postgres", state.password),
            Redis(self.state_dir, state.sockets / "redis"),
            S3(self.state_dir, state.s3_port),
        ]

    def _endpoints(self, state: State) -> Endpoints:
        assert state.sockets is not None
        sockets = state.sockets
        return Endpoints(
            database_url=f"postgresql+psycopg://{ROLE}:{state.password}@/{DATABASE}?host={sockets}/postgres&port={PORT}",
            broker_url=f"redis+socket://{sockets}/redis/redis.sock?virtual_host=0",
            redis_url=f"unix://{sockets}/redis/redis.sock?db=0",
            s3_endpoint_url=f"http://127.0.0.1:{state.s3_port}",
            # moto checks neither key, but every client has to send them.
            s3_access_key="maskwatch",
            s3_secret_key="maskwatch",
            s3_region=S3_REGION,
        )


def _ensure(service: Service, ref: ProcessRef | None) -> ProcessRef:
    """The service's process: the recorded one if it lives and answers, else a new one."""
    if ref is not None and ref.alive():
        if service.answers():
            return ref
        service.stop(ref)
    return service.start()


def _status(service: Service, ref: ProcessRef | None) -> ServiceStatus:
    running = ref is not None and ref.alive() and service.answers()
    return ServiceStatus(service.name, running, ref.pid if ref and running else None, service.address)


def _stop_in_parallel(workers: Sequence[Worker]) -> None:
    """Stop workers with all their children: by their record first, then by their tags, which the children inherit."""

    def stop(worker: Worker) -> None:
        if worker.process is not None:
            stop_session(worker.process, WORKER_STOP_SECONDS)
        stop_tagged(worker.tag)

    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        list(pool.map(stop, workers))


def _ourselves() -> ProcessRef:
    ref = ProcessRef.of(os.getpid())
    assert ref is not None
    return ref


def _socket_folder(recorded: Path | None) -> Path:
    """A private folder with a short path (a socket's path has at most 107 bytes): the recorded folder if this user
    still owns it. After a clean-up of /tmp, the name may belong to another user."""
    try:
        ours = recorded is not None and not recorded.is_symlink() and recorded.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        ours = False
    if recorded is not None and ours:
        folder = recorded
    else:
        short = Path("/tmp")
        base = short if os.access(short, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix="maskwatch-", dir=base))
    for name in ("postgres", "redis"):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    open_to_postgres(folder)
    return folder


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # in somebody else's folder
        return True
