"""Versions side by side: who may work on a newer schema, what an older program says, and what a migration may do."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.orm import Session

import migrations
from common import __version__, ledger
from common.cli.parts import deployment
from common.cli.parts.deployment import wait_for_permission
from common.database import versions
from common.database.sessions import SCHEMA_REVISION, session_scope
from common.database.versions import (
    AGGREGATION_LOCK,
    MIGRATION_LOCK,
    NewerSchemaError,
    OutdatedProgramError,
    Part,
    check_part,
    check_schema,
    hold_schema,
    parse,
)
from common.domain import MaskwatchError
from common.messaging.queues import encode_refs
from common.settings import get_settings
from migrations.compatibility import set_oldest
from tests import ROOT
from tests.ledger_rows import claim, dispatch, face, planned, register, rows, scalar, states
from tests.services import forget_settings, maskwatch, running, wait_until
from workers import tasks
from workers.jobs import attempts
from workers.jobs.recording import record_image
from workers.jobs.run import run_jobs
from workers.summaries.aggregation import summarize, summarize_batch

#: A version that no program of these tests has reached, and a revision that none knows.
NEWER, NEWER_REVISION = "99.0.0", "9999"


@pytest.fixture
def engine(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A migrated database of this test's own, which the settings name."""
    engine = create_engine(empty_database)
    migrations.upgrade(engine)
    monkeypatch.setenv("MASKWATCH_DATABASE__URL", empty_database)
    forget_settings()
    attempts.check_version.cache_clear()
    yield engine
    forget_settings()
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine, expire_on_commit=False) as session:
        yield session
        session.rollback()


