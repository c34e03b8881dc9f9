"""A cluster on this machine that grows and shrinks: Ray's autoscaler v2 over nodes that are only processes.

Its Ray has a port, a temporary folder and a session of its own, and is ended by the ids of
its own processes: `ray stop` and Ray's `AutoscalingCluster` would end every Ray on the machine.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ray
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray._private.services import get_node_ip_address

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""Of the provider's head: FAKE_HEAD_NODE_ID."""
HEAD = "ray.head.default"
"""The autoscaler's v2 name of the head's node type; with another one it fails."""


class Autoscaling:
    """A head that starts nodes of these types as they are asked for.

    Args:
        folder: where Ray keeps its files; short, as a socket's path has at most 107 bytes.
        types: resources of a node, and how many there may be, by the type's name.
        idle_minutes: after which an idle node is taken away.
    """

    def __init__(
        self, folder: Path, types: Mapping[str, tuple[Mapping[str, int], int]], *, idle_minutes: float
    ) -> None:
        enable_token_auth_by_default()  # of this process too, as a local `ray.init` before this one would have done
        self.folder, port = folder, _free_port()
        self.address = f"{get_node_ip_address()}:{port}"
        config = {
            "cluster_name": "grows",
            "max_workers": sum(most for _, most in types.values()),
            "upscaling_speed": 10,
            "idle_timeout_minutes": idle_minutes,
            "provider": {
                "type": "external",
                "module": _PROVIDER,
                "head_node_id": _HEAD_ID,
                "launch_multiple": True,
                "gcs_address": self.address,
            },
            "available_node_types": {
                HEAD: {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 0},
                **{
                    name: {
                        "resources": dict(resources),
                        "labels": {"m2mkd.node-group": name, "m2mkd.spot": "true"},
                        "node_config": {},
                        "min_workers": 0,
                        "max_workers": most,
                    }
                    for name, (resources, most) in types.items()
                },
            },
            "head_node_type": HEAD,
            "auth": {"ssh_user": "nobody"},
            **{key: {} for key in ("docker", "file_mounts")},
            **{key: [] for key in (f"{of}setup_commands" for of in ("", "head_", "worker_"))},
            **{key: [] for key in (f"{of}_start_ray_commands" for of in ("head", "worker"))},
            **{key: [] for key in ("initialization_commands", "cluster_synced_files")},
        }
        (folder / "cluster.yaml").write_text(json.dumps(config))  # which is YAML
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += [f"--autoscaling-config={folder / 'cluster.yaml'}", f"--temp-dir={folder}/ray", "--num-cpus=1"]
        command += ["--num-gpus=0", "--include-dashboard=false", "--disable-usage-stats"]
        of_autoscaler = {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        }
        self.log = folder / "head.log"
        with self.log.open("wb") as log:
            self._head = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **of_autoscaler}, start_new_session=True
            )
        wait_until(self._is_up, 60, self.log.read_text)

    def _is_up(self) -> bool:
        assert self._head.poll() is None, self.log.read_text()
        return "Ray runtime started" in self.log.read_text()

    def drain(self, node_id: str, deadline_s: int) -> None:
        """Say that a node goes, as a watcher of a spot machine does."""
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address]
        command += ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(deadline_s)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def close(self) -> None:
        """End the head, the autoscaler and all nodes, by their ids."""
        self._head.send_signal(signal.SIGKILL)
        self._head.wait()
        for pid in self._pids():
            kill_if_there(pid)

    def _pids(self) -> list[int]:
        """Processes of this Ray: each has its folder in the command line."""
        processes = [process for process in Path("/proc").iterdir() if process.name.isdigit()]
        return [int(process.name) for process in processes if f"{self.folder}/ray" in command_of(process)]


def kill_node(worker_pid: int) -> None:
    """Kill the node of a worker: its parent, after which the worker ends by itself."""
    parent = parent_of(worker_pid)
    assert "raylet" in command_of(Path("/proc") / str(parent))
    os.kill(parent, signal.SIGKILL)


def workers() -> set[str]:
    """Ids of the nodes that are alive, but for the head."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != _HEAD_ID}


def wait_until(is_so: Callable[[], bool], seconds: float, said: Callable[[], object]) -> None:
    """Come back when something is true; fails with what is `said` if it is not in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


def kill_if_there(pid: int) -> None:
    """End a process that may have ended meanwhile."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def parent_of(pid: int) -> int:
    """The process that started another; 0: it is there no more."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def command_of(process: Path) -> str:
    """The command line of a process, by its folder in /proc; empty: there is none that may be read."""
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""  # it ended meanwhile, or is another user's


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
