"""The drain watcher, as the program that it is, before servers that speak each cloud's metadata protocol.

In Ray's place stands a program that writes down how it was called; Ray's own parser then reads that. The test marked
`ray` calls the real one.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cluster_files import CLUSTER, ray_arguments, shim
from ray.cluster_utils import Cluster

WATCH = CLUSTER / "drain" / "watch.py"
NODE = "a" * 56


class Metadata(ThreadingHTTPServer):
    """A metadata service of this machine. `notice` is what the cloud says, None for nothing."""

    daemon_threads = True

    def __init__(self, handler: type["Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.notice: str | None = None
        self.asked: list[str] = []
        self.broken = False
        self.tokens = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"

    def wait_until_asked(self, times: int) -> None:
        """Wait for so many requests from now on."""
        until, deadline = len(self.asked) + times, time.monotonic() + 20
        while len(self.asked) < until:
            assert time.monotonic() < deadline, self.asked
            time.sleep(0.02)


class Handler(BaseHTTPRequestHandler):
    """What all of them do."""

    server: Metadata

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: what was asked is in `asked`."""

    def answer(self, status: int, text: str = "", **headers: str) -> None:
        """Send an answer."""
        self.server.asked.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        """Nothing is taken, but by AWS."""
        self.answer(405)

    def do_GET(self) -> None:
        """Refuse while broken."""
        if self.server.broken:
            self.answer(503)
        else:
            self.get()


class Aws(Handler):
    """IMDSv2: nothing without a token, which is had by PUT and runs out; 404 while there is no notice."""

    def do_PUT(self) -> None:
        """A session's token."""
        wanted = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        if not wanted or not 1 <= int(wanted) <= 21600:
            return self.answer(400)
        self.server.tokens += 1
        return self.answer(200, f"token-{self.server.tokens}")

    def get(self) -> None:
        """The instance's action."""
        if self.headers["X-aws-ec2-metadata-token"] != f"token-{self.server.tokens}":
            return self.answer(401)
        if self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            return self.answer(404)
        return self.answer(200, self.server.notice)


class Gcp(Handler):
    """Refuses without its header and sends it back."""

    def get(self) -> None:
        """Whether it is preempted."""
        if self.headers["Metadata-Flavor"] != "Google":
            return self.answer(403)
        if self.path != "/computeMetadata/v1/instance/preempted":
            return self.answer(404, Metadata_Flavor="Google")
        return self.answer(
            200, "FALSE" if self.server.notice is None else self.server.notice, Metadata_Flavor="Google"
        )


class Azure(Handler):
    """Refuses without its header and without a version."""

    def get(self) -> None:
        """Events, and the machine's name."""
        if self.headers["Metadata"] != "true" or "api-version=" not in self.path:
            return self.answer(400)
        if self.path.startswith("/metadata/instance/compute/name") and "format=text" in self.path:
            return self.answer(200, "node-7")
        if self.path.startswith("/metadata/scheduledevents"):
            return self.answer(200, self.server.notice or '{"DocumentIncarnation": 1, "Events": []}')
        return self.answer(404)


CLOUDS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@contextlib.contextmanager
def serving(cloud: str) -> Iterator[Metadata]:
    """A metadata service while the block runs."""
    server = Metadata(CLOUDS[cloud])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def announced(cloud: str, in_s: float) -> str:
    """What a cloud says when it will take the machine in so many seconds."""
    at = datetime.now(UTC) + timedelta(seconds=in_s)
    if cloud == "aws":
        return json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})
    return "TRUE" if cloud == "gcp" else azure_events(("Preempt", ["node-7"], at))


def azure_events(*events: tuple[str, list[str], datetime]) -> str:
    """Azure's document of events."""
    return json.dumps({"DocumentIncarnation": 2, "Events": [
        {"EventId": str(number), "EventType": kind, "ResourceType": "VirtualMachine", "Resources": machines,
         "EventStatus": "Scheduled", "NotBefore": format_datetime(at, usegmt=True)}
        for number, (kind, machines, at) in enumerate(events)
    ]})  # fmt: skip