def migrate_on(engine: Engine, **oldest: str) -> None:
    """What a migration of a later version leaves: a revision of its own, and the oldest version of some parts."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :new"), {"new": NEWER_REVISION})
        for part, version in oldest.items():
            write_oldest(connection, part, version)


def write_oldest(connection: Any, part: str, version: str) -> None:
    connection.execute(
        text("UPDATE oldest_versions SET version = :version WHERE part = :part"), {"part": part, "version": version}
    )


# --- a program and its version ---


def test_the_package_says_the_same_version() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"] == __version__
    assert len(parse(__version__)) == 3
    done = maskwatch("--version")
    assert done.returncode == 0 and done.stdout.rstrip().endswith(f"version {__version__}")


def test_versions_are_compared_as_numbers() -> None:
    assert parse("0.9.0") < parse("0.10.0") < parse("1.0.0")
    assert not "0.9.0" < "0.10.0"


@pytest.mark.parametrize("version", ["1.0", "1.0.0-rc1", "v1.0.0", ""])
def test_the_schema_takes_no_version_that_can_not_be_compared(session: Session, version: str) -> None:
    with pytest.raises(Exception, match="ck_oldest_versions_version"):
        write_oldest(session, "worker", version)


# --- at the start of a program ---


def test_a_newer_schema_is_no_error_for_who_may_go_on(engine: Engine) -> None:
    migrate_on(engine)
    for part in Part:
        check_schema(part)
        wait_for_permission(part)
    done = maskwatch("status", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["version"] == __version__
    assert shown["schema"] == {"revision": NEWER_REVISION, "oldest_versions": dict.fromkeys(sorted(Part), "0.2.0")}


@pytest.mark.parametrize("part", list(Part))
def test_the_oldest_version_counts_for_its_part_alone(engine: Engine, part: Part) -> None:
    migrate_on(engine, **{part.value: NEWER})
    with pytest.raises(OutdatedProgramError, match=f"Maskwatch {__version__}.*{NEWER}.*{part.value}"):
        check_schema(part)
    for other in set(Part) - {part}:
        check_schema(other)


def test_the_version_itself_may_go_on(engine: Engine) -> None:
    migrate_on(engine, **dict.fromkeys(Part, __version__))
    for part in Part:
        check_schema(part)


def test_a_part_that_the_schema_does_not_name_may_go_on(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM oldest_versions"))
    for part in Part:
        check_schema(part)


def test_a_command_that_is_too_old_says_one_line(engine: Engine) -> None:
    migrate_on(engine, command=NEWER)
    for arguments in (("status",), ("locations", "list"), ("db", "grant")):
        done = maskwatch(*arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert f"install Maskwatch {NEWER} or newer" in " ".join(done.stderr.split())
        assert "db upgrade" not in done.stderr


def test_an_older_schema_is_still_to_be_migrated(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    done = maskwatch("status")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "maskwatch db upgrade" in done.stderr


def test_a_revision_of_another_program_is_named(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'ae1027a6acf'"))
    for arguments in (("status",), ("db", "upgrade")):
        done = maskwatch(*arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "ae1027a6acf" in done.stderr and "db upgrade" not in done.stderr


@pytest.mark.parametrize("part", [Part.PRODUCER, Part.WORKER, Part.AGGREGATOR])
def test_a_program_that_is_too_old_says_one_line_and_waits(engine: Engine, part: Part, tmp_path: Path) -> None:
    migrate_on(engine, **{part.value: NEWER})
    log = tmp_path / "log"
    with running(part.value, log=log) as process:
        wait_until(lambda: "install Maskwatch" in log.read_text(), what="the line")
        assert process.poll() is None
    (line,) = log.read_text().splitlines()
    assert f"install Maskwatch {NEWER} or newer" in line and "db upgrade" not in line


def test_who_waits_says_so_once_and_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate_on(engine, worker=NEWER)
    turns: list[float] = []

    def sleep(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 3:
            with engine.begin() as connection:
                write_oldest(connection, "worker", __version__)

    monkeypatch.setattr(deployment.time, "sleep", sleep)
    wait_for_permission(Part.WORKER)
    assert turns == [deployment.WAIT_SECONDS] * 3
    assert " ".join(capsys.readouterr().err.split()).count("the worker waits, because its version may not work") == 1


def test_doctor_names_the_parts_that_are_too_old(engine: Engine) -> None:
    def look() -> dict[str, Any]:
        (row,) = [row for row in json.loads(maskwatch("doctor", "--json").stdout) if row["check"] == "versions"]
        return dict(row)

    fine = look()
    assert fine["ok"] and f"this is {__version__}; schema {SCHEMA_REVISION}" in fine["detail"]
    migrate_on(engine, aggregator=NEWER)
    found = look()
    assert not found["ok"] and found["detail"].endswith("too old here: aggregator")


def test_what_a_newer_schema_has_dropped_is_no_reason_to_migrate(engine: Engine) -> None:
    def read() -> str:
        with pytest.raises(MaskwatchError) as caught, session_scope() as session:
            session.execute(text("SELECT * FROM camera_slots"))
        return str(caught.value)

    with engine.begin() as connection:
        connection.execute(text("DROP TABLE camera_slots"))
    assert "maskwatch db upgrade" in read()
    migrate_on(engine)
    assert "install a newer Maskwatch" in read() and "db upgrade" not in read()


# --- db upgrade and db grant of an earlier version ---

#: All that `db upgrade` can change: tables, columns, partitions, and the revision.
EVERYTHING = """
SELECT table_name, column_name, data_type, is_nullable, version_num
FROM information_schema.columns, alembic_version
WHERE table_schema = 'public'
ORDER BY 1, 2
"""


def test_an_older_upgrade_changes_nothing_and_says_so(engine: Engine, session: Session) -> None:
    migrate_on(engine)
    session.execute(text("DROP TABLE IF EXISTS faces_2001_01"))
    before = rows(session, EVERYTHING)
    done = maskwatch("db", "upgrade")
    sentence = " ".join(done.stderr.split())
    assert done.returncode == 0 and done.stderr.count("\n") == 1  # so that going back needs no other steps
    assert f"(schema {NEWER_REVISION})" in sentence and "nothing was changed" in sentence
    assert f"version {__version__} can still work on it" in sentence
    assert rows(session, EVERYTHING) == before
    migrate_on(engine, producer=NEWER)
    done = maskwatch("db", "upgrade")
    sentence = " ".join(done.stderr.split())
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "nothing was changed" in sentence and f"install Maskwatch {NEWER} or newer" in sentence
    assert rows(session, EVERYTHING) == before


def test_an_upgrade_that_knows_the_schema_makes_partitions(engine: Engine, session: Session) -> None:
    """The control of what is looked at."""
    before = rows(session, EVERYTHING)
    assert maskwatch("db", "upgrade").returncode == 0
    assert rows(session, EVERYTHING) != before


def test_an_older_upgrade_that_waited_for_a_newer_one_changes_nothing(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as threads, engine.connect() as newer:
        newer.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        older = threads.submit(migrations.upgrade, engine)
        wait_until(lambda: older.done() or waits(engine, MIGRATION_LOCK), what="waiting for the newer one")
        assert not older.done()
        newer.execute(text("UPDATE alembic_version SET version_num = :new"), {"new": NEWER_REVISION})
        newer.commit()
        newer.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})
        newer.commit()
        with pytest.raises(NewerSchemaError, match="nothing was changed"):
            older.result(timeout=60)


def test_an_older_grant_takes_no_right_of_a_newer_version(engine: Engine) -> None:
    migrate_on(engine)
    for arguments in (("db", "grant"), ("db", "grant", "--print")):
        done = maskwatch(*arguments)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stdout == ""
        assert "nothing was changed" in " ".join(done.stderr.split())


def test_a_migration_waits_for_who_grants_rights(engine: Engine) -> None:
    with ThreadPoolExecutor(1) as threads, Session(engine) as granting, granting.begin():
        hold_schema(granting)
        newer = threads.submit(migrations.upgrade, engine)
        wait_until(lambda: newer.done() or waits(engine, MIGRATION_LOCK), what="waiting for the grant")
        assert not newer.done()
        granting.commit()
        newer.result(timeout=60)


def waits(engine: Engine, lock: int) -> bool:
    query = """
    SELECT EXISTS (
        SELECT FROM pg_locks
        WHERE locktype = 'advisory' AND NOT granted AND objid = CAST(:lock AS oid)
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    )
    """
    with engine.connect() as connection:
        return bool(connection.scalar(text(query), {"lock": lock}))


# --- the aggregator ---


def mark_an_hour(session: Session) -> None:
    register(session, planned("a.jpg"))
    (job,) = claim(session, dispatch(session))
    assert job.observed_at is not None
    record_image(session, job, [face()], job.observed_at)
    session.commit()


MARKS, SUMMARIZED = "SELECT count(*) FROM dirty_marks", "SELECT sum(faces)::int FROM compliance_hourly"


def test_an_aggregator_that_is_too_old_takes_no_marks(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    mark_an_hour(session)
    write_oldest(session, "aggregator", NEWER)
    session.commit()
    with pytest.raises(OutdatedProgramError, match="aggregator"):
        summarize()
    assert (scalar(session, MARKS), scalar(session, SUMMARIZED)) == (1, None)
    done = maskwatch("summarize")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "aggregator" in done.stderr
    write_oldest(session, "aggregator", __version__)
    session.commit()
    assert summarize() == 1
    assert (scalar(session, MARKS), scalar(session, SUMMARIZED)) == (0, 1)


def test_an_aggregator_at_work_says_once_that_it_waits(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    mark_an_hour(session)
    write_oldest(session, "aggregator", NEWER)
    session.commit()
    told: list[str] = []
    monkeypatch.setattr(tasks.log, "error", lambda line, detail: told.append(f"{line}: {detail}"))
    tasks._tell_once.cache_clear()
    for _ in range(3):
        tasks.summarize()
    (line,) = told
    assert "waits" in line and f"install Maskwatch {NEWER} or newer" in line
    write_oldest(session, "aggregator", __version__)
    session.commit()
    tasks.summarize()
    assert scalar(session, SUMMARIZED) == 1


def write_with_the_lock(connection: Any) -> None:
    """As a migration does."""
    with Operations.context(MigrationContext.configure(connection)):
        set_oldest(producer="0.2.0", worker="0.2.0", aggregator=NEWER, command="0.2.0")


def write_without_the_lock(connection: Any) -> None:
    write_oldest(connection, "aggregator", NEWER)


def test_a_migration_waits_for_the_marks_that_are_being_taken(engine: Engine, session: Session) -> None:
    mark_an_hour(session)
    assert overtake(engine, write_with_the_lock) == "waits"
    assert (scalar(session, MARKS), scalar(session, SUMMARIZED)) == (0, 1)


def test_without_the_lock_an_aggregator_would_write_after_the_migration(engine: Engine, session: Session) -> None:
    mark_an_hour(session)
    assert overtake(engine, write_without_the_lock) == "ends"


def overtake(engine: Engine, write: Callable[[Any], None]) -> str:
    """An aggregator has found that it may go on, and has not committed, when a migration begins. Tells whether the
    migration "waits" for the aggregator, or "ends" before it."""

    def migrate() -> None:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            write(connection)
            # A migration's own lock timeout is back.
            assert connection.scalar(text("SHOW lock_timeout")) == "10s"

    with ThreadPoolExecutor(1) as threads, Session(engine) as aggregator, aggregator.begin():
        assert summarize_batch(aggregator, 100) == (1, 1)
        migration = threads.submit(migrate)
        wait_until(lambda: migration.done() or waits(engine, AGGREGATION_LOCK), what="waiting, or ending")
        outcome = "ends" if migration.done() else "waits"
        aggregator.commit()
        migration.result(timeout=60)
    return outcome


def test_an_aggregator_that_waited_for_a_migration_sees_what_it_wrote(engine: Engine, session: Session) -> None:
    mark_an_hour(session)

    def aggregate() -> tuple[int, int]:
        with Session(engine) as own, own.begin():
            return summarize_batch(own, 100)

    with ThreadPoolExecutor(1) as threads, engine.begin() as migration:
        write_with_the_lock(migration)
        batch = threads.submit(aggregate)
        wait_until(lambda: batch.done() or waits(engine, AGGREGATION_LOCK), what="waiting for the migration")
        assert not batch.done()
        migration.commit()
        with pytest.raises(OutdatedProgramError):
            batch.result(timeout=60)
    assert (scalar(session, MARKS), scalar(session, SUMMARIZED)) == (1, None)


def test_an_aggregator_that_looked_before_its_lock_would_go_on(engine: Engine, session: Session) -> None:
    mark_an_hour(session)

    def looks_too_early(migration: Any) -> tuple[int, int]:
        with Session(engine) as own, own.begin():
            check_part(own, Part.AGGREGATOR)
            write_with_the_lock(migration)
            migration.commit()
            own.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": AGGREGATION_LOCK})
            return len(own.execute(text("DELETE FROM dirty_marks RETURNING id")).all()), 0

    with engine.connect() as migration:
        assert looks_too_early(migration) == (1, 0)
    assert scalar(session, MARKS) == 0


# --- a worker ---


def test_a_child_of_a_worker_that_is_too_old_gives_its_jobs_back(session: Session) -> None:
    register(session, planned("a.jpg"))
    refs = dispatch(session)
    write_oldest(session, "worker", NEWER)
    session.commit()
    with pytest.raises(attempts.UnfitWorkerError, match=f"install Maskwatch {NEWER}"):
        run_jobs(refs, worker="w/1", settings=get_settings())
    assert rows(session, "SELECT state, attempt, failures FROM jobs") == [("pending", 0, 0)]


def know_more(session: Session, change: str) -> None:
    """What a newer version writes into a pipeline's spec."""
    session.execute(text("UPDATE pipelines SET spec = spec || CAST(:change AS jsonb)"), {"change": change})
    session.commit()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ('{"tracker": "bytes"}', "tracker"),
        ('{"detector": {"name": "centerface", "sha256": "0", "tiles": 4}}', "detector.tiles"),
        ('{"sample": "scenes"}', "sample scenes"),
        ('{"revision": 2}', "revision 2"),
    ],
)
def test_a_job_that_only_a_newer_version_can_do_is_given_back(session: Session, change: str, named: str) -> None:
    register(session, planned("a.jpg"), planned("b.jpg"))
    know_more(session, change)
    with pytest.raises(attempts.UnknownPipelineError):
        run_jobs(dispatch(session), worker="w/1", settings=get_settings())
    for job in rows(session, "SELECT state, attempt, failures, reason, detail, worker, lease_until FROM jobs"):
        assert (job.state, job.attempt, job.failures, job.reason) == ("retry_wait", 0, 0, None)
        assert job.detail.startswith("pipeline 1: ") and named in job.detail
        assert job.worker is job.lease_until is None
    assert rows(session, "SELECT DISTINCT outcome FROM job_attempts") == [("released",)]
    # Not at once: it would go round and round. (A busy machine takes some of the time.)
    waits = "SELECT extract(epoch FROM min(next_run_at) - clock_timestamp()) FROM jobs"
    assert scalar(session, waits) > get_settings().ledger.retry_cap_seconds / 2 - 60
    assert ledger.wake_retries(session, limit=100) == 0
    session.execute(text("UPDATE jobs SET next_run_at = clock_timestamp()"))
    assert ledger.wake_retries(session, limit=100) == 2
    assert len(dispatch(session)) == 2


