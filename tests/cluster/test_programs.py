"""Programs, image and rights in cluster/: they parse, name the tested versions, and the scripts do what they say.

Slurm's commands and Ray's are stood in for by programs that write down how they were called.
"""

import configparser
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_files import CLUSTER, KUBERAY, RAY_UP, ROOT, load, of, pinned, python_version, ray_arguments, shim

SCRIPTS = [file for file in sorted(CLUSTER.rglob("*")) if file.suffix in (".sh", ".sbatch")]
TESTED = {
    *RAY_UP,
    *KUBERAY,
    *SCRIPTS,
    CLUSTER / "kuberay" / "storage.yaml",
    CLUSTER / "onprem" / "hosts",
    CLUSTER / "onprem" / "nodes.yaml",
    CLUSTER / "drain" / "watch.py",
    CLUSTER / "drain" / "m2mkd-drain.service",
    CLUSTER / "Dockerfile",
    CLUSTER / "Dockerfile.dockerignore",
    CLUSTER / "requirements-clouds.txt",
    CLUSTER / "README.md",
    *(CLUSTER / "iam").iterdir(),
    *(CLUSTER / "monitoring").iterdir(),
}


def test_every_file_of_the_folder_is_looked_at_by_a_test() -> None:
    there = {file for file in CLUSTER.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert sorted(of(file) for file in there - TESTED) == []


def test_the_readme_names_every_file_and_only_files_that_are_there() -> None:
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    assert all((CLUSTER / name).exists() for name in named), named
    for file in TESTED - {CLUSTER / "README.md"}:
        assert any(of(file) == name or of(file).startswith(name.rstrip("/") + "/") for name in named), of(file)


@pytest.mark.parametrize("script", SCRIPTS, ids=of)
def test_scripts_parse(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=of)
def test_shellcheck_finds_nothing(script: Path) -> None:
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


# Fixed hosts


def start_worker(tmp_path: Path, ip: str) -> subprocess.CompletedProcess[str]:
    """Run the script as the host with an address would."""
    shim(tmp_path, "ray", f'printf "%s\\n" "$RAY_NODE_MARKET_TYPE" "$@" > {tmp_path}/called')
    command = ["bash", str(CLUSTER / "onprem" / "start-worker.sh"), str(CLUSTER / "onprem" / "hosts"), "10.0.0.1:6379"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "M2MKD_HOST_IP": ip}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("ip", "group", "spot", "market"),
    [("192.168.10.11", "cpu", "false", "on-demand"), ("192.168.10.23", "incubate", "true", "spot")],
)
def test_a_fixed_host_starts_with_the_labels_of_its_line(
    ip: str, group: str, spot: str, market: str, tmp_path: Path
) -> None:
    ended = start_worker(tmp_path, ip)
    assert ended.returncode == 0, ended.stderr
    of_type, name, *words = (tmp_path / "called").read_text().splitlines()
    assert (of_type, name) == (market, "start")
    read = ray_arguments("start", "start", words)
    assert read["address"] == "10.0.0.1:6379"
    assert read["labels"] == f"m2mkd.node-group={group},m2mkd.spot={spot}"


@pytest.mark.parametrize("ip", ["192.168.10.99", "192.168.10.1", "192.168.10.10"])
def test_a_host_without_a_line_or_with_the_heads_does_not_start(ip: str, tmp_path: Path) -> None:
    ended = start_worker(tmp_path, ip)
    assert ended.returncode == 1
    assert "has no line 'ADDRESS cpu|incubate|finetune true|false' for this host" in ended.stderr
    assert not (tmp_path / "called").exists()


# Slurm


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A folder with Slurm, Ray and m2mkd in it, each writing to `calls` what it was asked."""
    # One write a line, so that those of several programs do not mix.
    say = f'printf "%s\n" "$(basename "$0") $*" >> {tmp_path}/calls'
    shim(tmp_path, "scontrol", f"[[ $1 == show ]] && echo node0 || {say}")
    shim(tmp_path, "hostname", "echo 10.1.1.1 fe80::1")
    # Drops its own options and runs the command here, as the step would on its node.
    shim(tmp_path, "srun", f'{say}\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_CPUS_ON_NODE=16 exec "$@"')
    shim(tmp_path, "ray", f"""{say}
