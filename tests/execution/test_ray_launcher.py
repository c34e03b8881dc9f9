"""Stages in Ray actors: what dies is tried again and goes on, what raises is not, and nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import ray.exceptions
import toy
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_get
from toy import Chain, Number, Pace, diamond, expected_state, number, slow_chain, wait_until_gone

from m2mkd_ray.errors import ClusterError, PlanError, TrainingError
from m2mkd_ray.execution import (
    Event,
    GiveUp,
    Kind,
    Resources,
    Retry,
    Stage,
    StageEnded,
    StageProgress,
    StageRetried,
    StageReused,
    StageStarted,
    Store,
    check,
    decide,
    execute,
)
from m2mkd_ray.execution.pool import failed
from m2mkd_ray.execution.ray_launcher import RayLauncher

DRIVER = """
import sys
from pathlib import Path
from toy import number, slow_chain
from m2mkd_ray.execution import Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
launcher = RayLauncher(num_cpus=2, temp_dir=sys.argv[3])
plan = [number("first"), slow_chain(Path(sys.argv[2]), sleep_s=0.1, steps=int(sys.argv[4]))]
try:
    execute(plan, Store(sys.argv[1]), launcher).raise_for_failures()
except KeyboardInterrupt:
    sys.exit(130)
finally:
    launcher.close()
