"""docker-compose.yml, the Dockerfiles and the manifests, as far as they can be judged without a container."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import tomllib
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from common.cli import COMMANDS, cli
from common.messaging.queues import ROUTES, Queue
from common.observability.metrics import TICKS
from common.settings import Settings
from tests import ROOT
from tests.deployed import DEPLOY, compose, dashboards, expressions, manifests, metrics_of, rules, targets

SERVICES: dict[str, dict[str, Any]] = compose()["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("maskwatch-")]
DOCKERFILES = ("producer/Dockerfile", "workers/Dockerfile")
WORKLOADS = [part for part in manifests() if part["kind"] in ("Deployment", "Job")]


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return dict(only)


# --- the compose file -----------------------------------------------------------------------------------------


def schema() -> Any:
    """The Compose specification's, as check-jsonschema ships it."""
    return json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())


def test_the_compose_file_is_one() -> None:
    jsonschema.validate(compose(), schema())


@pytest.mark.parametrize("wrong", [{"comand": ["worker"]}, {"read_only": 7}, {"deploy": {"resources": {"limit": {}}}}])
def test_the_schema_finds_what_is_wrong(wrong: dict[str, Any]) -> None:
    file = compose()
    file["services"]["worker"] |= wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(file, schema())


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert not service.get("privileged") and "cap_add" not in service
    assert "/var/run/docker.sock" not in json.dumps(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_stays_is_restarted_and_has_a_health_check(name: str) -> None:
    service = SERVICES[name]
    if service["restart"] == "unless-stopped":
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    else:
        assert name in ("migration", "operator") and service["healthcheck"] == {"disable": True}


def test_no_database_port_is_published_and_the_others_only_to_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert compose()["networks"]["data"] == {"internal": True}
    for name in ("postgres", "redis", "aggregator"):
        assert SERVICES[name]["networks"] == ["data"], f"{name} needs no way out"


def test_secrets_are_files_that_the_script_makes(tmp_path: Path) -> None:
    made = subprocess.run([DEPLOY / "make-secrets", tmp_path / "secrets"], capture_output=True, text=True, check=True)
    assert not made.stderr
    declared = compose()["secrets"]
    assert all(entry == {"file": f"deploy/secrets/{name}"} for name, entry in declared.items())
    assert set(declared) < {path.name for path in (tmp_path / "secrets").iterdir()}
    used = {
        entry if isinstance(entry, str) else entry["source"]
        for service in SERVICES.values()
        for entry in service.get("secrets", [])
    }
    assert used == set(declared)
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_no_secret_is_in_the_compose_file() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            assert "PASSWORD" not in variable or str(value).startswith("/run/secrets/"), (name, variable)
            assert not re.search(r"://[^/]*:[^/]*@", str(value)), (name, variable)


@pytest.mark.parametrize("name", OURS)
def test_what_a_service_is_told_are_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every variable is one that the settings know, and they accept its value, the secrets' files included."""
    service = SERVICES[name]
    for entry in service["secrets"]:
        source, target = (entry, entry) if isinstance(entry, str) else (entry["source"], entry["target"])
        (tmp_path / target).write_text(f"of {source}\n")
    environment = {key: _interpolated(value) for key, value in service["environment"].items() if value is not None}
    known = {
        f"MASKWATCH_{section}__{field}".upper()
        for section, of in Settings.model_fields.items()
        for field in getattr(of.annotation, "model_fields", {})
    } | {f"MASKWATCH_{field}".upper() for field in Settings.model_fields}
    ours = {key for key in environment if key.startswith("MASKWATCH_")} - {"MASKWATCH_SECRETS_DIR"}
    assert ours <= known, ours - known
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MASKWATCH_SECRETS_DIR", str(tmp_path))
    settings = Settings()
    password = settings.database.password
    assert password is not None and password.get_secret_value().startswith("of ")
    assert bool(settings.metrics.port) == (service["restart"] == "unless-stopped")


def _interpolated(value: object) -> str:
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def test_files_that_are_mounted_exist() -> None:
    declared = compose()["configs"]
    for name, entry in declared.items():
        assert (ROOT / entry["file"]).is_file(), name
    used = {entry["source"] for service in SERVICES.values() for entry in service.get("configs", [])}
    assert used == set(declared)
    volumes = {entry.split(":")[0] for service in SERVICES.values() for entry in service.get("volumes", [])}
    assert volumes == set(compose()["volumes"])


@pytest.mark.parametrize(
    "command",
    [tuple(SERVICES[name]["command"]) for name in OURS]
    + [tuple(container(workload)["args"]) for workload in WORKLOADS],
)
def test_a_command_is_one(command: tuple[str, ...]) -> None:
    words = [word for word in command if not word.startswith("-")]
    options = [word for word in command if word.startswith("-")]
    words = words[: len(words) - len(options)]  # each option of ours has a value
    done = CliRunner().invoke(cli, [*words, "--help"])
    assert done.exit_code == 0 and words[0] in COMMANDS, done.output
    assert all(option in done.output for option in options)


def queue_of(command: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The queue that a command works off, by running it up to where it would."""
    served: list[str] = []

    @contextmanager
    def deployment(**_: Any) -> Any:
        yield Settings()

    with monkeypatch.context() as patched:
        patched.setattr("common.cli.parts.serving.deployment", deployment)
        for module in ("workers.cli.worker", "workers.cli.aggregator", "producer.cli.producer"):
            patched.setattr(f"{module}.serve", lambda queue, *_, **__: served.append(queue))
        patched.setattr("workers.cli.worker.require_runtime", lambda *_: None)
        patched.setattr("workers.cli.worker.runtime_of", lambda *_: None)
        for module in ("workers.cli.worker", "workers.cli.aggregator"):
            patched.setattr(f"{module}.prepare_drain", lambda: None)
        # Options go into the environment, which is put back at the end.
        options = {
            "MASKWATCH_WORKER__DEVICE": "cpu",
            "MASKWATCH_METRICS__PORT": "0",
            "MASKWATCH_DATABASE__BY_KEY": "true",
        }
        for name, value in {**options, "MASKWATCH_BROKER__URL": "redis://redis/0"}.items():
            patched.setenv(name, value)
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
    return served[0] if served else None


def test_every_queue_has_a_consumer_among_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    staying = [name for name in OURS if SERVICES[name]["restart"] == "unless-stopped"]
    consumed = {name: queue_of(SERVICES[name]["command"], monkeypatch) for name in staying}
    assert {queue for name, queue in consumed.items() if "profiles" not in SERVICES[name]} == {q.value for q in Queue}
    assert consumed["worker-gpu"] == Queue.MEDIA
    deployed = [queue_of(container(part)["args"], monkeypatch) for part in WORKLOADS if part["kind"] == "Deployment"]
    assert set(deployed) == {queue.value for queue in Queue}


def test_each_part_has_its_own_user_in_redis_and_postgres() -> None:
    acl = (ROOT / "docs/redis.acl").read_text()
    logins = (DEPLOY / "postgres/logins.sql").read_text()
    for name in OURS:
        environment = SERVICES[name]["environment"]
        login = re.search(r"//(\w+)@postgres/", environment["MASKWATCH_DATABASE__URL"])
        assert login is not None and f"CREATE ROLE {login[1]} LOGIN" in logins
        if "MASKWATCH_BROKER__USERNAME" in environment:
            assert f"user {environment['MASKWATCH_BROKER__USERNAME']} on" in acl
            assert environment["MASKWATCH_BROKER__USERNAME"] == f"maskwatch-{login[1]}"


def test_redis_keeps_what_it_is_given() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes" and options["--maxmemory-policy"] == "noeviction"
    assert options["--maxmemory"] == "256mb" and options["--aclfile"] == "/run/secrets/redis_users.acl"


def test_the_gpu_worker_is_a_choice_and_gets_a_gpu() -> None:
    service = SERVICES["worker-gpu"]
    assert service["profiles"] == ["gpu"] and service["build"]["target"] == "cuda"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


# --- the Dockerfiles ------------------------------------------------------------------------------------------


@lru_cache
def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of a Dockerfile, with continued lines put together."""
    text = re.sub(r"^#.*\n", "", (ROOT / dockerfile).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in found]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_an_image_copies_is_there_and_gets_to_the_builder(dockerfile: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored, "what isn't named stays out"
    stages = {rest.split(" AS ")[1] for word, rest in instructions(dockerfile) if word == "FROM" and " AS " in rest}
    copies = [rest.split() for word, rest in instructions(dockerfile) if word == "COPY"]
    assert copies
    for words in copies:
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in ignored, source


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_runs_as_nobody_in_particular(dockerfile: str) -> None:
    final: list[tuple[str, str]] = []
    for word, rest in instructions(dockerfile):
        final = [] if word == "FROM" else [*final, (word, rest)]
        if word == "CMD":
            assert ("USER", "10001:10001") in final and ("ENTRYPOINT", '["maskwatch"]') in final
            # The default command of the image is one that is there.
            assert json.loads(rest)[0] in COMMANDS
    assert final[-1][0] == "CMD"


def extras_of(dockerfile: str) -> dict[str, list[str]]:
    """What is installed with the package, by stage."""
    found: dict[str, list[str]] = {}
    stage = ""
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            stage = rest.split(" AS ")[-1]
        for extras in re.findall(r"pip install '\.\[([\w,]+)\]'", rest):
            found[stage] = extras.split(",")
        if re.search(r"pip install \.(\s|$)", rest):
            found[stage] = []
    return found


def test_an_image_installs_layers_that_exist() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras_of("producer/Dockerfile") == {"build": ["inventory"]}
    assert extras_of("workers/Dockerfile") == {"build-cpu": ["worker"], "build-cuda": ["worker", "gpu"]}
    for dockerfile in DOCKERFILES:
        assert {layer for of in extras_of(dockerfile).values() for layer in of} <= set(layers)


def test_the_producer_s_image_has_no_model() -> None:
    (run,) = [rest for word, rest in instructions("producer/Dockerfile") if word == "RUN" and "pip install '." in rest]
    assert run.index("find workers -name '*.onnx' -delete") < run.index("pip install")
    weights = {path.suffix for path in (ROOT / "workers/classification/weights").iterdir()} - {".md", ".txt", ".json"}
    assert weights == {".onnx"}, "the weights that it leaves out are all there are"


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_built_from_a_stage_that_exists(name: str) -> None:
    build = SERVICES[name]["build"]
    stages = [rest.split(" AS ")[-1] for word, rest in instructions(build["dockerfile"]) if word == "FROM"]
    assert build["context"] == "." and build.get("target", stages[-1]) in stages


# --- Kubernetes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda part: part["metadata"]["name"])
def test_a_pod_may_do_little(workload: dict[str, Any]) -> None:
    assert pod(workload)["securityContext"]["runAsNonRoot"] and pod(workload)["securityContext"]["runAsUser"] == 10001
    assert pod(workload)["automountServiceAccountToken"] is False
    rights = container(workload)["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert set(container(workload)["resources"]["limits"]) >= {"cpu", "memory"}
    if workload["kind"] == "Deployment":
        assert container(workload)["livenessProbe"]["httpGet"]["port"] == "metrics"
        assert {"name": "metrics", "containerPort": 9464} in container(workload)["ports"]
        selector = workload["spec"]["selector"]["matchLabels"].items()
        assert selector <= workload["spec"]["template"]["metadata"]["labels"].items()


def test_the_scaler_names_what_is_there() -> None:
    (scaled,) = [part for part in manifests() if part["kind"] == "ScaledObject"]
    (authentication,) = [part for part in manifests() if part["kind"] == "TriggerAuthentication"]
    deployments = {part["metadata"]["name"]: part for part in manifests() if part["kind"] == "Deployment"}
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "postgresql" and float(trigger["metadata"]["targetQueryValue"]) > 0
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    target = deployments[scaled["spec"]["scaleTargetRef"]["name"]]
    assert "replicas" not in target["spec"], "each apply would undo what the scaler did"


def test_what_is_applied_together_is_there() -> None:
    folder = DEPLOY / "kubernetes"
    listed = set(yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"])
    present = {path.name for path in folder.glob("*.yaml")}
    assert listed == present - {"kustomization.yaml", "worker-gpu.yaml"}
    shared = {part["metadata"]["name"] for part in manifests() if part["kind"] == "ConfigMap"}
    for workload in WORKLOADS:
        for source in container(workload).get("envFrom", []):
            assert source["configMapRef"]["name"] in shared


# --- dashboards and alerts ------------------------------------------------------------------------------------


def test_every_panel_asks_a_data_source_that_is_provisioned() -> None:
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/maskwatch.yml").read_text())["datasources"]
    by_uid = {source["uid"]: source for source in provisioned}
    for name, board in dashboards().items():
        assert board["uid"] == f"maskwatch-{name}"
        ids = [panel["id"] for panel in board["panels"]]
        assert len(set(ids)) == len(ids)
    for kind in ("prometheus", "postgres"):
        asked = {target["datasource"]["uid"] for _, target in targets(kind)}
        assert asked and all(by_uid[uid]["type"] == kind for uid in asked)
    postgres = by_uid["maskwatch-postgres"]
    assert postgres["user"] == "analyst"
    assert postgres["secureJsonData"] == {"password": "$__file{/run/secrets/analyst_password}"}
    assert "analyst_password" in SERVICES["grafana"]["secrets"]


def test_prometheus_asks_every_service_that_serves_metrics() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    asked = {(name, found["port"]) for job in scraped for found in job["dns_sd_configs"] for name in found["names"]}
    served = {name for name in OURS if SERVICES[name]["environment"]["MASKWATCH_METRICS__PORT"] != "0"}
    assert asked == {(name, 9464) for name in served}
    jobs = {job["job_name"] for job in scraped}
    named = {value for each in expressions().values() for value in re.findall(r'up\{job="(\w+)"', each)}
    assert named <= jobs


def test_an_alert_says_what_to_do_and_is_tested() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/tests/maskwatch.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")
        raised = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]}
        assert raised == {True, False}, f"{rule['alert']}: both what raises it and what doesn't"
    operations = (ROOT / "docs/operations.md").read_text()
    assert [rule["alert"] for rule in rules() if rule["alert"] not in operations] == []


@pytest.mark.parametrize(
    "arguments", [("check", "rules", "rules/maskwatch.yml"), ("test", "rules", "tests/maskwatch.yml")]
)
def test_prometheus_itself_agrees(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    done = subprocess.run(
        [promtool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reader_of_expressions_sees_metrics_and_labels() -> None:
    found = metrics_of('sum(rate(maskwatch_a_total[5m])) > 0 and maskwatch_b{x="1",y=~"2|3"}')
    assert found == {("maskwatch_a_total", ()), ("maskwatch_b", (("x", "1"), ("y", "2"), ("y", "3")))}


def test_the_documents_name_every_metric() -> None:
    from common.observability.metrics import METRICS
    from producer.gauges import GAUGES

    operations = (ROOT / "docs/operations.md").read_text()
    counted = {metric.name + ("" if metric.buckets else "_total") for metric in METRICS}
    assert {name for name in counted | set(GAUGES) if f"`{name}`" not in operations} == set()


def test_every_tick_of_the_producer_is_counted() -> None:
    ticked = {task.value.removeprefix("producer.") for task, queue in ROUTES.items() if queue is Queue.PRODUCER}
    assert set(TICKS.labels["task"]) == ticked
    source = (ROOT / "producer/tasks.py").read_text()
    assert all(f'_ticking("{name}")' in source for name in ticked)


def test_figures_of_the_scaling_page_were_measured() -> None:
    """docs/scaling.md marks each figure: measured (and then docs/performance.md or README.md has it) or computed."""
    measured = (ROOT / "docs/performance.md").read_text() + (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| measured \|$", (ROOT / "docs/scaling.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 5
    for what, figure in rows:
        for number in re.findall(r"\d+(?:[.,]\d+)*", figure):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", measured), (what, number)


def test_no_test_here_was_forgotten() -> None:
    """Names of tests are unique: a second one of the same name would take the first one's place in silence."""
    tree = ast.parse(Path(__file__).read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(set(names)) == len(names)
