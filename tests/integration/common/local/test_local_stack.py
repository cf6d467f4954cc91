"""The embedded stack starts, stops, survives crashes, and keeps out of everybody else's way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg
import pytest
import redis
from kombu import Connection

from common.domain import MaskwatchError
from common.files import hold
from common.local import postgres, services
from common.local import stack as stack_module
from common.local.processes import ProcessRef, wait_until
from common.local.stack import Endpoints, LocalStack

Query = Callable[..., list[tuple[Any, ...]]]
ProcessesOf = Callable[[Path], list[psutil.Process]]
StartPython = Callable[..., subprocess.Popen[str]]
StartSleep = Callable[..., subprocess.Popen[bytes]]

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def pids(stack: LocalStack) -> dict[str, int | None]:
    return {service.name: service.pid for service in stack.status()}


def lives(pid: int | None) -> bool:
    """Whether the process runs; one that has ended may stay a zombie until its parent, not us, looks at it."""
    ref = ProcessRef.of(pid or 0)
    return ref is not None and ref.alive()


def running(stack: LocalStack) -> bool:
    return all(service.running for service in stack.status())


def recorded(stack: LocalStack) -> dict[str, Any]:
    return dict(json.loads((stack.state_dir / "state.json").read_text()))


def s3_client(endpoints: Endpoints) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoints.s3_endpoint_url,
        aws_access_key_id=endpoints.s3_access_key,
        aws_secret_access_key=endpoints.s3_secret_key,
        region_name=endpoints.s3_region,
    )


def test_all_three_services_can_be_used(stack: LocalStack, query: Query) -> None:
    assert not running(stack)
    assert stack.endpoints() is None
    endpoints = stack.up()
    assert running(stack)
    assert stack.endpoints() == endpoints
    settings = query(endpoints, "SELECT current_setting('server_encoding'), current_setting('timezone'), lower('É')")
    assert settings == [("UTF8", "UTC", "é")]
    with redis.Redis.from_url(endpoints.redis_url) as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    with Connection(endpoints.broker_url) as connection:
        connection.ensure_connection(max_retries=1)
    client = s3_client(endpoints)
    client.create_bucket(Bucket="footage")
    client.put_object(Bucket="footage", Key="a b/ü.jpg", Body=b"\xff\xd8")
    assert client.get_object(Bucket="footage", Key="a b/ü.jpg", Range="bytes=1-1")["Body"].read() == b"\xd8"
    client.close()


def test_a_second_start_adopts_what_runs(stack: LocalStack) -> None:
    first, before = stack.up(), pids(stack)
    assert LocalStack(stack.state_dir).up() == first
    assert pids(stack) == before


def test_data_survive_a_stop_and_a_purge_removes_them(
    stack: LocalStack, query: Query, processes_of: ProcessesOf
) -> None:
    first = stack.up()
    query(first, "CREATE TABLE kept AS SELECT 42 AS answer")
    sockets = Path(recorded(stack)["sockets"])
    stack.down()
    stack.down()  # a second time changes nothing
    assert processes_of(stack.state_dir) == []
    assert not sockets.exists()
    assert not running(stack)
    second = stack.up()
    assert query(second, "SELECT answer FROM kept") == [(42,)]
    assert second.s3_endpoint_url == first.s3_endpoint_url, "the port is kept where it is still free"
    cluster = Path(recorded(stack)["cluster"])
    stack.down(purge=True)
    assert not cluster.exists()
    assert query(stack.up(), "SELECT to_regclass('kept')") == [(None,)]


def test_two_stacks_do_not_meet(make_stack: Callable[[str], LocalStack], query: Query) -> None:
    one, other = make_stack("one"), make_stack("other")
    first, second = one.up(), other.up()
    query(first, "CREATE TABLE mine ()")
    with redis.Redis.from_url(first.redis_url) as client:
        client.set("mine", 1)
    with redis.Redis.from_url(second.redis_url) as client:
        assert client.get("mine") is None
    assert query(second, "SELECT to_regclass('mine')") == [(None,)]
    assert first.s3_endpoint_url != second.s3_endpoint_url
    one.down()
    assert running(other)


def test_passwords_and_sockets_are_for_us_alone(stack: LocalStack) -> None:
    endpoints = stack.up()
    assert stack.state_dir.stat().st_mode & 0o777 == 0o700
    assert (stack.state_dir / "state.json").stat().st_mode & 0o777 == 0o600
    sockets = Path(recorded(stack)["sockets"])
    assert [path.stat().st_mode & 0o777 for path in sorted(sockets.iterdir())] == [0o700, 0o700]
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(host=str(sockets / "postgres"), user="maskwatch", dbname="maskwatch", password="wrong")
    for process in psutil.process_iter(["cmdline"]):
        assert recorded(stack)["password"] not in " ".join(process.info["cmdline"] or [])
    assert recorded(stack)["password"] in endpoints.database_url


SESSION = """
import sys, time
from pathlib import Path
from common.local.stack import LocalStack
stack = LocalStack(Path(sys.argv[1]))
with stack.session() as endpoints:
    print(stack.spawn("worker", [sys.executable, "-c", "import time; time.sleep(600)"], {}), flush=True)
    sys.stdin.readline()