class Watcher:
    """The program, running."""

    def __init__(self, cloud: str, server: Metadata, *options: str, ray: str) -> None:
        command = [sys.executable, "-S", str(WATCH), "--cloud", cloud, "--metadata-url", server.url]
        command += ["--interval", "0.05", "--ray", ray, *options]
        # A proxy that goes nowhere: the metadata service must not be looked for there.
        env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)

    def ended(self) -> tuple[int, str]:
        """Exit code and log."""
        log = self.process.communicate(timeout=30)[1]
        return self.process.returncode, log

    def end(self) -> None:
        """Whatever happened, leave no process."""
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watcher]]:
    """Starts watchers, with the program in Ray's place unless another is named."""
    watchers: list[Watcher] = []

    def start(cloud: str, server: Metadata, *options: str, ray: str = str(tmp_path / "ray")) -> Watcher:
        watchers.append(Watcher(cloud, server, *options, ray=ray))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.end()


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A file to which the program in Ray's place writes its arguments, a line a call; `fails` in its folder: how often
    it fails before."""
    shim(tmp_path, "ray", f"""\
printf '%s\\0' "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls
if [[ $* == *10.9.9.9* ]]; then echo "No resource in the cluster"; exit 0; fi
if [[ $1 == list ]]; then echo '[{{"node_id": "{NODE}"}}]'; exit 0; fi
left=$(cat {tmp_path}/fails 2> /dev/null || echo 0)
if ((left > 0)); then echo $((left - 1)) > {tmp_path}/fails; echo "no GCS" >&2; exit 1; fi""")  # fmt: skip
    return tmp_path / "calls"


def called(calls: Path) -> list[list[str]]:
    """Arguments of each call."""
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()] if calls.exists() else []


@pytest.mark.parametrize(
    ("cloud", "in_s", "least", "most"), [("aws", 120, 108, 115), ("gcp", 30, 22, 25), ("azure", 60, 48, 55)]
)
def test_on_a_notice_ray_drains_with_the_time_that_is_left(
    cloud: str, in_s: float, least: int, most: int, calls: Path, watch
) -> None:
    with serving(cloud) as server:
        watcher = watch(cloud, server, "--margin", "5")
        server.wait_until_asked(6)
        assert watcher.process.poll() is None
        assert called(calls) == []  # nothing before there is a notice
        server.notice = announced(cloud, in_s)
        code, log = watcher.ended()
    assert code == 0, log
    ((name, *words),) = called(calls)
    assert name == "drain-node"
    read = ray_arguments("drain-node", "drain-node", words)
    assert read["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert least <= read["deadline_remaining_seconds"] <= most
    assert read["node_id"] is None  # Ray's default: the node that it runs on
    assert cloud.lower() in str(read["reason_message"]).lower()


def test_the_token_of_aws_is_asked_for_again_when_it_runs_out(calls: Path, watch) -> None:
    with serving("aws") as server:
        watcher = watch("aws", server)
        server.wait_until_asked(5)
        assert server.tokens == 1  # not one a question
        server.tokens = 7  # what the watcher has is worth nothing now
        server.wait_until_asked(4)
        server.notice = announced("aws", 60)
        assert watcher.ended()[0] == 0
        assert server.tokens == 8


def test_a_notice_of_azure_for_another_machine_or_of_another_kind_is_none(calls: Path, watch) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=90)
    with serving("azure") as server:
        server.notice = azure_events(("Preempt", ["node-8"], soon), ("Reboot", ["node-7"], soon))
        watcher = watch("azure", server)
        server.wait_until_asked(6)
        assert watcher.process.poll() is None
        later = soon + timedelta(seconds=60)
        server.notice = azure_events(("Terminate", ["node-7"], later), ("Preempt", ["node-7", "node-8"], soon))
        assert watcher.ended()[0] == 0
    (words,) = called(calls)
    assert int(words[words.index("--deadline-remaining-seconds") + 1]) < 90  # the earlier of both


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_is_silent_for_a_while_is_asked_on_and_told_of_once(cloud: str, calls: Path, watch) -> None:
    with serving(cloud) as server:
        server.broken = True
        watcher = watch(cloud, server)
        server.wait_until_asked(6)
        server.broken = False
        server.wait_until_asked(4)
        server.notice = announced(cloud, 60)
        code, log = watcher.ended()
    assert code == 0, log
    assert log.count("does not answer") == 1
    assert log.count("The metadata service answers.") == 1


@pytest.mark.parametrize(("cloud", "other"), [("aws", "gcp"), ("gcp", "aws"), ("azure", "gcp")])
def test_another_clouds_service_is_not_taken_for_this_ones(cloud: str, other: str, calls: Path, watch) -> None:
    with serving(other) as server:
        server.notice = announced(other, 60)
        watcher = watch(cloud, server)
        server.wait_until_asked(4)
        assert watcher.process.poll() is None
        watcher.process.terminate()
        assert "does not answer" in watcher.ended()[1]
    assert called(calls) == []


def test_ray_is_told_until_it_listens(calls: Path, watch) -> None:
    calls.with_name("fails").write_text("2")
    with serving("aws") as server:
        server.notice = announced("aws", 60)
        code, log = watch("aws", server).ended()
    assert code == 0
    assert log.count("ended with 1: no GCS") == 2
    assert len(called(calls)) == 3


def test_when_the_time_is_up_and_ray_has_not_listened_the_watcher_fails(calls: Path, watch) -> None:
    calls.with_name("fails").write_text("1000")
    with serving("aws") as server:
        server.notice = announced("aws", 2)
        code, log = watch("aws", server).ended()
    assert code == 1
    assert "The time is up" in log


def test_a_sidecar_finds_its_node_by_address(calls: Path, watch) -> None:
    with serving("gcp") as server:
        server.notice = "TRUE"
        options = ("--node-ip", "10.1.2.3", "--address", "head:6379")
        code, log = watch("gcp", server, *options).ended()
    assert code == 0, log
    (_, _, *filters), (_, *words) = called(calls)
    assert filters == ["--format", "json", "--filter", "node_ip=10.1.2.3", "--filter", "state=ALIVE"]
    read = ray_arguments("drain-node", "drain-node", words)
    assert (read["node_id"], read["address"]) == (NODE, "head:6379")


def test_a_sidecar_whose_node_is_not_there_says_so(calls: Path, watch) -> None:
    with serving("aws") as server:
        server.notice = announced("aws", 2)
        code, log = watch("aws", server, "--node-ip", "10.9.9.9").ended()
    assert code == 1
    assert "0 nodes are alive at 10.9.9.9, expected one. Give --node-id." in log


@pytest.mark.ray
def test_ray_drains_the_node_that_its_cloud_takes_away(watch) -> None:
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray = f"{sys.executable} -m ray.scripts.scripts"
        with serving("aws") as server:
            server.notice = announced("aws", 60)
            options = ("--node-id", node.node_id, "--address", cluster.address)
            code, log = watch("aws", server, *options, ray=ray).ended()
        assert code == 0, log
        from ray._raylet import GcsClient

        draining = GcsClient(address=cluster.address).get_draining_nodes()
        assert set(draining) <= {node.node_id}
        # An idle node is gone as soon as it drains; one at work drains until the deadline.
        deadline = time.monotonic() + 20
        while not draining and node.node_id in {each["NodeID"] for each in alive(cluster)}:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        cluster.shutdown()


def alive(cluster: Cluster) -> list[dict]:
    """Nodes that are alive."""
    return [node for node in cluster.global_state.node_table() if node["Alive"]]