def test_fields_that_are_missing_get_their_defaults(session: Session) -> None:
    """The control: an earlier version's spec is no reason to give a job back."""
    register(session, planned("a.jpg"))
    session.execute(text("UPDATE pipelines SET spec = spec - 'revision'"))
    session.commit()
    (job,) = claim(session, dispatch(session))
    assert attempts.give_back_unknown([job], get_settings()) == [job]
    assert (job.spec.revision, job.spec.sample_fps) == (1, 1.0)
    assert states(session) == {"running": 1}


def test_a_job_that_was_lost_meanwhile_is_not_given_back(session: Session) -> None:
    register(session, planned("a.jpg"))
    know_more(session, '{"tracker": "bytes"}')
    (job,) = claim(session, dispatch(session))
    session.execute(text("UPDATE jobs SET token = gen_random_uuid()"))
    session.commit()
    assert attempts.give_back_unknown([job], get_settings()) == []
    assert states(session) == {"running": 1}


def test_the_worker_warns_once_per_pipeline(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    register(session, *(planned(f"{n}.jpg") for n in range(5)))
    know_more(session, '{"tracker": "bytes"}')
    told: list[str] = []
    monkeypatch.setattr(attempts.log, "warning", lambda line, detail: told.append(detail))
    attempts._tell_once.cache_clear()
    attempts.give_back_unknown(claim(session, dispatch(session)), get_settings())
    assert len(told) == 1 and "tracker" in told[0]


def test_a_worker_pauses_after_a_message_that_it_knows_nothing_of(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(tasks, "_pause", lambda seconds, must_stop: pauses.append(seconds))
    register(session, planned("a.jpg"))
    know_more(session, '{"tracker": "bytes"}')
    tasks.analyze(encode_refs(dispatch(session)))
    assert pauses == [tasks.UNKNOWN_PAUSE_SECONDS]
    assert states(session) == {"retry_wait": 1}
    tasks.analyze(encode_refs([]))  # the control: there was nothing to know
    assert pauses == [tasks.UNKNOWN_PAUSE_SECONDS]


def test_a_pipeline_of_a_newer_version_is_listed(session: Session) -> None:
    register(session, planned("a.jpg"))
    know_more(session, '{"tracker": "bytes"}')
    done = maskwatch("pipelines", "list", "--json")
    assert done.returncode == 0, done.stderr
    (listed,) = json.loads(done.stdout)
    assert listed["spec"]["tracker"] == "bytes" and listed["classifier_confusion"] is None


# --- what a migration may do ---


@dataclass(frozen=True)
class Migration:
    """What one migration does, as Postgres is told, and the oldest versions that it leaves."""

    revision: str
    statements: list[str]
    oldest: dict[str, str]


def run_migrations(engine: Engine) -> list[Migration]:
    """Each migration from the one that made `oldest_versions` on, in order."""
    done: list[Migration] = []
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def keep(_: Any, __: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    scripts = reversed(list(ScriptDirectory.from_config(migrations.config()).walk_revisions()))
    for script in scripts:
        statements.clear()
        command.upgrade(migrations.config(engine), script.revision)
        with engine.connect() as connection:
            if connection.scalar(text("SELECT to_regclass('oldest_versions')")) is None:
                continue
            last = max(n for n, statement in enumerate(statements) if "alembic_version" in statement)
            first = max(n for n, statement in enumerate(statements[:last]) if "alembic_version" in statement) + 1
            oldest = versions.oldest_versions(Session(connection))
            done.append(Migration(script.revision, statements[first:last], oldest))
    return done


@pytest.fixture
def migrated(empty_database: str) -> Iterator[list[Migration]]:
    engine = create_engine(empty_database)
    yield run_migrations(engine)
    engine.dispose()


def test_every_migration_first_says_who_may_go_on(migrated: list[Migration]) -> None:
    assert migrated[-1].revision == SCHEMA_REVISION
    before = dict.fromkeys(Part, (0, 0, 0))
    for migration in migrated:
        makes_the_table = migration is migrated[0]
        assert says_who_may_go_on(migration.statements[makes_the_table:]), migration.revision
        oldest = {Part(part): parse(version) for part, version in migration.oldest.items()}
        assert oldest.keys() == set(Part)
        for part, version in oldest.items():
            assert before[part] <= version <= parse(__version__), (migration.revision, part)
        before = oldest


def says_who_may_go_on(statements: list[str]) -> bool:
    lock, *writes = statements[: len(Part) + 1]
    return f"pg_advisory_xact_lock({AGGREGATION_LOCK})" in lock and all(
        "INSERT INTO oldest_versions" in write for write in writes
    )


def test_the_look_at_migrations_notices_one_that_does_not(migrated: list[Migration]) -> None:
    said = migrated[-1].statements[-len(Part) - 1 :] if len(migrated) == 1 else migrated[-1].statements
    assert says_who_may_go_on(said)
    assert not says_who_may_go_on(["ALTER TABLE jobs ADD COLUMN x text", *said])
    assert not says_who_may_go_on(said[1:])
    assert not says_who_may_go_on([said[0], "SELECT 1", *said[1:]])


#: What takes something from a program that knows an earlier schema, as a pattern of the statement in capitals.
NARROWS = {
    "drops": r"\bDROP (?!NOT NULL\b)",
    "renames": r"\bRENAME\b",
    "replaces": r"\bOR REPLACE\b",
    "changes a type": r"\bALTER (COLUMN )?\S+ (SET DATA )?TYPE\b",
    "needs a value": r"\bSET NOT NULL\b|\bADD COLUMN (?![^,]*\b(DEFAULT|IDENTITY|GENERATED)\b)[^,]*\bNOT NULL\b",
    "constrains": r"\bADD (CONSTRAINT|CHECK|UNIQUE|PRIMARY KEY|FOREIGN KEY|EXCLUDE)\b|\bCREATE UNIQUE INDEX\b"
    r"|\bCREATE (CONSTRAINT )?(TRIGGER|RULE)\b|\bROW LEVEL SECURITY\b",
    "revokes": r"\bREVOKE\b",
    "removes rows": r"\bDELETE FROM\b|\bTRUNCATE\b",
}

#: What may narrow nevertheless: revision → a part of the statement and why no program that may go on is hurt by it.
ALLOWED: dict[str, dict[str, str]] = {
    "0009": {"ck_jobs_running": "every version that may go on has always written what these ask for"},
    "0012": {
        "CREATE OR REPLACE VIEW compliance_by_hour": "the same columns, with the same values",
        "CREATE OR REPLACE FUNCTION compliance_bound": "the same values, within 0 and 1 where rounding left them",
    },
}


def narrowings(statements: list[str]) -> list[tuple[str, str]]:
    """The statements that narrow the schema, each with how. What concerns tables that they make themselves doesn't."""
    made: set[str] = set()
    found = []
    for statement in statements:
        bare = " ".join(re.sub(r"--[^\n]*|/\*.*?\*/", " ", statement, flags=re.DOTALL).upper().split())
        made |= {name.strip('"') for name in re.findall(r"^CREATE TABLE (?:IF NOT EXISTS )?(\S+)", bare)}
        if (of := re.search(r"^ALTER TABLE (?:ONLY )?(\S+)|^CREATE UNIQUE INDEX .*? ON (\S+)", bare)) and (
            (of[1] or of[2]).strip('"') in made
        ):
            continue
        if bare.startswith(("CREATE FUNCTION", "CREATE VIEW", "CREATE TABLE")):
            continue  # new, whatever its body says
        found += [(how, statement) for how, pattern in NARROWS.items() if re.search(pattern, bare)]
    return found


def test_migrations_only_add(migrated: list[Migration]) -> None:
    used = set()
    for migration in migrated:
        for how, statement in narrowings(migration.statements):
            allowed = [part for part in ALLOWED.get(migration.revision, {}) if part in statement]
            assert allowed, f"{migration.revision} {how}, which has to wait for a later version: {statement}"
            used |= {(migration.revision, part) for part in allowed}
    assert used == {(revision, part) for revision, parts in ALLOWED.items() for part in parts}


@pytest.mark.parametrize(
    ("statement", "how"),
    [
        ("ALTER TABLE jobs DROP COLUMN worker", "drops"),
        ("DROP INDEX ix_jobs_pending", "drops"),
        ("ALTER TABLE jobs\n  DROP CONSTRAINT ck_jobs_state", "drops"),
        ("ALTER TABLE jobs ALTER COLUMN x DROP DEFAULT", "drops"),
        ("ALTER TABLE jobs RENAME COLUMN alone TO isolated", "renames"),
        ("CREATE OR REPLACE VIEW face_results AS SELECT 1", "replaces"),
        ("ALTER TABLE jobs ALTER COLUMN attempt TYPE smallint", "changes a type"),
        ("ALTER TABLE jobs ALTER COLUMN worker SET NOT NULL", "needs a value"),
        ("ALTER TABLE jobs ADD COLUMN x integer NOT NULL", "needs a value"),
        ("ALTER TABLE jobs ADD CONSTRAINT x CHECK (worker IS NOT NULL) NOT VALID", "constrains"),
        ("CREATE UNIQUE INDEX x ON jobs (worker)", "constrains"),
        ("CREATE TRIGGER x BEFORE INSERT ON jobs EXECUTE FUNCTION f()", "constrains"),
        ("REVOKE SELECT ON jobs FROM maskwatch_worker", "revokes"),
        ("DELETE FROM camera_slots", "removes rows"),
        ("DO $$ BEGIN ALTER TABLE jobs DROP COLUMN x; END $$", "drops"),
    ],
)
def test_a_statement_that_narrows_is_noticed(statement: str, how: str) -> None:
    assert narrowings([statement]) == [(how, statement)]


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE jobs ADD COLUMN x integer",
        "ALTER TABLE jobs ADD COLUMN x integer DEFAULT 0 NOT NULL",
        "ALTER TABLE jobs ALTER COLUMN x DROP NOT NULL",
        "CREATE INDEX x ON jobs (worker)",
        "ALTER TABLE jobs SET (fillfactor = 80)",
        "UPDATE jobs SET worker = NULL WHERE state = 'cancelled'",
        "ALTER TABLE jobs VALIDATE CONSTRAINT x",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'DELETE FROM x'",
        "-- DROP nothing\nCREATE TABLE x (id integer UNIQUE)",
    ],
)
def test_a_statement_that_adds_is_not(statement: str) -> None:
    assert narrowings([statement]) == []


def test_a_table_that_the_migration_makes_may_be_constrained() -> None:
    made = ["CREATE TABLE x (id integer)", "ALTER TABLE x ADD CONSTRAINT y CHECK (id > 0)"]
    assert narrowings(made) == []
    assert [how for how, _ in narrowings(made[1:])] == ["constrains"]