print("left", flush=True)
"""


def enter_session(start_python: StartPython, stack: LocalStack) -> tuple[subprocess.Popen[str], int]:
    """A process that is in a session, and the pid of the worker it has spawned in it."""
    process = start_python(SESSION, stack.state_dir)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def leave_session(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "left\n"


def test_the_last_session_to_end_stops_the_stack(
    stack: LocalStack, start_python: StartPython, processes_of: ProcessesOf
) -> None:
    first, first_worker = enter_session(start_python, stack)
    before = pids(stack)
    second, second_worker = enter_session(start_python, stack)
    leave_session(first)
    assert not lives(first_worker)
    assert lives(second_worker)
    assert running(stack)
    assert before.items() <= pids(stack).items() | {("worker", before["worker"])}, "nothing was restarted"
    leave_session(second)
    second.wait()
    first.wait()
    assert not running(stack)
    assert processes_of(stack.state_dir) == []


def test_a_session_does_not_stop_what_was_started_explicitly(stack: LocalStack) -> None:
    with stack.session() as endpoints:
        assert LocalStack(stack.state_dir).up() == endpoints
    assert running(stack)
    with stack.session():
        pass
    assert running(stack)


def test_a_session_can_leave_the_stack_running(stack: LocalStack) -> None:
    with stack.session(keep=True):
        worker = stack.spawn("worker", SLEEP, {})
    assert running(stack)
    assert not lives(worker)


def test_a_session_that_fails_stops_the_stack(stack: LocalStack, processes_of: ProcessesOf) -> None:
    with pytest.raises(KeyError), stack.session():
        raise KeyError
    assert processes_of(stack.state_dir) == []


def test_a_killed_owner_blocks_nobody(
    stack: LocalStack, start_python: StartPython, query: Query, processes_of: ProcessesOf
) -> None:
    owner, worker = enter_session(start_python, stack)
    before = pids(stack)
    owner.kill()
    owner.wait()
    assert lives(worker), "control: nobody was there to stop it"
    with stack.session() as endpoints:
        assert query(endpoints, "SELECT 1") == [(1,)]
        assert pids(stack).items() <= before.items(), "the services are adopted"
        assert not lives(worker), "the worker of the dead owner is not"
    assert processes_of(stack.state_dir) == []


def test_an_owner_killed_while_starting_blocks_nobody(
    stack: LocalStack, start_python: StartPython, query: Query, processes_of: ProcessesOf
) -> None:
    def kill_after(seconds: float) -> None:
        owner = start_python(SESSION, stack.state_dir)
        assert wait_until((stack.state_dir / "state.json").exists, 60.0)
        time.sleep(seconds)
        owner.kill()
        owner.wait()

    for seconds in (0.0, 0.3, 0.6, 0.9):
        kill_after(seconds)
    assert query(stack.up(), "SELECT 1") == [(1,)]
    names = sorted(process.name() for process in processes_of(stack.state_dir))
    assert len(names) == 3, names
    kill_after(0.1)
    stack.down()
    assert processes_of(stack.state_dir) == []


@pytest.mark.parametrize("name", ["postgres", "redis", "s3"])
def test_a_killed_service_comes_back(stack: LocalStack, query: Query, name: str) -> None:
    query(stack.up(), "CREATE TABLE kept AS SELECT 42 AS answer")
    before = pids(stack)
    killed = ProcessRef.of(before[name] or 0)
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    assert wait_until(lambda: not killed.alive(), 30.0)
    assert [service.name for service in stack.status() if not service.running] == [name]
    assert stack.endpoints() is None
    assert query(stack.up(), "SELECT answer FROM kept") == [(42,)]
    after = pids(stack)
    assert after.pop(name) != before.pop(name)
    assert after == before, "the others are left alone"


def test_a_lock_file_that_names_a_stranger_does_not_block_postgres(
    stack: LocalStack, query: Query, start_sleep: StartSleep
) -> None:
    query(stack.up(), "CREATE TABLE kept AS SELECT 42 AS answer")
    stack.down()
    data = Path(recorded(stack)["cluster"]) / "data"
    owner = data.stat().st_uid
    stranger = start_sleep(user=owner, extra_groups=[]) if os.geteuid() == 0 else start_sleep()
    (data / "postmaster.pid").write_text(f"{stranger.pid}\n{data}\n1\n5432\n/nowhere\n\n")
    shutil.chown(data / "postmaster.pid", owner)
    assert query(stack.up(), "SELECT answer FROM kept") == [(42,)]
    assert stranger.poll() is None


UP = """
import sys
from pathlib import Path
from common.local.stack import LocalStack
sys.stdin.readline()
print(LocalStack(Path(sys.argv[1])).up().environment())
"""


def test_concurrent_starts_make_one_stack(
    stack: LocalStack, start_python: StartPython, processes_of: ProcessesOf
) -> None:
    starters = [start_python(UP, stack.state_dir) for _ in range(4)]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("\n")
        starter.stdin.flush()
    answers = {starter.communicate(timeout=120)[0] for starter in starters}
    assert len(answers) == 1
    endpoints = stack.endpoints()
    assert endpoints is not None
    assert answers == {f"{endpoints.environment()}\n"}
    assert {process.pid for process in processes_of(stack.state_dir)} == set(pids(stack).values())


def test_a_reused_pid_is_never_signalled(stack: LocalStack, processes_of: ProcessesOf, start_sleep: StartSleep) -> None:
    stack.up()
    stack.spawn("worker", SLEEP, {})
    state = recorded(stack)
    time.sleep(0.1)  # start times are told apart by hundredths of a second
    stranger = start_sleep()
    for process in (*state["services"].values(), state["workers"][0]["process"]):
        process["pid"] = stranger.pid
    (stack.state_dir / "state.json").write_text(json.dumps(state))
    assert not any(service.running for service in stack.status())
    stack.down()
    assert stranger.poll() is None
    assert processes_of(stack.state_dir) == [], "what was recorded wrongly is found by its tag"


def test_a_spawned_process_is_recorded_logged_and_stopped(stack: LocalStack) -> None:
    with pytest.raises(MaskwatchError, match="not running"):
        stack.spawn("worker", SLEEP, {})
    stack.up()
    code = "import os, time; print(os.environ['GIVEN'], os.environ['HOME'], flush=True); time.sleep(600)"
    pid = stack.spawn("worker", [sys.executable, "-c", code], {"GIVEN": "given"})
    log = stack.state_dir / "logs" / "worker.log"
    assert wait_until(lambda: log.read_text() == f"given {os.environ['HOME']}\n", 30.0)
    assert pids(stack)["worker"] == pid
    with pytest.raises(MaskwatchError, match="already has a process named worker"):
        stack.spawn("worker", SLEEP, {})
    with stack.session():
        pass  # and its end
    assert not lives(pid)
    assert "worker" not in pids(stack)
    with pytest.raises(MaskwatchError, match="no-such-program"):
        stack.spawn("worker", ["no-such-program"], {})
    crashed = stack.spawn("worker", [sys.executable, "-c", ""], {})
    assert wait_until(lambda: not running(stack), 30.0), "a worker that has ended shows in the status"
    assert stack.spawn("worker", SLEEP, {}) != crashed, "and its name can be used again"


def test_down_stops_the_workers_of_others_even_stubborn_ones(
    stack: LocalStack, start_python: StartPython, processes_of: ProcessesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_module, "WORKER_STOP_SECONDS", 0.5)
    owner, worker = enter_session(start_python, stack)
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf = f"{ignore}; print('deaf', flush=True); time.sleep(600)"
    stack.spawn("stubborn", [sys.executable, "-c", deaf], {})
    assert wait_until(lambda: "deaf" in (stack.state_dir / "logs" / "stubborn.log").read_text(), 30.0)
    stack.down()
    assert not lives(worker)
    assert [p for p in processes_of(stack.state_dir) if p.pid != owner.pid] == []
    leave_session(owner)  # its end finds everything stopped, and is no error
    assert owner.wait() == 0


def test_a_cleaned_tmp_is_recovered_from(stack: LocalStack, query: Query) -> None:
    query(stack.up(), "CREATE TABLE kept AS SELECT 42 AS answer")
    before = pids(stack)
    shutil.rmtree(recorded(stack)["sockets"])
    assert not running(stack)
    assert query(stack.up(), "SELECT answer FROM kept") == [(42,)]
    assert running(stack)
    assert pids(stack)["s3"] == before["s3"]


def test_a_state_deleted_by_hand_leaves_nothing_behind(
    stack: LocalStack, query: Query, processes_of: ProcessesOf
) -> None:
    query(stack.up(), "CREATE TABLE gone ()")
    cluster = Path(recorded(stack)["cluster"])
    before = set(pids(stack).values())
    shutil.rmtree(stack.state_dir)
    assert query(stack.up(), "SELECT to_regclass('gone')") == [(None,)]
    assert not before & {process.pid for process in processes_of(stack.state_dir)}
    shutil.rmtree(stack.state_dir)
    stack.down(purge=True)
    assert processes_of(stack.state_dir) == []
    assert not cluster.exists()


def test_a_copied_state_directory_becomes_a_stack_of_its_own(
    make_stack: Callable[[str], LocalStack], query: Query
) -> None:
    original, copy = make_stack("original"), make_stack("copy")
    endpoints = original.up()
    query(endpoints, "CREATE TABLE kept AS SELECT 42 AS answer")
    before = pids(original)
    shutil.copytree(original.state_dir, copy.state_dir)
    assert not running(copy), "the processes are the original's"
    query(copy.up(), "CREATE TABLE other ()")
    assert query(endpoints, "SELECT answer, to_regclass('other') FROM kept") == [(42, None)]
    copy.down()
    assert pids(original) == before


def test_a_moved_state_directory_takes_its_data_along(make_stack: Callable[[str], LocalStack], query: Query) -> None:
    here, there = make_stack("here"), make_stack("there")
    query(here.up(), "CREATE TABLE kept AS SELECT 42 AS answer")
    before = set(pids(here).values())
    here.state_dir.rename(there.state_dir)  # while it runs
    assert query(there.up(), "SELECT answer FROM kept") == [(42,)]
    assert not before & set(pids(there).values())
    assert not any(lives(pid) for pid in before)


def test_waiting_for_another_start_ends_with_its_name(stack: LocalStack) -> None:
    stack.up()
    with hold(stack.state_dir / "lock"):
        with pytest.raises(MaskwatchError, match=rf"being started or stopped by .*\(pid {os.getpid()}\)"):
            LocalStack(stack.state_dir, lock_seconds=0.2).up()
        assert running(stack), "looking needs no lock"


PURGE = """
import sys
from pathlib import Path
from common.local.stack import LocalStack
LocalStack(Path(sys.argv[1])).down(purge=True)
"""


class TestErrors:
    """Each is one sentence that says what to do."""

    def test_a_folder_with_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "photo.jpg").write_bytes(b"")
        with pytest.raises(MaskwatchError, match="holds other files"):
            LocalStack(tmp_path).up()
        LocalStack(tmp_path).down(purge=True)
        assert (tmp_path / "photo.jpg").exists()

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("")
        with pytest.raises(MaskwatchError, match=r"can't be used \(File exists\)"):
            LocalStack(tmp_path / "state").up()

    def test_a_folder_that_is_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)  # root could write all the same
        with pytest.raises(MaskwatchError, match="not writable"):
            LocalStack(tmp_path).up()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
    def test_a_folder_of_another_user(self, tmp_path: Path) -> None:
        os.chown(tmp_path, 12345, 12345)
        with pytest.raises(MaskwatchError, match=r"belongs to another user \(uid 12345\)"):
            LocalStack(tmp_path).up()

    def test_a_damaged_record(self, tmp_path: Path) -> None:
        (tmp_path / "state.json").write_text("{")
        with pytest.raises(MaskwatchError, match="is damaged"):
            LocalStack(tmp_path).up()

    def test_data_of_another_postgres(self, stack: LocalStack) -> None:
        stack.up()
        stack.down()
        version = Path(recorded(stack)["cluster"]) / "data" / "PG_VERSION"
        version.write_text("17\n")
        with pytest.raises(MaskwatchError, match=r"made by Postgres 17, but the embedded one is 18: dump it"):
            stack.up()
        assert [service.name for service in stack.status() if service.running] == ["redis", "s3"]
        version.write_text("18\n")
        stack.up()

    def test_binaries_that_are_not_installed(self, stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(services.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MaskwatchError, match=r"pip install 'maskwatch\[local\]'"):
            stack.up()

    def test_a_service_that_ends_at_once(self, stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
        broken = stack.state_dir.with_name("broken")
        broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setattr(services, "wheel_file", lambda *_: broken)
        with pytest.raises(MaskwatchError, match=r"redis did not start: it is broken \(log: .*redis.log\)"):
            stack.up()

    def test_postgres_that_can_not_start(self, stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(postgres, "_CONFIGURATION", "max_connections = many\n{sockets}")
        with pytest.raises(MaskwatchError, match=r"postgres did not start: .*FATAL: .*contains errors"):
            stack.up()


@pytest.mark.skipif(os.geteuid() != 0, reason="not run as root")
class TestAsRoot:
    """Postgres runs as an unprivileged user, from folders that this user may enter, and no other is opened to it."""

    @pytest.fixture
    def root_folder(self) -> Iterator[Path]:
        """Takes the place of root's folder; removed with its last stack."""
        above = Path("/var/tmp") / f"maskwatch-test-{os.getpid()}"
        above.mkdir(mode=0o755)
        yield above / "maskwatch"
        above.rmdir()

    def test_no_folder_above_is_opened(self, stack: LocalStack) -> None:
        above = [stack.state_dir.parent, *stack.state_dir.parent.parents]
        modes = [folder.stat().st_mode for folder in above]
        assert any(mode & 0o001 == 0 for mode in modes), "control: others may not pass to the state directory"
        stack.up()
        assert [folder.stat().st_mode for folder in above] == modes
        assert psutil.Process(pids(stack)["postgres"] or 0).username() == postgres.UNPRIVILEGED

    @pytest.mark.parametrize("writable", [True, False], ids=["var-lib", "read-only"])
    def test_folders_are_entered_whatever_the_umask_and_removed_with_the_last_stack(
        self,
        root_folder: Path,
        make_stack: Callable[[str], LocalStack],
        monkeypatch: pytest.MonkeyPatch,
        query: Query,
        writable: bool,
    ) -> None:
        monkeypatch.setattr(postgres, "ROOT_FOLDER", root_folder if writable else Path("/proc/maskwatch"))
        before = os.umask(0o077)
        try:
            one, other = make_stack("one"), make_stack("other")
            query(one.up(), "CREATE TABLE kept ()")
            base = Path(recorded(one)["cluster"]).parent.parent
            assert base == root_folder if writable else base.parent == Path("/var/tmp")
            other.up()
            one.down(purge=True)
            assert base.exists() or not writable, "the other stack still runs from there"
            other.down(purge=True)
            assert not base.exists()
        finally:
            os.umask(before)

    def test_data_of_deleted_scratch_folders_are_removed(
        self, root_folder: Path, make_stack: Callable[[str], LocalStack], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgres, "ROOT_FOLDER", root_folder)  # else stacks of other processes remove both
        deleted, moved = make_stack("deleted"), make_stack("moved")
        clusters = []
        for stack in (deleted, moved):
            stack.up()
            clusters.append(Path(recorded(stack)["cluster"]))
            stack.down()
        shutil.rmtree(deleted.state_dir)
        monkeypatch.setattr(postgres, "TEMPORARY", (str(deleted.state_dir),))
        moved.state_dir.rename(moved.state_dir.with_name("elsewhere"))
        make_stack("new").up()
        assert [cluster.exists() for cluster in clusters] == [False, True], "what may come back stays"
        moved.state_dir.with_name("elsewhere").rename(moved.state_dir)

    def test_two_users_at_once(
        self, stack: LocalStack, start_python: StartPython, query: Query, tmp_path: Path
    ) -> None:
        user = postgres.UNPRIVILEGED
        python = [sys.executable, "-c", "import common.local.stack"]
        try:
            subprocess.run(python, user=user, extra_groups=[], stderr=subprocess.DEVNULL, cwd="/", check=True)
        except (PermissionError, subprocess.CalledProcessError):
            pytest.skip(f"{user} can't run this Python: it is installed in a private folder")
        endpoints = stack.up()
        theirs = Path("/var/tmp") / f"maskwatch-test-{os.getpid()}"
        theirs.mkdir(mode=0o700)
        shutil.chown(theirs, user)
        try:
            other = start_python(UP, theirs / "state", user=user, extra_groups=[], cwd="/")
            assert "MASKWATCH_DATABASE__URL" in other.communicate("\n", timeout=120)[0]
            assert query(endpoints, "SELECT 1") == [(1,)]
            assert start_python(PURGE, theirs / "state", user=user, extra_groups=[], cwd="/").wait(120) == 0
            assert running(stack)
        finally:
            shutil.rmtree(theirs)