"""

HINTER = """
import sys, time
from m2mkd_ray.execution import Resources
from m2mkd_ray.execution.ray_launcher import RayLauncher
RayLauncher(sys.argv[1]).request([Resources(cpus=1, gpus=8)])
print("asked", flush=True)
time.sleep(300)
"""


# Kinds of failure


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.RayActorError(preempted=True), Kind.PREEMPTED),
        (ray.exceptions.ActorDiedError(), Kind.LOST),
        (ray.exceptions.ActorUnavailableError("the network blinked", None), Kind.LOST),
        (ray.exceptions.WorkerCrashedError(), Kind.LOST),
        (ray.exceptions.NodeDiedError("node died"), Kind.LOST),
        (ray.exceptions.OutOfMemoryError("killed by the memory monitor"), Kind.OUT_OF_MEMORY),
        (ray.exceptions.RuntimeEnvSetupError("no such package"), Kind.RAISED),
        (ray.exceptions.ActorUnschedulableError("no such node"), Kind.RAISED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_rays_errors_have_a_kind(error: ray.exceptions.RayError, kind: Kind) -> None:
    report = failed("a-0123456789ab", error)
    assert report.kind is kind
    assert type(error).__name__ in report.message


# One local Ray


@pytest.mark.ray
def test_a_diamond_runs_in_workers_that_are_used_again(launcher: RayLauncher, store: Store) -> None:
    plan = diamond(value=4)
    outcome = execute(plan, store, launcher)
    outcome.raise_for_failures()
    assert outcome.metrics[plan[-1].address] == {"total": 18}
    places = [store.manifest(stage.address)["where"] for stage in plan]
    assert len({place["pid"] for place in places}) <= 2
    assert all(place["node_id"] and place["actor_id"] and place["pid"] != os.getpid() for place in places)
    assert all(isinstance(done, StageReused) for done in execute(plan, store, launcher).complete)


@pytest.mark.ray
def test_results_come_in_order_of_completion_and_failures_leave_siblings_alone(
    launcher: RayLauncher, store: Store
) -> None:
    slow, quick = number("slow", 1, Pace(sleep_s=2.0)), number("quick", 1)
    bad = Stage("bad", toy.raise_training_error, Number())
    worse = Stage("worse", toy.raise_value_error, Number(value=13))
    plan = [slow, quick, bad, worse, number("below", x=worse)]
    ended: list[str] = []
    outcome = execute(
        plan, store, launcher, on_event=lambda e: ended.append(e.stage.name) if isinstance(e, StageEnded) else None
    )
    assert ended == ["quick", "slow"]
    failures = {failure.stage.name: failure for failure in outcome.failed}
    assert isinstance(failures["bad"].error, TrainingError)
    assert failures["worse"].message == "ValueError: the number 13 is unlucky"
    assert 'in raise_value_error\n    raise ValueError(f"the number' in failures["worse"].traceback
    assert [skipped.stage.name for skipped in outcome.skipped] == ["below"]


@pytest.mark.ray
@pytest.mark.chaos
def test_a_worker_that_is_killed_goes_on_from_its_checkpoint(
    launcher: RayLauncher, store: Store, tmp_path: Path
) -> None:
    stage = slow_chain(tmp_path / "journal", sleep_s=0.15)
    killed: list[int] = []
    goes_on_from: list[int | None] = []

    def kill_once(event: Event) -> None:
        if isinstance(event, StageProgress) and event.progress.step >= 3 and not killed:
            killed.append(event.progress.pid)
            os.kill(event.progress.pid, signal.SIGKILL)
        if isinstance(event, StageStarted):
            goes_on_from.append(event.from_step)
        if isinstance(event, StageRetried):
            assert (event.kind, event.attempt, event.delay_s) == (Kind.LOST, 1, 0.5)

    outcome = execute([stage], store, launcher, on_event=kill_once)
    assert outcome.metrics[stage.address] == {"state": expected_state(Chain(steps=20))}
    assert goes_on_from[0] is None
    assert goes_on_from[1] is not None
    assert goes_on_from[1] >= 3
    assert len((tmp_path / "journal").read_text().splitlines()) <= 21
    attempts = store.manifest(stage.address)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["LOST", "COMPLETE"]
    assert attempts[0]["where"]["pid"] == killed[0]


@pytest.mark.ray
@pytest.mark.chaos
def test_a_worker_that_dies_before_its_commit_leaves_no_artifact_and_a_budget_ends(
    launcher: RayLauncher, store: Store, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    stage = Stage("dies", toy.die, Number(), placement=Pace(journal=str(journal)))

    def decide_twice(kind: Kind, history: object) -> Retry | GiveUp:
        return Retry(0.0) if len(journal.read_text().splitlines()) < 2 else decide(kind, [kind] * 3)

    (failure,) = execute([stage], store, launcher, decide=decide_twice).failed
    assert failure.kind is Kind.LOST
    assert "LOST 4 times" in failure.reason
    assert store.status(stage.address).state == "absent"
    assert [attempt["outcome"] for attempt in store.attempts(stage.address)] == ["LOST", "LOST"]


@pytest.mark.ray
@pytest.mark.chaos
def test_a_stage_that_says_nothing_is_killed(launcher: RayLauncher, store: Store) -> None:
    stage = Stage("hangs", toy.hang, Number())
    pids: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, StageStarted):
            pids.append(event.where["pid"])

    (failure,) = execute(
        [stage],
        store,
        launcher,
        stall_timeout_s=1.0,
        on_event=note,
        decide=lambda kind, history: GiveUp(f"{kind}: enough"),
    ).failed
    assert (failure.kind, failure.message) == (Kind.STALLED, "STALLED: it reported nothing for 1 s")
    wait_until_gone(pids[0])


@pytest.mark.ray
def test_a_worker_has_as_many_threads_as_cores(launcher: RayLauncher, store: Store) -> None:
    stage = Stage("where", toy.say_where, Number(), resources=Resources(cpus=1.5))
    assert execute([stage], store, launcher).metrics[stage.address]["threads"] == "2"


@pytest.mark.ray
def test_a_plan_that_no_node_can_hold_is_refused(launcher: RayLauncher, store: Store) -> None:
    big = Stage("pair-0", toy.add, Number(), resources=Resources(gpus=1))
    with pytest.raises(PlanError, match="pair-0 asks for 1 CPU and 1 GPU, but no node has so much"):
        check([number("fits"), big], store, launcher)


@pytest.mark.ray
def test_a_launcher_leaves_a_ray_alone_that_it_did_not_start(launcher: RayLauncher) -> None:
    RayLauncher().close()
    assert ray.is_initialized()


# Requests to an autoscaler. Here is none, but Ray keeps for it what it was asked.


def requested() -> object:
    """What an autoscaler would read."""
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "null")


def of_requests() -> list[str]:
    """The actors that are there for a request."""
    alive = [actor["ActorClassName"].rpartition(".")[2] for actor in actors().values() if actor["State"] != "DEAD"]
    return sorted(name for name in alive if name in ("Heir", "Life"))


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, (requested(), of_requests())
        time.sleep(0.1)


@pytest.mark.ray
def test_what_is_there_for_a_request_goes_with_it(launcher: RayLauncher) -> None:
    for gpus in (2, 4):
        launcher.request([Resources(cpus=1, gpus=gpus)])
        assert requested() == [{"CPU": 1, "GPU": gpus}]
        assert of_requests() == ["Heir", "Life"]
    launcher.request([])
    assert requested() == []
    wait_until(lambda: not of_requests())


@pytest.mark.ray
@pytest.mark.chaos
def test_the_request_of_a_driver_that_is_killed_is_withdrawn(
    launcher: RayLauncher, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-c", HINTER, ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"asked\n"
    assert requested() == [{"CPU": 1, "GPU": 8}]
    assert of_requests() == ["Heir", "Life"]
    driver.kill()  # at once: what watches it is not even there yet
    driver.communicate()
    wait_until(lambda: requested() == [] and not of_requests())


# Drivers in processes of their own, each with its own Ray


def driver(
    store: Store, journal: Path, environment: dict[str, str], short_folder: str
) -> tuple[subprocess.Popen[bytes], int]:
    """A driver whose first stage is complete and whose second one is in mid-run, and the latter's worker's pid."""
    command = [sys.executable, "-c", DRIVER, store.root, str(journal), f"{short_folder}/own", "200"]
    process = subprocess.Popen(command, env=environment)
    address = slow_chain(journal, steps=200).address
    deadline = time.monotonic() + 120
    while (
        (progress := store.progress(address)) is None
        or progress.step < 3
        or store.status(number("first").address).state != "complete"
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, progress.pid


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.parametrize(("number_", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_driver_that_is_ended_leaves_no_worker_and_a_store_to_go_on_with(
    launcher: RayLauncher,
    store: Store,
    tmp_path: Path,
    environment: dict[str, str],
    short_folder: str,
    number_: signal.Signals,
    exit_code: int,
) -> None:
    journal = tmp_path / "journal"
    process, worker = driver(store, journal, environment, short_folder)
    os.kill(process.pid, number_)
    assert process.wait(timeout=120) == exit_code
    wait_until_gone(worker)
    assert (store.folders.names(".locks") == []) == (number_ is signal.SIGINT)
    before = len(journal.read_text().splitlines())
    last = slow_chain(journal, sleep_s=0.0, steps=200)
    outcome = execute([number("first"), last], store, launcher)
    assert [type(done) for done in outcome.complete] == [StageReused, StageEnded]
    assert outcome.metrics[last.address] == {"state": expected_state(Chain(steps=200))}
    assert 200 <= len(journal.read_text().splitlines()) <= 201
    assert before < 200


@pytest.mark.parametrize("says", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "closes", "http"])
def test_a_port_that_something_else_has_taken_is_told_from_ray(
    says: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2mkd_ray.execution.ray_launcher._CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                if says is None:
                    connection.recv(100)  # until the other side has enough
                connection.sendall(says or b"")

        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"`127.0.0.1:{port}`: something else listens there.*6379"):
            RayLauncher(f"127.0.0.1:{port}")
        thread.join()


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_an_error(environment: dict[str, str]) -> None:
    code = "from m2mkd_ray.execution.ray_launcher import RayLauncher; RayLauncher('127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"{ClusterError.__module__}.ClusterError: Connecting to a cluster: no Ray answers" in done.stderr


# Two nodes. Last, as it needs the process's connection for itself.


@pytest.mark.ray
def test_stages_run_on_both_nodes_of_a_cluster(
    launcher: RayLauncher, store: Store, tmp_path: Path, short_folder: str
) -> None:
    launcher.close()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": f"{short_folder}/two"},
    )
    cluster.add_node(num_cpus=1)
    both = RayLauncher(cluster.address)
    try:
        plan = [number(f"pair-{i}", i, Pace(sleep_s=1.0)) for i in range(4)]
        check(plan, store, both)
        execute(plan, store, both).raise_for_failures()
        nodes = {store.manifest(stage.address)["where"]["node_id"] for stage in plan}
        assert len(nodes) == 2
        (problem,) = both.problems([Stage("big", toy.add, Number(), resources=Resources(cpus=2))], store)
        assert "big asks for 2 CPUs" in problem
    finally:
        both.close()
        cluster.shutdown()
