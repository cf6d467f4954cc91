"""What the ledger's gauges say, that they stay cheap, and that every metric of a panel or alert is really exposed."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from common.domain import Lane
from common.ledger import figures
from producer import gauges
from producer.gauges import COUNT_LIMIT, LedgerGauges
from tests.deployed import expressions, metrics_of
from tests.ledger_rows import claim, dispatch, planned, register, rows
from tests.photos import face_jpeg
from tests.redis_server import free_port
from tests.services import QUICK, Bucket, Services, locate, maskwatch, running, wait_until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")


def parsed(page: str) -> Samples:
    """Prometheus's text format, as far as we use it: (name, labels) → value."""
    found: Samples = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            match = _SAMPLE.match(line)
            assert match is not None, line
            labels = tuple(sorted(re.findall(r'(\w+)="([^"]*)"', match[2] or "")))
            found[match[1], labels] = float(match[3])
    return found


def collected(collector: LedgerGauges) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


# --- the gauges -----------------------------------------------------------------------------------------------


def test_jobs_are_counted_by_state_and_lane(session: Session) -> None:
    register(session, *(planned(f"{n}.jpg") for n in range(5)))
    register(session, planned("live.jpg"), lane=Lane.LIVE)
    claim(session, dispatch(session, 2))
    dispatch(session, 1)
    session.execute(text("UPDATE jobs SET created_at = now() - interval '90 s' WHERE state = 'pending'"))
    session.execute(text("UPDATE jobs SET alone = true WHERE id = (SELECT max(id) FROM jobs WHERE lane = 1)"))
    session.commit()
    found = collected(LedgerGauges())
    counts = {labels: value for (name, labels), value in found.items() if name == "maskwatch_jobs" and value}
    assert counts == {
        (("lane", "live"), ("state", "running")): 1,
        (("lane", "backfill"), ("state", "running")): 1,
        (("lane", "backfill"), ("state", "queued")): 1,
        (("lane", "backfill"), ("state", "pending")): 3,
    }
    backfill = (("lane", "backfill"),)
    assert found["maskwatch_dispatch_backlog_jobs", backfill] == 3
    assert 90 <= found["maskwatch_oldest_pending_seconds", backfill] < 120
    assert found["maskwatch_oldest_pending_seconds", (("lane", "live"),)] == 0
    assert found["maskwatch_ledger_up", ()] == found["maskwatch_broker_up", ()] == 1


def test_what_is_paused_is_pending_and_no_backlog(session: Session) -> None:
    register(session, planned("1.jpg"), planned("2.jpg"))
    session.execute(text("UPDATE sources SET paused_at = now(), next_trial_at = now(), reason = 'x', detail = 'x'"))
    session.commit()
    found = collected(LedgerGauges())
    backfill = (("lane", "backfill"),)
    assert found["maskwatch_jobs", (*backfill, ("state", "pending"))] == 2
    assert found["maskwatch_dispatch_backlog_jobs", backfill] == 0
    assert found["maskwatch_oldest_pending_seconds", backfill] == 0
    assert found["maskwatch_paused_sources", ()] == 1


def test_the_lag_is_that_of_the_oldest_mark(session: Session) -> None:
    assert collected(LedgerGauges())["maskwatch_summary_lag_seconds", ()] == 0
    register(session, planned("1.jpg"))
    session.execute(
        text(
            "INSERT INTO dirty_marks (location_id, pipeline_id, hour, created_at)"
            " SELECT l.id, p.id, now(), now() - make_interval(secs => age) FROM locations l, pipelines p,"
            " (VALUES (300), (20)) AS ages (age)"
        )
    )
    session.commit()
    assert 300 <= collected(LedgerGauges())["maskwatch_summary_lag_seconds", ()] < 330