[[ $1 != get-auth-token ]] || exec {Path(sys.executable).parent}/ray "$@"
[[ $1 == start ]] || exit 0
trap 'echo ended >> {tmp_path}/calls; exit 0' TERM
while true; do sleep 0.05; done""")  # fmt: skip
    shim(tmp_path, "m2mkd", f"""{say}
trap 'echo driver ended >> {tmp_path}/calls; exit 130' TERM
until [[ -e {tmp_path}/finish ]]; do sleep 0.05; done
exit "$(cat {tmp_path}/finish)\"""")  # fmt: skip
    return tmp_path


def sbatch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the script as Slurm does on the first node."""
    env = {**os.environ, "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST_HET_GROUP_0": "node0", "HOME": str(folder)}
    env |= {
        "M2MKD_VENV": str(folder / "none"),
        "M2MKD_STORE": "/shared/runs",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    script = str(CLUSTER / "slurm" / "m2mkd.sbatch")
    return subprocess.Popen(
        ["bash", script, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines(folder: Path) -> list[str]:
    """What was called so far."""
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def wait_for_driver(folder: Path) -> None:
    """Wait until all groups and the driver have started."""
    deadline = time.monotonic() + 30
    while sum(line.startswith(("ray start", "m2mkd")) for line in lines(folder)) < 5:
        assert time.monotonic() < deadline, lines(folder)
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 1])
def test_slurm_starts_all_groups_and_ends_with_the_run(code: int, slurm: Path) -> None:
    job = sbatch(slurm, "demo", "--set", "seed=1")
    wait_for_driver(slurm)
    (slurm / "finish").write_text(str(code))
    _, log = job.communicate(timeout=30)
    assert job.returncode == code, log
    called = lines(slurm)
    starts = [ray_arguments("start", "start", line.split()[2:]) for line in called if line.startswith("ray start")]
    assert {start["labels"].split(",")[0].split("=")[1] for start in starts} == {"head", "cpu", "incubate", "finetune"}
    (head,) = (start for start in starts if start["head"])
    assert (head["num_cpus"], head["num_gpus"], head["port"]) == (0, 0, 21567)
    ports = [head[f"{name}_port"] for name in ("dashboard", "dashboard_agent_listen", "ray_client_server")]
    assert len({head["port"], *map(int, ports)}) == 4
    assert {start["address"] for start in starts if not start["head"]} == {"10.1.1.1:21567"}
    assert {start["num_cpus"] for start in starts if not start["head"]} == {16}
    assert all(start["block"] and start["temp_dir"] == "/tmp/ray-1234567" for start in starts)
    (driver,) = (line for line in called if line.startswith("m2mkd"))
    assert driver.strip() == "m2mkd run demo --set seed=1 --address 10.1.1.1:21567 --store /shared/runs"
    assert called.count("ended") == 4
    assert not any(line.startswith("ray stop") for line in called)  # it would end the Ray of others
    token = slurm / ".ray" / "auth_token"  # made by Ray's own command
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("reason", "is_requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_slurm_lets_the_driver_checkpoint_before_it_ends_the_nodes(
    reason: signal.Signals, is_requeued: bool, slurm: Path
) -> None:
    """Preempted, for which Slurm requeues a job by itself, and out of time, for which it does not."""
    job = sbatch(slurm, "demo")
    wait_for_driver(slurm)
    job.send_signal(reason)
    _, log = job.communicate(timeout=30)
    assert job.returncode == 143, log
    ends = [line for line in lines(slurm) if "ended" in line]
    assert ends == ["driver ended", *["ended"] * 4]
    assert ("scontrol requeue 1234567" in lines(slurm)) == is_requeued
    assert "--signal=B:USR1@120" in (CLUSTER / "slurm" / "m2mkd.sbatch").read_text(encoding="utf-8")


def test_slurm_wants_a_recipe(slurm: Path) -> None:
    job = sbatch(slurm)
    assert "expected a recipe" in job.communicate(timeout=30)[1]
    assert job.returncode == 2
    assert lines(slurm) == []


# Image


def test_the_image_has_the_tested_python_and_cuda() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON=(.+)$", text, re.MULTILINE)[1] == python_version()
    cuda = "-".join(pinned("nvidia-cuda-runtime").split(".")[:2])
    assert re.search(r"^ARG CUDA=(.+)$", text, re.MULTILINE)[1] == cuda
    assert f"ray{pinned('ray')}-py{python_version().replace('.', '')}" in text


def test_the_image_installs_nothing_that_the_constraints_do_not_pin() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    installs = re.findall(r"pip install (.*)", text)
    assert len(installs) == 4
    assert all(re.search(r"-c (constraints\.txt|/tmp/constraints-clouds\.txt)\b", install) for install in installs)
    for name in ("torch", "torchvision", "setuptools", "wheel", "ninja", "deepspeed", "ray"):
        assert pinned(name)


def test_deepspeed_has_the_ops_that_are_compiled_into_the_image() -> None:
    built = set(re.findall(r"DS_BUILD_(\w+)=1", (CLUSTER / "Dockerfile").read_text(encoding="utf-8")))
    folder = Path(importlib.util.find_spec("deepspeed").origin).parent / "ops" / "op_builder"
    known = {
        found
        for file in folder.glob("*.py")
        for found in re.findall(r'BUILD_VAR = "DS_BUILD_(\w+)"', file.read_text(encoding="utf-8"))
    }
    assert built
    assert built <= known
    # Without it the builder sees no GPU, and builds for CPUs what then is not used.
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"DS_ACCELERATOR=cuda DS_BUILD_OPS=0( DS_BUILD_\w+=1)+", text)


def test_packages_for_the_clouds_are_pinned_and_do_not_move_the_tested_set() -> None:
    lines_ = (CLUSTER / "requirements-clouds.txt").read_text(encoding="utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines_ if not line.startswith("#"))
    tested = dict(re.findall(r"^([\w.-]+)={2,3}(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    moved = {name for name in wanted if name in tested and tested[name] != wanted[name]}
    assert moved == {"python-dateutil"}  # said in the file: botocore wants it below 3
    for ray_provider in ("boto3", "google-api-python-client", "azure-identity", "azure-mgmt-compute"):
        assert ray_provider in wanted


# Unit and rights


def test_the_unit_starts_the_watcher_with_options_that_it_has() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(CLUSTER / "drain" / "m2mkd-drain.service")
    assert set(unit) - {"DEFAULT"} == {"Unit", "Service", "Install"}
    program, watcher, *words = unit["Service"]["ExecStart"].split()
    assert (program, watcher) == ("/usr/bin/python3", "/opt/m2mkd/cluster/drain/watch.py")
    known = subprocess.run(
        [sys.executable, str(CLUSTER / "drain" / "watch.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert words[::2] == ["--cloud", "--ray"]
    assert all(re.search(rf"^  {word} ", known, re.MULTILINE) for word in words[::2])
    assert unit["Service"]["Restart"] == "on-failure"  # 0 means that the node drains


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit() -> None:
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(CLUSTER / "drain/m2mkd-drain.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in checked.stderr.splitlines() if "m2mkd-drain.service" in line]
    assert complaints == []


@pytest.mark.parametrize("name", ["aws-head", "aws-node"])
def test_rights_on_aws_are_bounded(name: str) -> None:
    policy = json.loads((CLUSTER / "iam" / f"{name}.json").read_text(encoding="utf-8"))
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        reads = all(re.search(r":(Describe|GetAuthorizationToken)", action) for action in actions)
        assert statement["Resource"] != "*" or reads, statement["Sid"]


def test_the_head_on_aws_may_do_what_rays_provider_calls() -> None:
    provider = Path(importlib.util.find_spec("ray").origin).parent / "autoscaler/_private/aws/node_provider.py"
    allowed = (CLUSTER / "iam" / "aws-head.json").read_text(encoding="utf-8")
    source = provider.read_text(encoding="utf-8")
    for call, action in (
        ("create_instances", "ec2:RunInstances"),
        ("create_tags", "ec2:CreateTags"),
        ("terminate_instances", "ec2:TerminateInstances"),
        ("describe_instance_types", "ec2:DescribeInstanceTypes"),
    ):
        assert call in source
        assert f'"{action}"' in allowed


def test_rights_on_azure_and_gcp_name_each_action() -> None:
    azure = json.loads((CLUSTER / "iam" / "azure-head.json").read_text(encoding="utf-8"))
    assert not any("*" in action for action in azure["Actions"])
    assert all("/resourceGroups/" in scope for scope in azure["AssignableScopes"])
    gcp = load(CLUSTER / "iam" / "gcp-head.yaml")
    assert all(re.fullmatch(r"compute\.\w+\.\w+", name) for name in gcp["includedPermissions"])
