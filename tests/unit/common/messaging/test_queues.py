"""Messages: what they carry, and that every queue and task is consumed."""

from __future__ import annotations

import json
import uuid
from itertools import chain
from typing import Any

import pytest

import producer.tasks
import workers.jobs.run
import workers.tasks
from common.domain import JobRef
from common.messaging.celery_app import app
from common.messaging.queues import ROUTES, Queue, TaskName, decode_refs, encode_refs
from common.settings import Settings
from producer.dispatch import group
from tests import ROOT


def test_references_survive_json() -> None:
    refs = [JobRef(1, uuid.uuid4()), JobRef(2**40, uuid.uuid4())]
    assert decode_refs(json.loads(json.dumps(encode_refs(refs)))) == refs


@pytest.mark.parametrize(
    "message",
    [None, "x", {"id": 1}, [1], [[1]], [["1", str(uuid.uuid4())]], [[1, "no uuid"]], [[-1, str(uuid.uuid4())]],
     [[True, str(uuid.uuid4())]], [[1, str(uuid.uuid4()), "more"]], [[2**70, str(uuid.uuid4())]]],
)  # fmt: skip
def test_anything_else_is_refused(message: Any) -> None:
    with pytest.raises(ValueError):
        decode_refs(message)


def test_a_forged_message_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.jobs.run, "run_jobs", lambda *args, **options: pytest.fail("it ran"))
    workers.tasks.analyze.run([["1; DROP TABLE jobs", "x"]])


def test_every_task_has_a_route_an_implementation_and_every_queue_a_consumer() -> None:
    assert set(ROUTES) == set(TaskName)
    assert {name.value for name in TaskName} <= set(app.tasks)
    assert set(ROUTES.values()) == set(Queue)
    served = set()
    for module in ("workers/cli/worker.py", "workers/cli/aggregator.py", "producer/cli/producer.py"):
        text = (ROOT / module).read_text()
        served |= {queue for queue in Queue if f"Queue.{queue.name}" in text}
    assert served == set(Queue)
    assert producer.tasks.dispatch_jobs.name == TaskName.DISPATCH


def test_messages_are_json_and_nothing_is_acknowledged_late() -> None:
    assert app.conf.accept_content == ["json"] and app.conf.task_serializer == "json"
    assert app.conf.task_acks_late is False and app.conf.worker_prefetch_multiplier == 1
    assert app.conf.worker_disable_prefetch is True and app.conf.worker_pool_start_method == "spawn"
    assert app.conf.worker_enable_remote_control is False and app.conf.result_backend is None


def test_groups_hold_one_pipeline_and_at_most_the_size() -> None:
    from common.domain import JobKind
    from common.ledger import DispatchedJob

    jobs = [DispatchedJob(JobRef(n, uuid.uuid4()), JobKind.IMAGE, n % 2) for n in range(11)]
    groups = [[ref.id for ref in refs] for refs in group(jobs, 3)]
    assert sorted(chain.from_iterable(groups)) == list(range(11))
    assert all(len(ids) <= 3 and len({n % 2 for n in ids}) == 1 for ids in groups)


def test_secrets_do_not_print() -> None:
    settings = Settings(database={"url": "postgresql://u:s3cret@h/d"}, broker={"url": "redis://:s3cret@h"})
    assert "s3cret" not in repr(settings) + str(settings) + settings.model_dump_json()
