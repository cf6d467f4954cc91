"""Redis with users, passwords and TLS: each role does its work and nothing else, and a refusal says what is wrong."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import pytest
from kombu.transport import redis as redis_transport
from redis.exceptions import NoPermissionError, RedisError
from sqlalchemy.orm import Session

from common.messaging import kombu_patches
from common.messaging.broker import BrokerDownError, BrokerRefusedError, redis_client
from common.messaging.queues import EPOCH_KEY, Queue, TaskName, queue_length, send
from tests.ledger_rows import scalar, states
from tests.photos import face_jpeg
from tests.redis_server import (
    PASSWORD,
    ROLES,
    SHIPPED,
    Certificates,
    Server,
    redis_server,
    server_with_tls,
    shipped_users,
    tls_in_front,
)
from tests.services import QUICK, Bucket, Services, forget_settings, locate, maskwatch, running, wait_until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Redis with the users of docs/redis.acl."""
    with redis_server(tmp_path, "--aclfile", str(shipped_users(tmp_path))) as server:
        yield server


@pytest.fixture
def use(services: Services, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Let this process, and those it starts, use a broker."""

    def use(environment: dict[str, str]) -> None:
        for name, value in {**QUICK, **environment}.items():
            monkeypatch.setenv(name, value)
        forget_settings()

    return use


Use = Callable[[dict[str, str]], None]

# --- users ---


class Monitor:
    """Which commands each user sends, from now on."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._users: dict[str, str] = {}  # by address
        self._sent: list[tuple[str, str]] = []
        for work in (self._look_up, self._listen):
            Thread(target=self._until_the_server_stops, args=(work,), daemon=True).start()
        with server.client() as client:
            wait_until(lambda: client.ping() and self._sent, what="a monitor that sees commands")

    def commands(self, user: str) -> set[str]:
        # Looked up at the end: a connection has sent its first commands before anybody can know whose it is.
        return {command for address, command in self._sent if self._users.get(address) == user}

    def _look_up(self) -> None:
        with self._server.client() as client:
            while True:
                self._users.update({entry["addr"]: entry["user"] for entry in client.client_list()})
                time.sleep(0.002)

    def _listen(self) -> None:
        with self._server.client().monitor() as monitor:
            for entry in monitor.listen():
                address = f"{entry['client_address']}:{entry['client_port']}"
                self._sent.append((address, entry["command"].split()[0].lower()))

    @staticmethod
    def _until_the_server_stops(work: Callable[[], None]) -> None:
        with suppress(RedisError, OSError, ValueError):
            work()


def abandon(server: Server, queue: Queue) -> None:
    """Leave a message in hand of a consumer that died long ago, as kombu keeps them."""
    task = {Queue.MEDIA: TaskName.ANALYZE, Queue.PRODUCER: TaskName.DISPATCH, Queue.AGGREGATION: TaskName.SUMMARIZE}
    send(task[queue], ([[1, str(uuid.uuid4())]],) if queue is Queue.MEDIA else ())
    with server.client() as admin:
        message = json.loads(str(admin.rpop(queue.value)))
        admin.hset(f"{queue.value}.unacked", "old", json.dumps([message, queue.value, queue.value]))
        admin.zadd(f"{queue.value}.unacked_index", {"old": 1.0})


def test_three_users_work_end_to_end_and_have_no_right_that_none_needs(
    server: Server, use: Use, session: Session, bucket: Bucket, tmp_path: Path
) -> None:
    use(server.environment("producer"))
    locate()
    for number in range(3):
        bucket.put(f"{number}.jpg", face_jpeg(number))
    for queue in Queue:
        abandon(server, queue)
    monitor = Monitor(server)
    with ExitStack() as exits:
        for role in ROLES:
            exits.enter_context(running(role, log=tmp_path / f"{role}.log", env=server.environment(role)))
        assert maskwatch("backfill", bucket.uri, "--location", "lobby", timeout=300).returncode == 0

        def done() -> bool:
            session.rollback()
            return states(session) == {"succeeded": 3} and not scalar(session, "SELECT count(*) FROM dirty_marks")

        wait_until(done, seconds=180, what="everything, by three users")
        with server.client() as admin:
            keys = [f"{queue.value}.unacked" for queue in Queue]
            wait_until(lambda: not admin.exists(*keys), what="the return of what nobody had acknowledged")
        assert maskwatch("status").returncode == 0
    assert scalar(session, "SELECT sum(faces) FROM compliance_hourly") == 3
    for role in ROLES:
        log = (tmp_path / f"{role}.log").read_text()
        assert "the broker refused" not in log and "no permissions" not in log
        # A message put back at the front, and a lock that was lost, take these; here nothing goes wrong. `auth` is for
        # clients of the older protocol.
        assert granted(role) - monitor.commands(f"maskwatch-{role}") <= {"auth", "unwatch", "lpush"}, role


def granted(role: str) -> set[str]:
    """The commands of a role in docs/redis.acl."""
    (line,) = [line for line in SHIPPED.read_text().splitlines() if line.startswith(f"user maskwatch-{role} ")]
    return {word[1:] for word in line.split() if word.startswith("+")}


#: What a role may not do; `None` for all of them.
FORBIDDEN: list[tuple[str | None, tuple[Any, ...]]] = [
    (None, ("FLUSHALL",)),
    (None, ("FLUSHDB",)),
    (None, ("CONFIG", "GET", "maxmemory")),
    (None, ("CONFIG", "SET", "maxmemory", "0")),
    (None, ("KEYS", "*")),
    (None, ("SCAN", "0")),
    (None, ("EVAL", "return 1", "0")),
    (None, ("SCRIPT", "LOAD", "return 1")),
    (None, ("ACL", "LIST")),
    (None, ("CLIENT", "LIST")),
    (None, ("DEBUG", "OBJECT", "maskwatch.epoch")),
    (None, ("INFO",)),
    (None, ("SLOWLOG", "GET")),
    (None, ("PUBLISH", "x", "y")),
    (None, ("SET", "another", "x")),
    (None, ("GET", "another")),
    ("worker", ("SET", EPOCH_KEY, "x")),
    ("worker", ("GET", EPOCH_KEY)),
    ("worker", ("LPUSH", "maskwatch.producer", "x")),
    ("worker", ("DEL", "maskwatch.aggregation")),
    ("aggregator", ("SET", EPOCH_KEY, "x")),
    ("aggregator", ("LPUSH", "maskwatch.media", "x")),
    ("aggregator", ("BRPOP", "maskwatch.media", "1")),
    ("producer", ("HSET", "maskwatch.media.unacked", "x", "y")),
]


def test_no_user_may_do_more(server: Server) -> None:
    with server.client() as admin:
        admin.lpush("maskwatch.media", "x")
        admin.set(EPOCH_KEY, "epoch")
    for role in ROLES:
        with server.client(f"maskwatch-{role}") as client:
            assert client.llen(f"maskwatch.{ {'worker': 'media', 'aggregator': 'aggregation'}.get(role, role) }") >= 0
            for only, command in FORBIDDEN:
                if only in (None, role):
                    with pytest.raises(NoPermissionError):
                        client.execute_command(*command)
    with server.client() as admin:
        assert admin.get(EPOCH_KEY) == "epoch" and admin.llen("maskwatch.media") == 1


def test_without_these_users_all_of_that_works(tmp_path: Path) -> None:
    """The control."""
    with redis_server(tmp_path) as open_to_all, open_to_all.client(user=None) as client:
        for _, command in FORBIDDEN:
            if command[0] == "DEBUG":
                client.set(EPOCH_KEY, "x")
            if command[0] == "BRPOP":
                client.lpush("maskwatch.media", "x")
            client.execute_command(*command)


def test_the_file_as_shipped_lets_nobody_in(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--aclfile", str(SHIPPED)) as server:
        for user in (None, "maskwatch-admin", *(f"maskwatch-{role}" for role in ROLES)):
            with (
                server.client(user, password="") as client,
                pytest.raises(Exception, match=r"(?i)auth|password|NOPERM"),
            ):
                client.ping()


def test_our_lock_needs_no_script_and_kombus_does(server: Server) -> None:
    with server.client("maskwatch-worker") as client:
        client.connection_pool.connection_kwargs["decode_responses"] = False
        name = "maskwatch.media.unacked_mutex"
        with (
            kombu_patches.mutex(client, name, 300),
            pytest.raises(redis_transport.MutexHeld),
            kombu_patches.mutex(client, name, 300),
        ):
            pytest.fail("two at once")
        with kombu_patches.mutex(client, name, 300):
            # It has run out, and somebody else has taken it.
            client.set(name, b"another")
        assert client.get(name) == b"another"
        client.delete(name)
        with pytest.raises(NoPermissionError), client.lock(name, timeout=300):
            pass


# --- passwords ---


def test_a_wrong_password_is_told_at_the_start(server: Server, use: Use) -> None:
    use(server.environment("producer"))
    wrong = "wr0ng-s3cret"
    for role in ROLES:
        done = maskwatch(role, env=server.environment(role, wrong))
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1
        assert f"refused the login of the user maskwatch-{role}" in last and "MASKWATCH_BROKER__PASSWORD" in last
        assert wrong not in done.stdout + done.stderr and "Traceback" not in done.stderr
    done = maskwatch("status", env=server.environment("producer", wrong))
    assert done.returncode == 1 and "refused the login of the user maskwatch-producer" in done.stderr


def test_a_missing_right_is_told_at_the_start(server: Server, use: Use) -> None:
    use(server.environment("producer"))
    done = maskwatch("aggregator", env=server.environment("worker"))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert "refused a command of the user maskwatch-worker" in last and "redis.acl" in last


def test_a_password_that_changes_in_its_file_needs_no_restart(server: Server, use: Use, tmp_path: Path) -> None:
    # Ours is in the URL: a variable of the password would be inherited, and goes before the file.
    use({"MASKWATCH_BROKER__URL": f"redis://maskwatch-producer:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0"})
    file = tmp_path / "secrets" / "MASKWATCH_BROKER__PASSWORD"
    file.parent.mkdir()
    file.write_text(PASSWORD + "\n")
    environment = {name: value for name, value in server.environment("aggregator").items() if "PASSWORD" not in name}
    environment["MASKWATCH_SECRETS_DIR"] = str(file.parent)
    log = tmp_path / "aggregator.log"
    with running("aggregator", log=log, env=environment) as process, server.client() as admin:

        def waiting() -> int:
            return int(admin.llen(Queue.AGGREGATION.value))

        send(TaskName.SUMMARIZE, ())
        wait_until(lambda: " ready." in log.read_text() and not waiting(), seconds=180, what="the first message")
        admin.acl_setuser("maskwatch-aggregator", enabled=True, reset_passwords=True, passwords=["+a-new-one"])
        admin.execute_command("CLIENT", "KILL", "USER", "maskwatch-aggregator")
        wait_until(lambda: "invalid username-password pair" in log.read_text(), what="a refusal")
        send(TaskName.SUMMARIZE, ())
        time.sleep(3)
        assert waiting() == 1  # the control: with the old password nobody is let in
        file.write_text("a-new-one\n")
        wait_until(lambda: not waiting(), seconds=180, what="the second message, with the new password")
        assert process.poll() is None
    assert PASSWORD not in log.read_text() and "a-new-one" not in log.read_text()


# --- doctor ---


def checks(env: dict[str, str]) -> dict[str, dict[str, Any]]:
    done = maskwatch("doctor", "--json", env=env)
    return {entry["check"]: entry for entry in json.loads(done.stdout)}


def test_doctor_makes_do_without_a_right(server: Server, use: Use) -> None:
    use({})
    with server.client() as admin:
        admin.config_set("maxmemory", str(64 * 2**20))
    limited, all_rights = checks(server.environment("producer")), checks(server.environment("admin"))
    assert limited["broker reachable"]["ok"] and limited["broker keeps messages"]["ok"] is None
    assert "broker memory" not in limited
    assert limited["broker"]["detail"] == f"127.0.0.1:{server.port}; user maskwatch-producer, with a password, no TLS"
    assert all_rights["broker keeps messages"]["ok"] and all_rights["broker memory"]["detail"] == "at most 64 MiB"
    with server.client() as admin:
        admin.config_set("maxmemory-policy", "allkeys-lru")
    assert checks(server.environment("admin"))["broker keeps messages"]["ok"] is False
    wrong = checks(server.environment("producer", "wrong"))
    assert wrong["broker reachable"]["ok"] is False and "refused the login" in wrong["broker reachable"]["detail"]


# --- TLS ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    pytest.importorskip("cryptography", reason="certificates are made with `cryptography`")
    return Certificates(tmp_path_factory.mktemp("tls") / "files")


@pytest.fixture(params=["in front of it", "its own"])
def tls(
    request: pytest.FixtureRequest, tmp_path: Path, certificates: Certificates
) -> Iterator[Callable[..., dict[str, str]]]:
    """Start a Redis with TLS and return the settings that fit it; one that a Redis was built with, and one that
    stands in front of the wheel's, which has none."""
    program = server_with_tls()
    if request.param == "its own" and program is None:
        pytest.skip("no redis-server with TLS is on the PATH")
    with ExitStack() as stack:
        users = ("--aclfile", str(shipped_users(tmp_path)))

        def start(*, for_host: str = "127.0.0.1", wants_certificate: bool = False) -> dict[str, str]:
            if request.param == "its own":
                certificate, key = certificates.sign(for_host)
                options = {
                    "tls-cert-file": certificate,
                    "tls-key-file": key,
                    "tls-ca-cert-file": certificates.authority,
                    "tls-auth-clients": "yes" if wants_certificate else "no",
                }
                flat = [part for name, value in options.items() for part in (f"--{name}", str(value))]
                server = stack.enter_context(redis_server(tmp_path, *users, *flat, program=program, plain=False))
                port = server.port
            else:
                server = stack.enter_context(redis_server(tmp_path, *users))
                context = certificates.server_context(for_host=for_host, wants_certificate=wants_certificate)
                port = stack.enter_context(tls_in_front(server, context))
            return {
                **server.environment("producer"),
                "MASKWATCH_BROKER__URL": f"rediss://127.0.0.1:{port}/0",
                "MASKWATCH_BROKER__CA_FILE": str(certificates.authority),
            }

        yield start


def both_ways() -> None:
    """Our own client and kombu's."""
    with redis_client() as client:
        before = queue_length(client, Queue.AGGREGATION)
    send(TaskName.SUMMARIZE, ())
    with redis_client() as client:
        assert queue_length(client, Queue.AGGREGATION) == before + 1


def refused_both_ways(words: str) -> None:
    for way in (lambda: send(TaskName.SUMMARIZE, ()), lambda: queue_length(redis_client(), Queue.MEDIA)):
        with pytest.raises(BrokerRefusedError, match=words) as refusal:
            way()
        assert "\n" not in str(refusal.value) and PASSWORD not in str(refusal.value)


def test_tls_all_the_way(tls: Callable[..., dict[str, str]], use: Use, tmp_path: Path) -> None:
    environment = tls()
    use(environment)
    both_ways()
    log = tmp_path / "aggregator.log"
    user = {"MASKWATCH_BROKER__USERNAME": "maskwatch-aggregator"}
    with running("aggregator", log=log, env=user), redis_client() as client:
        wait_until(lambda: queue_length(client, Queue.AGGREGATION) == 0, seconds=180, what="a message to be taken")
    assert "rediss://" in log.read_text() and PASSWORD not in log.read_text()
    assert checks({})["broker"]["detail"].endswith("with a password, TLS")


def test_a_certificate_of_another_authority_is_refused(
    tls: Callable[..., dict[str, str]], use: Use, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    other = Certificates(tmp_path / "other")
    use({**tls(), "MASKWATCH_BROKER__CA_FILE": str(other.authority)})
    refused_both_ways("certificate is not valid .*CA_FILE")
    done = maskwatch("aggregator")
    assert done.returncode == 1 and "certificate is not valid" in done.stderr.splitlines()[-1]


def test_a_certificate_for_another_host_is_refused_unless_that_is_wanted(
    tls: Callable[..., dict[str, str]], use: Use
) -> None:
    environment = tls(for_host="elsewhere.example")
    use(environment)
    refused_both_ways("certificate is not valid")
    use({"MASKWATCH_BROKER__CHECK_HOSTNAME": "false"})
    both_ways()


def test_a_client_certificate_is_shown_where_one_is_wanted(
    tls: Callable[..., dict[str, str]], use: Use, certificates: Certificates
) -> None:
    use(tls(wants_certificate=True))
    for way in (lambda: send(TaskName.SUMMARIZE, ()), lambda: queue_length(redis_client(), Queue.MEDIA)):
        with pytest.raises(BrokerDownError):
            way()
    certificate, key = certificates.sign("a-client")
    use({"MASKWATCH_BROKER__CERTIFICATE_FILE": str(certificate), "MASKWATCH_BROKER__KEY_FILE": str(key)})
    both_ways()


def test_tls_on_one_side_only_is_told(server: Server, use: Use, certificates: Certificates) -> None:
    environment = {**server.environment("producer"), "MASKWATCH_BROKER__SOCKET_TIMEOUT_SECONDS": "2"}
    use({**environment, "MASKWATCH_BROKER__URL": f"rediss://127.0.0.1:{server.port}/0"})
    with pytest.raises(BrokerDownError, match="does this port speak TLS"):
        queue_length(redis_client(), Queue.MEDIA)
    with tls_in_front(server, certificates.server_context()) as port:
        use({**environment, "MASKWATCH_BROKER__URL": f"redis://127.0.0.1:{port}/0"})
        with pytest.raises(BrokerDownError, match="does it need TLS"):
            queue_length(redis_client(), Queue.MEDIA)