def many(session: Session, count: int, state: str) -> None:
    """As many jobs of one video in this state."""
    register(session, planned("many.jpg"))
    session.execute(
        text(
            "INSERT INTO jobs"
            " (media_object_id, source_id, pipeline_id, kind, lane, state, range_start_ms, range_end_ms,"
            " finished_at, lease_until, worker)"
            " SELECT j.media_object_id, j.source_id, j.pipeline_id, 'chunk', 1, :state, n, n + 1, now(), now(), 'w/1'"
            " FROM (SELECT * FROM jobs LIMIT 1) j, generate_series(1, :count) n"
        ),
        {"state": state, "count": count},
    )
    session.commit()
    # Not by autovacuum's grace: the planner must know what is there.
    session.execute(text("ANALYZE jobs"))
    session.commit()


@pytest.mark.parametrize("state", ["pending", "quarantined"])
def test_more_jobs_than_the_limit_read_as_the_limit(session: Session, state: str) -> None:
    many(session, COUNT_LIMIT + 50, state)
    session.execute(text("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE kind = 'image'"))
    session.commit()
    assert collected(LedgerGauges())["maskwatch_jobs", (("lane", "backfill"), ("state", state))] == COUNT_LIMIT


def plan(session: Session, statement: str, **parameters: object) -> str:
    return "\n".join(session.execute(text(f"EXPLAIN {statement}"), parameters).scalars())


def test_a_scrape_does_not_read_what_has_ended(session: Session) -> None:
    """However many jobs have ended: no part of the plan reads the table from begin to end. The exact count of
    `maskwatch status` does, which shows that this plan would tell."""
    many(session, 20_000, "succeeded")
    found = plan(session, figures._WAITING, limit=COUNT_LIMIT)
    assert "Seq Scan on jobs" not in found, found
    assert "ix_jobs_pending" in found and "ix_jobs_quarantined" in found
    assert "Seq Scan on jobs" in plan(session, "SELECT state, count(*) FROM jobs GROUP BY state")
    assert "Scan using pk_dirty_marks" in plan(session, "SELECT created_at FROM dirty_marks ORDER BY id LIMIT 1")


def test_an_answer_holds_for_a_while(session: Session) -> None:
    now = [0.0]
    collector = LedgerGauges(clock=lambda: now[0])
    name = ("maskwatch_dispatch_backlog_jobs", (("lane", "backfill"),))
    assert collected(collector)[name] == 0
    register(session, planned("1.jpg"))
    now[0] = gauges.CACHE_SECONDS - 1
    assert collected(collector)[name] == 0
    now[0] = gauges.CACHE_SECONDS
    assert collected(collector)[name] == 1


def test_services_that_are_away_are_told_and_nothing_else(services: Services, configure) -> None:  # type: ignore[no-untyped-def]
    configure(
        database__url="postgresql+psycopg://nobody@127.0.0.1:1/none", broker__url=f"redis://127.0.0.1:{free_port()}/0"
    )
    assert collected(LedgerGauges()) == {("maskwatch_ledger_up", ()): 0, ("maskwatch_broker_up", ()): 0}


def test_how_long_a_job_waited_in_its_queue(session: Session) -> None:
    register(session, planned("1.jpg"))
    refs = dispatch(session)
    session.execute(text("UPDATE jobs SET queued_at = queued_at - interval '40 s'"))
    session.commit()
    (job,) = claim(session, refs)
    assert 40 <= job.queued_seconds < 70


# --- real processes -------------------------------------------------------------------------------------------

ROLES = ("producer", "worker", "aggregator")


