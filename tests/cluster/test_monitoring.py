"""Dashboard, alerts and scrape config name metrics that exist: ours by our table, Ray's by Ray's own code."""

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from cluster_files import CLUSTER, KUBERAY, load

from m2mkd_ray.execution.metrics import METRICS, STATES

MONITORING = CLUSTER / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))
OURS = {metric.exported: metric for metric in METRICS.values()}
NAME = re.compile(r"\bray_\w+")


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Title and query of every panel, and the variables'."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


def alert_queries() -> Iterator[tuple[str, str]]:
    """Name and query of every alert."""
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


QUERIES = [*dashboard_queries(), *alert_queries()]
every_query = pytest.mark.parametrize("query", [query for _, query in QUERIES], ids=[title for title, _ in QUERIES])


@cache
def rays_sources() -> str:
    """What Ray's dashboard says of metrics: its own panels, and the gauges of its agents."""
    folder = Path(importlib.util.find_spec("ray").origin).parent / "dashboard" / "modules"
    files = [*(folder / "metrics" / "dashboards").glob("*.py"), folder / "reporter" / "reporter_agent.py"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@every_query
def test_every_metric_exists(query: str) -> None:
    names = NAME.findall(query)
    assert names
    for name in names:
        if name.startswith("ray_m2mkd_"):
            assert name in OURS, f"{name} is not in METRICS: {', '.join(OURS)}"
        else:
            assert re.search(rf'\b{name}\b|"{name.removeprefix("ray_")}"', rays_sources()), f"Ray knows no {name}"


@every_query
def test_counters_are_read_as_rates_and_gauges_as_they_are(query: str) -> None:
    for name in NAME.findall(query):
        if name in OURS:
            is_rate = re.search(rf"(rate|increase)\({name}\b", query) is not None
            assert is_rate == (OURS[name].kind == "counter"), query


@every_query
def test_labels_that_are_asked_for_are_there(query: str) -> None:
    for name, conditions in re.findall(r"\b(ray_m2mkd_\w+)\{([^}]*)\}", query):
        asked = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", conditions))
        assert asked <= set(OURS[name].tags), query
        for state in re.findall(r'state="(\w+)"', conditions):
            assert state in STATES
    assert query.count("(") == query.count(")")
    assert query.count("{") == query.count("}")


def test_every_metric_of_ours_is_shown() -> None:
    shown = {name for _, query in dashboard_queries() for name in NAME.findall(query)}
    assert set(OURS) - shown == set()


def test_panels_do_not_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert 0 <= at["x"] <= at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} on {taken[x, y]}"
                taken[x, y] = panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_reads_what_ray_writes() -> None:
    config = load(MONITORING / "prometheus.yml")
    assert config["rule_files"] == ["alerts.yml"]
    (job,) = config["scrape_configs"]
    (files,) = job["file_sd_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert files["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_alerts_say_what_happened() -> None:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert "{{ $labels." in rule["annotations"]["summary"]


def test_the_operator_finds_the_port_that_the_pods_name() -> None:
    monitor = load(MONITORING / "podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for file in KUBERAY:
        content = load(file)
        spec = content["spec"].get("rayClusterSpec", content["spec"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            ports = {port["name"]: port for port in group["template"]["spec"]["containers"][0]["ports"]}
            assert str(ports[endpoint["port"]]["containerPort"]) == group["rayStartParams"]["metrics-export-port"]
