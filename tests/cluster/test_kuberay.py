"""The files for Kubernetes, held against KubeRay's own schemas and the rules of its operator.

The schemas are those of its CRDs (`crds/NOTICE.md`). Rules between fields are those of `validation.go` of KubeRay 1.7
(`ray-operator/controllers/ray/utils/`).
"""

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import typer
from cluster_files import CLUSTER, GROUPS, KUBERAY, load, of, pinned, python_version
from kuberay_schema import check

import m2mkd_ray
from m2mkd_ray.cli import app
from m2mkd_ray.recipes import find_recipe

every_file = pytest.mark.parametrize("file", KUBERAY, ids=of)
every_job = pytest.mark.parametrize("file", [file for file in KUBERAY if "job" in file.stem], ids=of)


def cluster(content: dict) -> dict:
    """The spec of the cluster in a RayCluster or RayJob."""
    return content["spec"]["rayClusterSpec"] if content["kind"] == "RayJob" else content["spec"]


def pods(content: dict) -> list[dict]:
    """Specs of all pods, the head's first."""
    spec = cluster(content)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_the_files_that_are_promised_are_there() -> None:
    assert {file.stem for file in KUBERAY} == {"raycluster", "rayjob", "rayjob-spot"}


@pytest.mark.parametrize("file", sorted((CLUSTER / "kuberay").glob("*.yaml")), ids=of)
def test_kubernetes_would_know_every_field(file: Path) -> None:
    check(load(file))


SPOILT: dict[str, Callable[[dict], object]] = {
    "a key that is unknown": lambda job: job["spec"].update(backOffLimit=3),
    "a key of a pod": lambda job: pods(job)[1].update(terminationGracePeriod=3),
    "a number that has to be a string": lambda job: cluster(job)["headGroupSpec"]["rayStartParams"].update(x=0),
    "a label that is not a string": lambda job: cluster(job)["workerGroupSpecs"][0]["labels"].update(x=True),
    "a mode that is none": lambda job: cluster(job)["authOptions"].update(mode="tokens"),
    "a policy that is none": lambda job: job["spec"]["deletionStrategy"]["deletionRules"][0].update(policy="Delete"),
    "a key of a container": lambda job: pods(job)[0]["containers"][0].update(ressources={}),
    "a quantity that is none": lambda job: pods(job)[1]["containers"][0]["resources"]["limits"].update(memory="4GiB"),
    "a group without a pod": lambda job: cluster(job)["workerGroupSpecs"][0].pop("template"),
    "a key of the metadata": lambda job: job["metadata"].update(nam="x"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_the_check_refuses(spoil: Callable[[dict], object]) -> None:
    job = copy.deepcopy(load(CLUSTER / "kuberay" / "rayjob-spot.yaml"))
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        check(job)


@every_file
def test_the_groups_are_the_same_as_in_all_clusters(file: Path) -> None:
    spec = cluster(load(file))
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert {group["labels"]["m2mkd.node-group"] for group in groups} == GROUPS
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups:
        selector = group["template"]["spec"]["nodeSelector"]
        labels = group["labels"]
        assert selector == {key: labels[key] for key in ("m2mkd.node-group", "m2mkd.spot")}
        assert labels["ray.io/market-type"] == ("spot" if labels["m2mkd.spot"] == "true" else "on-demand")
        # KubeRay refuses labels among the start parameters.
        assert "labels" not in group["rayStartParams"]


@every_file
def test_token_and_autoscaler_v2_are_switched_on(file: Path) -> None:
    spec = cluster(load(file))
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert 0 < spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 600


@every_file
def test_a_node_may_drain_for_as_long_as_ray_takes(file: Path) -> None:
    for pod in pods(load(file))[1:]:
        env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] > float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) + 10


@every_file
def test_image_and_ray_are_those_of_the_constraints(file: Path) -> None:
    content = load(file)
    assert cluster(content)["rayVersion"] == pinned("ray")
    tag = f"m2mkd_ray:{m2mkd_ray.__version__}-ray{pinned('ray')}-py{python_version().replace('.', '')}"
    assert {pod["containers"][0]["image"].rsplit("/", 1)[1] for pod in pods(content)} == {tag}


@every_file
def test_every_pod_has_the_shared_storage_and_bounds(file: Path) -> None:
    claim = load(CLUSTER / "kuberay" / "storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(load(file)):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["securityContext"]["runAsNonRoot"]


def test_spot_is_tried_first_and_something_is_left_to_fall_back_to() -> None:
    groups = cluster(load(CLUSTER / "kuberay" / "rayjob-spot.yaml"))["workerGroupSpecs"]
    by_name = {group["groupName"]: group for group in groups}
    spot, fallback = by_name["incubate-spot"], by_name["incubate"]
    assert (spot["labels"]["m2mkd.spot"], fallback["labels"]["m2mkd.spot"]) == ("true", "false")
    assert spot["priority"] > fallback["priority"]
    assert all(group["labels"]["m2mkd.spot"] == "false" for name, group in by_name.items() if name != "incubate-spot")


@every_job
def test_the_operators_rules_for_deletion_hold(file: Path) -> None:
    spec = load(file)["spec"]
    rules = spec["deletionStrategy"]["deletionRules"]
    assert not spec.get("shutdownAfterJobFinishes")  # excludes rules
    assert "ttlSecondsAfterFinished" not in spec  # wants shutdownAfterJobFinishes
    assert not any(rule["policy"] == "DeleteWorkers" for rule in rules)  # refused where Ray scales
    for rule in rules:  # of the CRD's own rules between fields, which a JSON schema cannot say
        assert len({"jobStatus", "jobDeploymentStatus"} & rule["condition"].keys()) == 1
    conditions = [json.dumps([rule["policy"], rule["condition"]], sort_keys=True) for rule in rules]
    assert len(set(conditions)) == len(conditions)
    ended = {rule["condition"].get("jobStatus") for rule in rules if rule["policy"] == "DeleteCluster"}
    assert {"SUCCEEDED", "FAILED"} <= ended  # no end leaves a cluster that costs


@every_job
def test_a_job_is_tried_again_with_the_same_command_whose_driver_has_a_place(file: Path) -> None:
    content = load(file)
    spec = content["spec"]
    assert spec["backoffLimit"] >= 1
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["m2mkd", "run"]
    asked = typer.main.get_command(app).commands["run"].make_context("run", words[2:]).params
    assert find_recipe(asked["recipe"]).name == spec["metadata"]["recipe"]
    assert asked["store"].startswith("/mnt/m2mkd/")
    (wanted,) = json.loads(spec["entrypointResources"]).items()
    for group in cluster(content)["workerGroupSpecs"]:
        has = re.fullmatch(r'"(.*)"', group["rayStartParams"].get("resources", '"{}"'))
        assert has is not None
        offered = json.loads(has[1].replace('\\"', '"'))
        assert (offered.get(wanted[0], 0) >= wanted[1]) == (group["groupName"] == "cpu")
