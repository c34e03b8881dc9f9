"""A head and two workers as hosts of their own, one of which is cut off and comes back while a pair trains on it.

Run as a program, which writes down what happened: `hosts.py networked|stopped STORE RESULT.json`. Networked, every
host is a network namespace behind a bridge, inside a namespace of the program's own (`unshare`), so that nothing of it
is seen outside and all ends with the program; a cable is pulled, and what runs there goes on alone. Stopped, all are
processes side by side, and those of one host are stopped.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ray
from autoscaling import command_of, kill_if_there, parent_of, wait_until
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray._private.services import get_node_ip_address
from small import small_demo

from m2mkd_ray.execution import Event, StageProgress, StageRetried, StageStarted, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.pipeline import plan

PAIRS = ("pair-0", "pair-1")
STEP = 10
"""Of pair-0, at which its host is cut off."""
_RAY = str(Path(sys.executable).parent / "ray")
_IS_UP = "Ray runtime started"
_HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
"""A host that says nothing is taken for dead after some seconds, not after half a minute."""


class Networked:
    """Hosts w1 and w2 in network namespaces; the head is outside of both, at the bridge."""

    head = "10.77.0.1"

    def __init__(self) -> None:
        for line in (
            "mount -t tmpfs tmpfs /run",
            "mkdir /run/netns",
            "ip link set lo up",
            "ip link add br0 type bridge",
            f"ip addr add {self.head}/24 dev br0",
            "ip link set br0 up",
            "ip route add default via 10.77.0.254 dev br0",
        ):
            _do(line)
        for host in ("w1", "w2"):
            _do(f"ip netns add {host}")
            _do(f"ip link add {host} type veth peer name eth0 netns {host}")
            _do(f"ip link set {host} master br0 up")
            _do(f"ip -n {host} addr add {self.address(host)}/24 dev eth0")
            for device in ("lo", "eth0"):
                _do(f"ip -n {host} link set {device} up")
            _do(f"ip -n {host} route add default via {self.head}")

    def address(self, host: str) -> str:
        """Of its own end of the cable."""
        return {"w1": "10.77.0.2", "w2": "10.77.0.3"}[host]

    def on(self, host: str) -> list[str]:
        """What a command starts with that is to run there."""
        return ["ip", "netns", "exec", host]

    def cut(self, host: str, pid: int) -> None:
        """Pull the cable."""
        _do(f"ip link set {host} down")

    def mend(self, host: str) -> None:
        """Plug it in again."""
        _do(f"ip link set {host} up")


class Stopped:
    """Hosts that are processes on this one."""

    def __init__(self) -> None:
        self.head = get_node_ip_address()
        self._stopped: list[int] = []

    def address(self, host: str) -> str:
        """The same for all."""
        return self.head

    def on(self, host: str) -> list[str]:
        """Nothing."""
        return []

    def cut(self, host: str, pid: int) -> None:
        """Stop a worker's raylet and all that it has started."""
        raylet = parent_of(pid)
        children = [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]
        self._stopped = [raylet, *(child for child in children if parent_of(child) == raylet)]
        for each in self._stopped:
            os.kill(each, signal.SIGSTOP)

    def mend(self, host: str) -> None:
        """Let them go on."""
        for each in self._stopped:
            try:
                os.kill(each, signal.SIGCONT)
            except ProcessLookupError:
                continue


