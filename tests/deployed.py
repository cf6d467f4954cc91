"""Reads docker-compose.yml and deploy/ for the tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests import ROOT

DEPLOY = ROOT / "deploy"

#: Of Grafana: where the time range and the variables of a dashboard go (grafana.com/docs, "PostgreSQL data source").
_TIME_FILTER = re.compile(r"\$__timeFilter\(([^)]+)\)")
_BEGIN, _END = "'2026-03-01T00:00:00Z'", "'2026-03-31T00:00:00Z'"

_METRIC = re.compile(r"\b(maskwatch_[a-z_]+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"")


def compose() -> dict[str, Any]:
    """docker-compose.yml."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by its file's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json"))}


def targets(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the panels ask of a data source of this kind, each with a name for messages."""
    for name, board in dashboards().items():
        for panel in board["panels"]:
            for target in panel["targets"]:
                if target["datasource"]["type"] == kind:
                    yield f"{name}: {panel['title']}", target


def sql_of_panels() -> dict[str, str]:
    """The SQL of every panel and variable, as Grafana would send it."""
    found = {name: target["rawSql"] for name, target in targets("postgres")}
    for name, board in dashboards().items():
        found |= {f"{name}: ${entry['name']}": entry["query"] for entry in board["templating"]["list"]}
    return {name: as_sent(query) for name, query in found.items()}


def as_sent(query: str) -> str:
    """A panel's SQL with its macros and variables replaced."""
    query = _TIME_FILTER.sub(rf"\1 BETWEEN {_BEGIN} AND {_END}", query)
    query = query.replace("$__timeFrom()", _BEGIN).replace("$__timeTo()", _END)
    return query.replace("${location:sqlstring}", "'lobby','gate'")


def rules() -> list[dict[str, Any]]:
    """Every alert."""
    groups = [
        yaml.safe_load(path.read_text())["groups"] for path in sorted((DEPLOY / "prometheus/rules").glob("*.yml"))
    ]
    return [rule for group in groups for part in group for rule in part["rules"]]


def expressions() -> dict[str, str]:
    """Every expression in PromQL, of panels and of alerts."""
    found = {f"{name}/{target['refId']}": target["expr"] for name, target in targets("prometheus")}
    return found | {rule["alert"]: rule["expr"] for rule in rules()}


def metrics_of(expression: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Metrics that an expression asks for, with the label values that it names, one by one."""
    found = set()
    for name, matchers in _METRIC.findall(expression):
        labels = tuple((label, value) for label, _, values in _MATCHER.findall(matchers) for value in values.split("|"))
        found.add((name, labels))
    return found


def manifests() -> list[dict[str, Any]]:
    """Every Kubernetes object of deploy/kubernetes."""
    paths = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [part for path in paths for part in yaml.safe_load_all(path.read_text())]


def scaler_query() -> str:
    """What KEDA asks the ledger."""
    (scaled,) = [part for part in manifests() if part["kind"] == "ScaledObject"]
    (trigger,) = scaled["spec"]["triggers"]
    return str(trigger["metadata"]["query"])
