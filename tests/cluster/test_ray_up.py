"""The files that `ray up` takes, held against Ray's own checks, constraints.txt and each other."""

import copy
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cluster_files import CLUSTER, GROUPS, RAY_UP, load, of, pinned, python_version, ray_arguments
from ray._private.label_utils import validate_label_key, validate_label_value
from ray.autoscaler._private.util import prepare_config, validate_config

import m2mkd_ray

every_file = pytest.mark.parametrize("file", RAY_UP, ids=of)
with_types = pytest.mark.parametrize("file", [file for file in RAY_UP if file.stem != "onprem"], ids=of)
of_clouds = pytest.mark.parametrize("file", sorted(CLUSTER.glob("[ag]*.yaml")), ids=of)
with_spot = pytest.mark.parametrize("file", sorted(CLUSTER.glob("*-spot.yaml")), ids=of)
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def test_the_files_that_are_promised_are_there() -> None:
    names = {file.stem for file in RAY_UP}
    assert names == {"aws", "aws-spot", "gcp", "gcp-spot", "azure", "onprem", "local-autoscaling"}


@every_file
def test_ray_takes_the_file(file: Path) -> None:
    validate_config(prepare_config(load(file)))


@pytest.mark.parametrize("key", ["spot", "label", "idle_timeout"])
def test_ray_refuses_a_misspelt_key(key: str) -> None:
    config = load(CLUSTER / "aws.yaml")
    config["available_node_types"]["cpu"][key] = {}
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(copy.deepcopy(config)))


@with_types
def test_the_groups_are_the_same_everywhere(file: Path) -> None:
    config = load(file)
    types = config["available_node_types"]
    assert {kind["labels"]["m2mkd.node-group"] for kind in types.values()} == GROUPS
    head = types[config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["labels"]["m2mkd.node-group"] == "head"
    for name, kind in types.items():
        gpus, group = kind["resources"]["GPU"], kind["labels"]["m2mkd.node-group"]
        assert (gpus > 0) == (group in ("incubate", "finetune")), name
        assert kind["labels"]["m2mkd.spot"] in ("true", "false")
    workers = [kind for kind in types.values() if kind is not head]
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers)
    assert max(kind["resources"]["GPU"] for kind in workers) == types["finetune"]["resources"]["GPU"]


@with_types
def test_rays_rules_for_labels_hold(file: Path) -> None:
    for kind in load(file)["available_node_types"].values():
        for key, value in kind["labels"].items():
            assert validate_label_key(key) is None
            validate_label_value(value)


@of_clouds
def test_what_the_cloud_is_asked_for_is_what_the_labels_say(file: Path) -> None:
    for name, kind in load(file)["available_node_types"].items():
        node, cloud = kind["node_config"], file.stem.split("-")[0]
        asked = {
            "aws": node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
            "gcp": any(each.get("preemptible", False) for each in node.get("scheduling", [])),
            "azure": node.get("azure_arm_parameters", {}).get("priority") == "Spot",
        }[cloud]
        assert kind["labels"]["m2mkd.spot"] == str(asked).lower(), name
        assert kind["labels"]["ray.io/market-type"] == ("spot" if asked else "on-demand"), name


@pytest.mark.parametrize("file", [*sorted(CLUSTER.glob("*-spot.yaml")), CLUSTER / "local-autoscaling.yaml"], ids=of)
def test_spot_is_tried_first_and_something_is_left_to_fall_back_to(file: Path) -> None:
    types = load(file)["available_node_types"]
    spot = {name: kind for name, kind in types.items() if kind["labels"]["m2mkd.spot"] == "true"}
    assert spot
    for name, kind in spot.items():
        fallback = types[name.removesuffix("-spot")]
        assert fallback["labels"]["m2mkd.spot"] == "false"
        assert fallback["labels"]["m2mkd.node-group"] == kind["labels"]["m2mkd.node-group"] == "incubate"
        assert fallback["resources"] == kind["resources"]
        assert kind["priority"] > fallback["priority"]


@with_spot
def test_spot_nodes_are_watched_for_their_clouds_notices(file: Path) -> None:
    start = load(file)["worker_start_ray_commands"][-1]
    cloud = file.stem.removesuffix("-spot")
    assert f"cluster/drain/watch.py --cloud {cloud} " in start
    assert "/opt/m2mkd/cluster" in (CLUSTER / "Dockerfile").read_text()