class Cluster:
    """Ray on these hosts."""

    def __init__(self, hosts: Networked | Stopped, folder: str) -> None:
        self.hosts, self.folder = hosts, folder
        Path(f"{folder}.log").touch()
        self.raylets: dict[str, subprocess.Popen[bytes]] = {}
        with socket.socket() as found:
            found.bind(("", 0))
            self.address = f"{hosts.head}:{found.getsockname()[1]}"

    def start(self) -> None:
        """Start the head, and a node on each host."""
        port = self.address.rpartition(":")[2]
        settings = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        settings += [f"--temp-dir={self.folder}", f"--system-config={json.dumps(_HEALTH)}"]
        self._start("head", [], self.hosts.head, settings)
        for host in ("w1", "w2"):
            self.add(host)

    def add(self, host: str) -> None:
        """Start a node on a host."""
        settings = [f"--address={self.address}", "--num-cpus=2", f"--labels=host={host}"]
        self._start(host, self.hosts.on(host), self.hosts.address(host), settings)

    def _start(self, host: str, before: Sequence[str], address: str, settings: Sequence[str]) -> None:
        command = [*before, _RAY, "start", "--block", f"--node-ip-address={address}", "--num-gpus=0"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000", *settings]
        up = self.log().count(_IS_UP)
        with Path(f"{self.folder}.log").open("ab") as log:
            self.raylets[host] = subprocess.Popen(command, stdout=log, stderr=log)
        # One after the other: all share a folder, and would choose the same names for their sockets.
        wait_until(lambda: self.log().count(_IS_UP) > up, 60, self.log)

    def close(self) -> None:
        """End what was started, and what that has started: each has the folder or the address in its command line."""
        for node in self.raylets.values():
            node.kill()
        for process in Path("/proc").iterdir():
            words = command_of(process) if process.name.isdigit() else ""
            if self.folder in words or f"--gcs-address={self.address}" in words:
                kill_if_there(int(process.name))

    def log(self) -> str:
        """What the nodes have said."""
        return Path(f"{self.folder}.log").read_text()

    def nodes(self) -> dict[str, str]:
        """Hosts by the ids of their nodes that are alive, but for the head."""
        alive = (node for node in ray.nodes() if node["Alive"])
        return {node["NodeID"]: node["Labels"]["host"] for node in alive if "host" in node["Labels"]}


class Cutter:
    """Cuts a pair's host off once, and mends it when the pair has begun elsewhere."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.before = cluster, cluster.nodes()
        self.where: dict[str, list[str]] = {}
        self.retried: dict[str, str] = {}
        self.lost = ""

    def __call__(self, event: Event) -> None:
        match event:
            case StageStarted(stage=stage, where=where):
                hosts = self.where.setdefault(stage.name, [])
                hosts.append(self.before[where["node_id"]])
                if self.lost and stage.name == PAIRS[0]:
                    self.cluster.hosts.mend(self.lost)
            case StageRetried(stage=stage, kind=kind):
                self.retried[stage.name] = str(kind)
            case StageProgress(stage=stage, progress=progress):
                if stage.name == PAIRS[0] and progress.step >= STEP and not self.lost:
                    self.lost = self.where[PAIRS[0]][0]
                    self.cluster.hosts.cut(self.lost, progress.pid)


def main(kind: str, root: str, result: str) -> None:
    """Train both pairs on the hosts, one of which is cut off; see the file's docstring."""
    enable_token_auth_by_default()
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Networked() if kind == "networked" else Stopped(), f"{folder}/ray")
        try:
            cluster.start()
            Path(result).write_text(json.dumps(_drive(cluster, Store(root))))
        finally:
            cluster.close()


def _drive(cluster: Cluster, store: Store) -> dict:
    launcher, stages = RayLauncher(cluster.address), plan(small_demo())
    wait_until(lambda: len(cluster.nodes()) == 2, 60, cluster.log)
    cutter = Cutter(cluster)
    execute(stages, store, launcher, until=PAIRS, on_event=cutter).raise_for_failures()
    lost = cluster.raylets[cutter.lost]
    wait_until(lambda: lost.poll() is not None, 60, cluster.log)  # nobody may come back under an id that was given up
    cluster.add(cutter.lost)
    wait_until(lambda: len(cluster.nodes()) == 2, 60, cluster.log)
    again = [node for node, host in cluster.nodes().items() if host == cutter.lost and node not in cutter.before]
    found = {"where": cutter.where, "retried": cutter.retried, "lost": cutter.lost, "again": len(again)}
    found["problems"] = launcher.problems(stages[:1], store)  # every node is asked to write the store
    launcher.close()
    return found


def _do(line: str) -> None:
    done = subprocess.run(line.split(), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{line}: {done.stderr}")


if __name__ == "__main__":
    started = time.monotonic()
    main(*sys.argv[1:])
    print(f"{time.monotonic() - started:.0f} s")
