"""A plan can be held against a cluster's file, and every recipe that ships fits one of them."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from cluster_files import CLUSTER, KUBERAY, RAY_UP, load, of

from m2mkd_ray.commands.clusters import nodes_of_file
from m2mkd_ray.commands.grouping import in_groups
from m2mkd_ray.commands.kuberay import quantity
from m2mkd_ray.commands.seats import expect
from m2mkd_ray.errors import UsageError
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.planning.devices import gpu_memory_gb, is_spot
from m2mkd_ray.pipeline import plan
from m2mkd_ray.preflight import capacity_problems
from m2mkd_ray.recipes import RECIPES
from m2mkd_ray.submission import JobFile, find_job, read_job, shipped_jobs

ONPREM = CLUSTER / "onprem" / "nodes.yaml"
PLANNED = [*(file for file in RAY_UP if file.stem != "onprem"), *KUBERAY, ONPREM]
REAL = [file for file in PLANNED if file.stem != "local-autoscaling"]
"""Clusters whose GPUs are no fakes."""


@pytest.mark.parametrize("file", PLANNED, ids=of)
def test_a_plan_reads_the_cluster(file: Path) -> None:
    nodes = nodes_of_file(file)
    assert nodes
    assert not any(node.labels["ray.io/node-group"] == "head" for node in nodes)
    assert any(is_spot(node) for node in nodes) == (
        "spot" in file.stem or file.stem in ("nodes", "local-autoscaling")
    ), file


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_a_cluster(recipe: str) -> None:
    stages = plan(RECIPES[recipe]())
    refused = {of(file): capacity_problems(stages, nodes_of_file(file)) for file in REAL}
    assert [] in refused.values(), refused


@pytest.mark.parametrize("file", REAL, ids=of)
def test_the_papers_run_fits_every_cluster(file: Path) -> None:
    assert capacity_problems(plan(RECIPES["vmoe_base"]()), nodes_of_file(file)) == []


def test_the_demo_fits_the_cluster_of_one_machine() -> None:
    nodes = nodes_of_file(CLUSTER / "local-autoscaling.yaml")
    assert capacity_problems(plan(RECIPES["demo"]()), nodes) == []
    assert capacity_problems(plan(RECIPES["vmoe_base"]()), nodes) != []


def holds(node: Node, job: JobFile) -> bool:
    """Whether a job's driver may start on a node: Ray's `!value` is any other, or none."""
    wanted = {"CPU": job.entrypoint_num_cpus, "GPU": job.entrypoint_num_gpus, "memory": job.entrypoint_memory}
    labels = {"m2mkd.spot": str(is_spot(node)).lower(), **node.labels}
    return all(node.resources.get(name, 0.0) >= (amount or 0) for name, amount in wanted.items()) and all(
        labels.get(name, "") != value[1:] if value.startswith("!") else labels.get(name) == value
        for name, value in (job.entrypoint_label_selector or {}).items()
    )


@pytest.mark.parametrize("name", shipped_jobs())
def test_every_jobs_driver_fits_every_cluster(name: str) -> None:
    """On the cluster of one machine, whose nodes have no memory to ask for, at least what needs no GPU of its own."""
    job = read_job(find_job(name))
    files = PLANNED if name in ("demo", "sweep-quick") else [file for file in PLANNED if file in REAL]
    assert [of(file) for file in files if not any(holds(node, job) for node in nodes_of_file(file))] == []


@pytest.mark.parametrize("file", sorted((CLUSTER / "kuberay").glob("rayjob*.yaml")), ids=of)
def test_a_rayjobs_deadline_is_far_beyond_its_plan(file: Path) -> None:
    spec = load(file)["spec"]
    words = shlex.split(spec["entrypoint"])
    nodes = nodes_of_file(file)
    recipe = in_groups(RECIPES[words[words.index("run") + 1]](), nodes)
    expected, _ = expect(recipe, plan(recipe), nodes, "auto")
    assert expected.makespan_s > 48 * 3600  # it was reckoned with ImageNet's images, whether they are here or not
    assert 2 * expected.makespan_s < spec["activeDeadlineSeconds"]


def test_memory_of_gpus_comes_from_the_label_where_ray_knows_only_the_type() -> None:
    by_group = {node.labels["ray.io/node-group"]: node for node in nodes_of_file(CLUSTER / "azure.yaml")}
    assert gpu_memory_gb(by_group["finetune"]) == 80  # Ray calls both sizes A100
    (kind,) = {gpu_memory_gb(node) for node in nodes_of_file(CLUSTER / "aws.yaml") if "finetune" in node.name}
    assert kind == 40


def test_groups_of_kubernetes_have_what_their_pods_ask_for() -> None:
    nodes = nodes_of_file(CLUSTER / "kuberay" / "rayjob-spot.yaml")
    counted: dict[str, int] = {}
    for node in nodes:
        counted[node.labels["ray.io/node-group"]] = counted.get(node.labels["ray.io/node-group"], 0) + 1
    assert counted == {"cpu": 4, "incubate-spot": 16, "incubate": 4, "finetune": 2}
    by_group: Mapping[str, Mapping[str, float]] = {node.labels["ray.io/node-group"]: node.resources for node in nodes}
    assert by_group["incubate"]["memory"] == 56 * 1024**3
    assert by_group["incubate"]["GPU"] == 1
    assert by_group["finetune"]["CPU"] == 96  # the start parameter comes before the limit


@pytest.mark.parametrize(("text", "value"), [(4, 4.0), ("500m", 0.5), ("16Gi", 16 * 1024**3), ("1.5G", 1.5e9)])
def test_quantities_of_kubernetes(text: object, value: float) -> None:
    assert quantity(ONPREM, text) == value


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(UsageError, match="says '16GiB' where a quantity of Kubernetes's belongs"):
        quantity(ONPREM, "16GiB")


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("{groupName: a, maxReplicas: 1}", "Worker group a of .* has no limit of `cpu`"),
        ("{groupName: a, maxReplicas: 0, rayStartParams: {num-cpus: '4'}}", "does not describe nodes"),
    ],
)
def test_mistakes_of_a_file_for_kubernetes_are_told(group: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"kind: RayCluster\nspec: {{workerGroupSpecs: [{group}]}}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        nodes_of_file(file)


def test_fixed_hosts_are_planned_for_by_their_own_file() -> None:
    with pytest.raises(UsageError, match="for a cluster of fixed hosts, describe these as `nodes:`"):
        nodes_of_file(CLUSTER / "onprem.yaml")


def test_the_tables_of_fixed_hosts_agree() -> None:
    lines = (CLUSTER / "onprem" / "hosts").read_text(encoding="utf-8").splitlines()
    hosts = [line.split() for line in lines if line and not line.startswith("#")]
    provider = load(CLUSTER / "onprem.yaml")["provider"]
    assert {group: ip for ip, group, _ in hosts}["head"] == provider["head_ip"]
    assert [ip for ip, group, _ in hosts if group != "head"] == provider["worker_ips"]
    listed = sorted((group, spot) for _, group, spot in hosts if group != "head")
    described = [
        ("incubate" if entry["type"] == "desktop" else entry["type"], str(entry.get("spot", False)).lower())
        for entry in load(ONPREM)["nodes"]
        for _ in range(entry["count"])
    ]
    assert sorted(described) == listed
