"""Metrics: the table is the documented one, the executor's events add up, and Prometheus finds them on a real Ray."""

import re
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from toy import diamond

from m2mkd_ray.execution import (
    Kind,
    Resources,
    StageEnded,
    StageInterrupted,
    StageRetried,
    StageReused,
    StageSkipped,
    StageStarted,
)
from m2mkd_ray.execution.events import StageFailed, each
from m2mkd_ray.execution.metrics import METRICS, ExecutorMetrics, report_metrics

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
BEGIN, END = "<!-- metrics -->\n", "<!-- /metrics -->\n"


def documented() -> str:
    """The table, as docs/operations.md should have it."""
    rows = [
        f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {', '.join(metric.tags)} | {metric.help} |"
        for metric in METRICS.values()
    ]
    return "\n".join(["| metric | kind | unit | labels | |", "|---|---|---|---|---|", *rows, ""])


def test_the_documented_metrics_are_the_ones_there_are() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == documented()


def test_names_are_as_prometheus_takes_them() -> None:
    assert all(re.fullmatch("[a-z][a-z0-9_]*", metric.name) for metric in METRICS.values())


# The executor's


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def started(stage, pid: int) -> StageStarted:
    return StageStarted(stage, {"host": "a", "pid": pid, "actor_id": f"{pid:x}"}, None)


def states(metrics: ExecutorMetrics) -> dict[str, int]:
    return {state: count for (_, state), count in metrics.by_state().items()}


def test_stages_are_counted_by_state_and_workers_by_how_many_they_run() -> None:
    top, left, right, bottom = diamond()
    metrics = ExecutorMetrics([bottom])
    assert states(metrics) == {"waiting": 4}
    metrics(StageReused(top, 1.0, {}))
    for stage in (left, right):
        metrics(started(stage, pid=7))
    assert states(metrics) == {"reused": 1, "running": 2, "waiting": 1}
    assert metrics.by_cohort_size() == {2: 1}
    metrics(StageEnded(left, 1.0, {}, {}))
    assert metrics.by_cohort_size() == {1: 1}
    metrics(StageRetried(right, Kind.LOST, 1, 0.5, "gone"))
    assert (states(metrics), metrics.by_cohort_size()) == ({"reused": 1, "complete": 1, "waiting": 2}, {})
    metrics(started(right, pid=8))
    metrics(StageInterrupted(right, "its worker was ended"))
    assert (states(metrics), metrics.by_cohort_size()) == ({"reused": 1, "complete": 1, "waiting": 2}, {})
    metrics(StageFailed(right, Kind.RAISED, "", "", "", None))
    metrics(StageSkipped(bottom, (right,)))
    assert states(metrics) == {"reused": 1, "complete": 1, "failed": 1, "skipped": 1}


def test_every_event_reaches_every_callback_in_order() -> None:
    top, *_ = diamond()
    heard: list[tuple[str, object]] = []
    event = StageReused(top, 1.0, {})
    each(lambda told: heard.append(("a", told)), lambda told: heard.append(("b", told)))(event)
    assert heard == [("a", event), ("b", event)]


# On a real Ray


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where the node agent of a Ray of one core answers Prometheus."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, _temp_dir=folder, _metrics_export_port=port,
            object_store_memory=100_000_000, log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 1000},
        )  # fmt: skip
        yield port
        ray.shutdown()


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Values by name and labels of ours."""


def sample(name: str, **tags: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(tags.items())


def scrape_until(port: int, expected: Samples, timeout_s: float = 90.0) -> Samples:
    """All samples of ours, as soon as the expected ones are among them; else what was there at the end."""
    deadline, found = time.monotonic() + timeout_s, {}
    while not expected.items() <= found.items() and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                found = parsed(answer.read().decode())
        except OSError:
            continue  # the agent is not up yet
    return found


def parsed(text: str) -> Samples:
    samples = {}
    for name, labels, value in re.findall(r"^(ray_m2mkd_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        ours = {key: said for key, said in re.findall(r'(\w+)="([^"]*)"', labels) if re.fullmatch("[a-z]+", key)}
        samples[sample(name, **ours)] = float(value)
    return samples


@pytest.mark.ray
def test_what_workers_and_executor_report_is_exported(port: int) -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def report(self, **metrics: float) -> None:
            report_metrics("pair-0", "demo", "pair-0-0123456789ab", 10, 40, metrics)

    top, left, _, bottom = diamond()
    clock = Clock()
    executor = ExecutorMetrics([bottom], lambda stage: (Resources(cpus=2, gpus=0.5),), clock)
    executor(StageReused(top, 1.0, {}))
    clock.now += 2.5
    executor(started(left, pid=7))
    clock.now += 3600.0
    executor(StageRetried(left, Kind.PREEMPTED, 1, 0.0, "gone", lost_steps=4))
    clock.now += 1.0
    executor(started(left, pid=8))
    reported = [metric for metric in METRICS.values() if metric.reported]
    values = {metric.name: 0.5 + place for place, metric in enumerate(reported) if "step" not in metric.name}
    worker = Worker.remote()
    for _ in range(2):
        ray.get(worker.report.remote(**values, kd=3.0, decodes_=0.0))
    expected = {
        sample("ray_m2mkd_waiting_s_total", stage="left", recipe="", address=left.address): 3.5,
        sample("ray_m2mkd_retries_total", recipe="", kind="PREEMPTED"): 1.0,
        sample("ray_m2mkd_cohorts", size="1"): 1.0,
        sample("ray_m2mkd_node_hours_total", group="no group", spot="false"): 1.0,
        sample("ray_m2mkd_gpu_hours_total", group="no group", spot="false"): 0.5,
        sample("ray_m2mkd_cpu_hours_total", group="no group", spot="false"): 2.0,
        sample("ray_m2mkd_lost_steps_total", group="no group", spot="false"): 4.0,
    }
    counts = {"waiting": 2, "running": 1, "reused": 1, "complete": 0, "failed": 0, "skipped": 0, "withdrawn": 0}
    expected |= {sample("ray_m2mkd_stages", recipe="", state=state): float(count) for state, count in counts.items()}
    for metric in reported:
        value = {"step": 10.0, "total_steps": 40.0}.get(metric.name) or values[metric.name]
        key = sample(metric.exported, stage="pair-0", recipe="demo", address="pair-0-0123456789ab")
        expected[key] = value * (2 if metric.kind == "counter" else 1)
    assert scrape_until(port, expected) == expected  # and nothing else of ours
    assert {name for name, _ in expected} == {metric.exported for metric in METRICS.values()}
