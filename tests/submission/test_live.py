"""Jobs on a real head with token authentication, over HTTP: submitted, followed, stopped, gone on with."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2mkd_ray.execution import Store

pytestmark = [pytest.mark.ray]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "a" * 64
SETTINGS = (
    "pairs.epochs=150",
    "placement.pairs.checkpoint_every_s=0.2",
    "placement.pairs.log_every_steps=5",
    "baselines=[]",
    "suites=[fashion-small]",
    "placement.finetune={engine: deepspeed, num_workers: 2}",
)
"""Of tiny.yaml: pairs that train for some seconds, to be stopped in the middle, ranks of a fine-tuning, and as little
else as can be. The driver holds one of the head's three cores."""


@dataclass(frozen=True)
class Head:
    """A Ray head of these tests' own."""

    address: str
    """Of its dashboard."""
    environment: dict[str, str]
    """Of a client that has its token."""

    def call(self, *words: object, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        """Run a command as a client, from the checkout."""
        environment = {name: value for name, value in self.environment.items() if name != "RAY_AUTH_TOKEN"}
        environment |= {} if token is None else {"RAY_AUTH_TOKEN": token}
        return subprocess.run(
            [str(word) for word in words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    def m2mkd(self, *words: object, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        """`m2mkd COMMAND … --address`."""
        return self.call(sys.executable, "-m", "m2mkd_ray", *words, "--address", self.address, token=token)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Its own ports, folder, token and process group, which alone is killed at the end. Code comes with the jobs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True)))
        (folder / "token").write_text(TOKEN)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"
        }
        # No home of a user, where a token might lie.
        environment |= {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }
        ports = free_ports(5)
        options = dict(zip(("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"), ports))
        start = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--num-cpus", "3"]
        start += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        start += ["--temp-dir", str(folder / "ray"), "--object-store-memory", "200000000"]
        start += ["--labels", "m2mkd.node-group=cpu,m2mkd.spot=false"]
        log = stack.enter_context((folder / "head.log").open("w"))
        process = subprocess.Popen(
            start,
            env=environment | {"RAY_AUTH_TOKEN_PATH": str(folder / "token")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        stack.callback(end, process)
        found = Head(f"http://127.0.0.1:{options['dashboard-port']}", environment)
        wait_for(lambda: status_of(found, TOKEN) == 200 or process.poll() is not None, 90)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield found


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def end(process: subprocess.Popen[bytes]) -> None:
    """`ray start --block` ends all that it started on SIGTERM; what is left of its group is killed."""
    process.terminate()
    try:
        process.wait(15)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(is_so: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(0.1)


def status_of(head: Head, token: str | None) -> int | None:
    """HTTP status of the list of jobs; None while nobody listens."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/", headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except urllib.error.URLError:
        return None


def told(head: Head, path: str) -> Any:
    """What the dashboard's own pages ask for."""
    request = urllib.request.Request(f"{head.address}{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_without_a_token_nothing_is_said_and_with_a_wrong_one_neither(head: Head) -> None:
    assert [status_of(head, token) for token in (None, "b" * 64, TOKEN)] == [401, 403, 200]
    ended = head.m2mkd("jobs", token=None)
    assert ended.returncode == 1
    assert "RAY_AUTH_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = head.m2mkd("jobs", token="b" * 64)
    assert ended.returncode == 1
    assert "the cluster refuses us" in ended.stderr
    assert head.m2mkd("jobs").stdout.split() == ["job", "status", "since", "took", "store", "message"]


def test_a_job_is_submitted_stopped_and_gone_on_with_to_the_report(head: Head, tiny: Path, tmp_path: Path) -> None:
    file, root = tmp_path / "small.yaml", tmp_path / "store"
    shared = yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text())
    content = shared | {
        "entrypoint": f"python -m m2mkd_ray run {tiny} --address auto --store /nowhere",
        "runtime_env": str(ROOT / "jobs" / "runtime_env.yaml"),
    }
    file.write_text(yaml.safe_dump(content))
    words = [file, "--store", root, *(word for setting in SETTINGS for word in ("--set", setting))]

    # m2mkd submit, and what runs is refused a second time
    ended = head.m2mkd("submit", *words, "--json")
    assert ended.returncode == 0, ended.stderr
    submitted = json.loads(ended.stdout)
    first = submitted["id"]
    assert re.fullmatch(r"small-[0-9a-f]{12}", first)
    again = head.m2mkd("submit", *words)
    assert again.returncode == 1
    assert f"{first} of the same run is" in again.stderr

    # m2mkd stop in the middle of a pair: the driver ends its workers and gives its locks back in time
    wait_for(lambda: any((root / ".partial").glob("pair-*/checkpoint/*")), 180)
    stopped = head.m2mkd("stop", first)
    assert stopped.returncode == 0, stopped.stderr
    assert f"{first} STOPPED" in stopped.stdout
    assert not list((root / ".locks").glob("*"))
    complete = {address: store_time(root, address) for address in complete_in(root)}
    assert "meta" in {address.partition("-")[0] for address in complete}
    begun = {folder.parent.name for folder in (root / ".partial").glob("pair-*/checkpoint")} - complete.keys()
    assert begun
    assert "ending workers" in head.m2mkd("logs", first).stdout

    # ray job submit, as it was printed, goes on to the report, and its log is followed
    line = submitted["line"].replace(first, f"{first}-2").replace("--no-wait ", "")
    plain = head.call(BIN / "ray", *shlex.split(line)[1:])
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert "Report: " in plain.stdout
    assert {address: store_time(root, address) for address in complete} == complete  # no finished stage was repeated
    assert Store(str(root)).manifest(next(iter(begun)))["versions"]["git_commit"] is None  # the code that was shipped
    for address in begun:
        outcomes = [attempt["outcome"] for attempt in Store(str(root)).manifest(address)["attempts"]]
        assert len(outcomes) == 2
        assert outcomes[-1] == "COMPLETE"

    # the dashboard's page of jobs and its Train tab know the run and the ranks of its fine-tuning
    jobs = {one["submission_id"]: one["status"] for one in told(head, "/api/jobs/")}
    assert jobs == {first: "STOPPED", f"{first}-2": "SUCCEEDED"}
    (tuned,) = told(head, "/api/train/v2/runs/v1")["train_runs"]
    assert (tuned["status"], tuned["job_details"]["submission_id"]) == ("FINISHED", f"{first}-2")
    assert len(tuned["attempts"][-1]["workers"]) == 2

    # nothing is left to do: m2mkd submit gives the report at once
    whole = head.m2mkd("submit", *words, "--watch")
    assert whole.returncode == 0, whole.stderr
    assert Path(whole.stdout.partition("Report: ")[2].splitlines()[0]).is_file()
    listed = {one["id"]: one for one in json.loads(head.m2mkd("jobs", "--json").stdout)}
    statuses = {name: one["status"] for name, one in listed.items()}
    assert statuses == {first: "STOPPED", f"{first}-2": "SUCCEEDED", f"{first}-3": "SUCCEEDED"}
    assert listed[first]["metadata"]["recipe_key"] == first.removeprefix("small-")


def complete_in(root: Path) -> list[str]:
    return [address for of_name in Store(str(root)).addresses().values() for address in of_name]


def store_time(root: Path, address: str) -> int:
    return (root / address / "manifest.json").stat().st_mtime_ns