def page(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def test_what_panels_and_alerts_ask_for_is_what_running_processes_expose(
    services: Services, session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, one of them empty, through real processes; every metric and label value that a dashboard or a rule
    names is among what they serve, and what they count is what was done."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    locate()
    for number in range(4):
        bucket.put(f"{number}.jpg", face_jpeg(number))
    bucket.put("empty.jpg", b"")
    ports = {role: free_port() for role in ROLES}
    logs = {role: tmp_path / f"{role}.log" for role in ROLES}
    with ExitStack() as exits:
        for role in ROLES:
            exits.enter_context(running(role, log=logs[role], env={"MASKWATCH_METRICS__PORT": str(ports[role])}))
        for role in ROLES:
            wait_until(lambda role=role: _answers(ports[role]), what=f"metrics of the {role}")
        done = maskwatch("backfill", bucket.uri, "--location", "lobby", "--wait", timeout=240)
        assert done.returncode == 0, done.stderr
        wait_until(
            lambda: parsed(page(ports["aggregator"]))["maskwatch_summarized_hours_total", ()], what="a summary, counted"
        )
        pages = {role: page(ports[role]) for role in ROLES}
        samples = {role: parsed(pages[role]) for role in ROLES}
        folders = list(tmp_path.glob("maskwatch-metrics-*"))
        assert len(folders) == 3
    everything = {key for of in samples.values() for key in of}
    missing = [
        (where, name, labels)
        for where, expression in expressions().items()
        for name, labels in metrics_of(expression)
        if not all(
            any(name == other and (not labels or wanted in given) for other, given in everything)
            for wanted in (labels or (None,))
        )
    ]
    assert missing == []
    worker = samples["worker"]
    assert worker["maskwatch_attempts_total", (("kind", "image"), ("outcome", "succeeded"))] == 4
    assert worker["maskwatch_attempts_total", (("kind", "image"), ("outcome", "quarantined"))] == 1
    assert worker["maskwatch_quarantines_total", (("reason", "empty_file"),)] == 1
    assert worker["maskwatch_frames_total", (("kind", "image"),)] == 4
    stored = dict(rows(session, "SELECT status, count(*) FROM faces GROUP BY 1"))
    counted = {
        dict(labels)["status"]: int(value)
        for (name, labels), value in worker.items()
        if name == "maskwatch_faces_total" and value
    }
    assert counted == stored and sum(counted.values()) == 4
    stages = {
        dict(labels)["stage"]: value
        for (name, labels), value in worker.items()
        if name == "maskwatch_stage_seconds_count"
    }
    assert 1 <= stages.pop("write") <= 4, "pictures are recorded together"
    assert stages == {"read": 5, "decode": 5, "detect": 4, "classify": 4}
    waited = {
        dict(labels)["lane"]: v for (name, labels), v in worker.items() if name == "maskwatch_queue_seconds_count"
    }
    assert waited == {"live": 0, "backfill": 5}
    producer = samples["producer"]
    assert producer["maskwatch_dispatched_jobs_total", (("lane", "backfill"),)] == 5
    assert all(producer["maskwatch_ticks_total", (("task", t),)] for t in ("dispatch", "reconcile", "request_summary"))
    assert producer["maskwatch_ledger_up", ()] == producer["maskwatch_broker_up", ()] == 1
    # Nothing of what was analysed is in a label.
    assert not re.search(r"\.jpg|lobby|" + re.escape(bucket.name), "".join(pages.values()))
    # And the log names the job and the attempt.
    lines = [json.loads(line) for line in logs["worker"].read_text().splitlines() if line.startswith("{")]
    (failed,) = [line for line in lines if line["event"] == "failed"]
    assert failed["attempt"] == 1 and isinstance(failed["job"], int)


def _answers(port: int) -> bool:
    try:
        return bool(page(port))
    except OSError:
        return False


def test_metrics_go_with_a_worker_that_is_asked_to_stop(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    port = free_port()
    with running("worker", log=tmp_path / "worker.log", env={"MASKWATCH_METRICS__PORT": str(port)}) as worker:
        wait_until(lambda: "ready" in (tmp_path / "worker.log").read_text(), what="a worker that is ready")
        assert _answers(port) and list(tmp_path.glob("maskwatch-metrics-*"))
        worker.terminate()
        assert worker.wait(60) == 0
    assert not list(tmp_path.glob("maskwatch-*"))


def test_a_worker_without_a_port_serves_nothing(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running("worker", log=tmp_path / "worker.log"):
        wait_until(lambda: "ready" in (tmp_path / "worker.log").read_text(), what="a worker that is ready")
        assert not list(tmp_path.glob("maskwatch-metrics-*"))


def test_a_port_that_is_taken_ends_a_worker_with_a_sentence(services: Services) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = maskwatch("aggregator", env={"MASKWATCH_METRICS__PORT": str(port)})
    assert done.returncode == 1
    assert "metrics can't be served" in done.stderr and "Traceback" not in done.stderr