@every_file
def test_every_shell_command_parses_and_hides_no_comment(file: Path) -> None:
    config = load(file)
    for key in COMMANDS:
        for command in config.get(key, []):
            # In a folded scalar a comment is part of the command, and ends it.
            assert "#" not in command, f"{key}: {command}"
            checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, f"{key}: {checked.stderr}"


def ray_starts(config: dict) -> list[list[str]]:
    """Arguments of each `ray start` in the commands."""
    lexers = [
        shlex.shlex(command, posix=True, punctuation_chars=";&|")
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
    ]
    found = []
    for lexer in lexers:
        lexer.whitespace_split = True
        words = list(lexer)
        starts = [i for i in range(len(words) - 1) if words[i : i + 2] == ["ray", "start"]]
        found += [words[i + 2 :] for i in starts]
    return found


@of_clouds
def test_ray_start_knows_every_option_that_it_is_given(file: Path) -> None:
    head, worker = (ray_arguments("start", "start", words) for words in ray_starts(load(file)))
    assert head["head"]
    assert (head["num_cpus"], head["num_gpus"]) == (0, 0)
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert worker["address"] == "$RAY_HEAD_IP:6379"
    assert head["port"] == 6379
    assert head["metrics_export_port"] == worker["metrics_export_port"] == 8080


@every_file
def test_nodes_go_when_they_are_idle(file: Path) -> None:
    assert 0 < load(file)["idle_timeout_minutes"] <= 10


@of_clouds
def test_autoscaler_v2_is_switched_on_where_priorities_need_it(file: Path) -> None:
    assert "export RAY_enable_autoscaler_v2=1;" in load(file)["head_start_ray_commands"][-1]


@pytest.mark.parametrize("file", [file for file in RAY_UP if file.stem != "local-autoscaling"], ids=of)
def test_every_node_gets_the_token_and_starts_only_with_it(file: Path) -> None:
    config = load(file)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("file", [file for file in RAY_UP if file.stem != "local-autoscaling"], ids=of)
def test_image_and_ray_are_those_of_the_constraints(file: Path) -> None:
    config = load(file)
    tag = config["docker"]["image"].rsplit("/", 1)[1]
    python = python_version().replace(".", "")
    assert tag == f"m2mkd_ray:{m2mkd_ray.__version__}-ray{pinned('ray')}-py{python}"
    assert any(f'"{pinned("ray")}"' in command for command in config["setup_commands"])


@pytest.mark.parametrize("file", [file for file in RAY_UP if file.stem != "local-autoscaling"], ids=of)
def test_the_shared_storage_is_mounted_on_the_machine_and_in_its_container(file: Path) -> None:
    config = load(file)
    assert any("mountpoint -q /mnt/m2mkd" in command for command in config["initialization_commands"])
    assert "--volume /mnt/m2mkd:/mnt/m2mkd" in config["docker"]["run_options"]


@of_clouds
def test_what_the_containers_user_writes_to_is_its_own(file: Path) -> None:
    """A new file system belongs to root."""
    commands = load(file)["initialization_commands"]
    (mount,) = (place for place, command in enumerate(commands) if "mountpoint -q" in command)
    (own,) = (place for place, command in enumerate(commands) if "install -d -o 1000 -g 1000" in command)
    assert mount < own
    assert {"/mnt/m2mkd/runs", "/mnt/m2mkd/data", "/tmp/ray"} <= set(commands[own].split())
    assert "--uid 1000" in (CLUSTER / "Dockerfile").read_text()
    assert "--volume /tmp/ray:/tmp/ray" in load(file)["docker"]["run_options"]


def test_no_image_of_aws_is_one_that_ray_chooses() -> None:
    """What `latest_dlami` stands for in Ray 2.60 has a driver that is too old for CUDA 13."""
    for file in CLUSTER.glob("aws*.yaml"):
        kinds = load(file)["available_node_types"].values()
        assert {kind["node_config"]["ImageId"] for kind in kinds} == {"ami-0123456789abcdef0"}


PLACEHOLDER = re.compile(
    r"123456789012|your-|yourregistry|yourfiles|0123456789abcdef0|00000000-0000|registry\.example|192\.168\.10|10\.0\.0\.2|ami-"
)


@pytest.mark.parametrize("file", [*RAY_UP, *sorted(CLUSTER.glob("kuberay/*.yaml"))], ids=of)
def test_every_line_that_a_user_has_to_change_says_so(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("#") and PLACEHOLDER.search(line):
            near = lines[max(0, number - 8 if file.stem == "onprem" else number - 4) : number + 1]
            assert any("EDIT" in text for text in near), f"{of(file)}:{number + 1}: {line}"
