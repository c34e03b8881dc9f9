"""Runs stages in Ray actors: on this machine, or on a cluster.

Every stage has an actor of its own. All that is ready is submitted at once, so
that the autoscaler sees the whole demand; Ray starts an actor when a node has
room. Ray restarts nothing (`max_restarts=0`): the executor does, which counts
kinds of failure apart and tells of each.
"""

import json
import logging
import math
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
import ray.util.client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.errors import ClusterError, StoreError
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.execution.feasibility import Node, misfits
from m2mkd_ray.execution.launcher import Failed, Finished, Report, Started, raised
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.execution.store import Store
from m2mkd_ray.execution.worker import Job, Where, here, run_job

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 200_000_000
"""Of a local Ray. Stages exchange files, not objects; Ray's own default is 30 % of the memory."""
_PROBE_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 10.0
_SETTINGS = 4
_NO_SETTINGS = bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
"""An HTTP/2 frame: length (3 bytes), type, flags, stream (4 bytes)."""
_RAISED = (
    ray.exceptions.RayTaskError,
    ray.exceptions.RuntimeEnvSetupError,
    ray.exceptions.ActorUnschedulableError,
)
"""What would happen again: exceptions outside the stage's own code, and requests that Ray refuses."""


class _Worker:
    """The actor of one stage. The job comes pickled, so that threads are set before it imports anything."""

    def __init__(self, cpus: float, gpus: float) -> None:
        logging.basicConfig(level=logging.INFO)
        threads = str(max(1, math.ceil(cpus)))
        os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # since 2.5x Ray leaves all GPUs visible to who asked for none

    def where(self) -> Where:
        runtime = ray.get_runtime_context()
        return {**here(), "node_id": runtime.get_node_id(), "actor_id": runtime.get_actor_id()}

    def run(self, pickled_job: bytes, address: str, store: Store) -> Finished | Failed:
        try:
            job: Job = ray.cloudpickle.loads(pickled_job)
            return Finished(address, run_job(job, store, self.where()))
        except (Exception, SystemExit) as error:
            return raised(address, error)


class RayLauncher:
    """Runs every stage in a Ray actor.

    Args:
        address: of the cluster (`auto`, `host:port`, `ray://…`); None: a Ray of our own on this machine, or the one
            that this process is connected to already.
        num_cpus: cores of a Ray of our own; None: what the machine has. So for `num_gpus`.
        temp_dir: where a Ray of our own keeps sockets and logs; short, as a socket's path has at most 107 bytes.
        runtime_env: Ray's runtime environment for all workers.

    Raises:
        ClusterError: no cluster answers there, or none can be started here.
    """

    runs_in_process = False

    def __init__(
        self,
        address: str | None = None,
        *,
        num_cpus: int | None = None,
        num_gpus: int | None = None,
        temp_dir: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        self._actors: dict[str, Any] = {}
        self._waiting: dict[Any, tuple[str, bool]] = {}
        """By object reference: the address, and whether it tells of the start."""
        self._is_ours = not ray.is_initialized()
        self._is_local = address is None and self._is_ours
        if not self._is_ours:
            return
        settings: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.WARNING,
        }
        if runtime_env is not None:
            settings["runtime_env"] = dict(runtime_env)
        if address is None:
            # "local", because a bare init() joins whatever cluster it finds recorded on the machine.
            settings |= {
                "address": "local",
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": temp_dir,
            }
        else:
            settings["address"] = address
        try:
            _reach(address)
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            where = "no Ray could be started on this machine" if address is None else f"no Ray answers at `{address}`"
            raise ClusterError(
                f"Connecting to a cluster: {where}: {error}. Look at `ray status`, the address and, on Ray 2.59 and "
                f"later, the token (RAY_AUTH_TOKEN) that cluster and driver must share."
            ) from error

    def submit(self, job: Job, store: Store) -> None:
        """Ask for an actor with the stage's resources; it runs when a node has room."""
        resources = job.resources
        actor_class = ray.remote(_Worker).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=int(resources.memory_gb * 1e9) if resources.memory_gb else None,
            max_restarts=0,
            max_task_retries=0,
        )
        actor: Any = actor_class.remote(resources.cpus, resources.gpus)
        self._actors[job.address] = actor
        self._waiting[actor.where.remote()] = (job.address, True)
        self._waiting[actor.run.remote(ray.cloudpickle.dumps(job), job.address, store)] = (job.address, False)

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call; waits up to `timeout_s` for something."""
        references = list(self._waiting)
        if not references:
            return []
        ready, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        starts_first = sorted(ready, key=lambda reference: not self._waiting[reference][1])
        return [report for reference in starts_first for report in self._take(reference)]

    def kill(self, address: str) -> None:
        """End a stage's process at once."""
        if (actor := self._actors.pop(address, None)) is not None:
            ray.kill(actor)
        self._waiting = {ref: known for ref, known in self._waiting.items() if known[0] != address}

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """Stages that no node can hold, and nodes that cannot write the store."""
        found = misfits(plan, self.nodes() + _node_types())
        if found and not _node_types() and self.may_grow():
            for text in found:
                logger.warning("%s If the cluster's autoscaler has a node type for it, it will come.", text)
            found = []
        return found + ([] if self._is_local else _store_problems(store, _alive()))

    def nodes(self) -> list[Node]:
        """The nodes that are there now."""
        return [Node(_node_name(node), node["Resources"]) for node in _alive()]

    def may_grow(self) -> bool:
        """Whether an autoscaler may start more nodes."""
        return not self._is_local and (bool(_node_types()) or _may_autoscale())

    def close(self) -> None:
        """End all actors, and Ray if this launcher started or connected it."""
        for address in list(self._actors):
            self.kill(address)
        if self._is_ours:
            self._is_ours = False
            ray.shutdown()

    def _take(self, reference: Any) -> list[Report]:
        address, is_start = self._waiting.pop(reference)
        try:
            result = ray.get(reference)
        except ray.exceptions.RayError as error:
            if is_start:
                return []  # the run's own reference tells of the same death
            self.kill(address)
            return [failed(address, error)]
        if is_start:
            return [Started(address, result)]
        self.kill(address)
        return [result]


def _reach(address: str | None) -> None:
    """Knock at `host:port` first: where no Ray listens, Ray 2.60 tries for more than a minute and then aborts.

    Raises:
        OSError: nobody listens there, or something that does not speak gRPC as Ray does.
    """
    host, _, port = (address or "").rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", "false"):  # with TLS the first words are other ones
            _greet(connection)


def _greet(connection: socket.socket) -> None:
    """Begin HTTP/2, which carries gRPC: a server's first frame is its SETTINGS (RFC 9113, 3.4)."""
    advice = (
        "something else listens there. Ray's own port is 6379 unless `ray start --port` says another one "
        "(`ray://`: 10001); 8265 is its dashboard's"
    )
    frame = b""
    try:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _NO_SETTINGS)
        while len(frame) < len(_NO_SETTINGS) and (part := connection.recv(len(_NO_SETTINGS) - len(frame))):
            frame += part
    except OSError as error:
        raise ConnectionError(advice) from error
    if len(frame) < len(_NO_SETTINGS) or frame[3] != _SETTINGS:
        raise ConnectionError(advice)


def failed(address: str, error: ray.exceptions.RayError) -> Failed:
    """What Ray says of a stage that did not come back, by kind."""
    exceptions = ray.exceptions
    if isinstance(error, exceptions.OutOfMemoryError):
        kind = Kind.OUT_OF_MEMORY
    elif isinstance(error, exceptions.RayActorError) and error.preempted:
        kind = Kind.PREEMPTED
    elif isinstance(error, _RAISED) or (isinstance(error, exceptions.RayActorError) and error.actor_init_failed):
        kind = Kind.RAISED
    else:
        # ActorDiedError, ActorUnavailableError, WorkerCrashedError, NodeDiedError, lost objects: the machine's fault.
        kind = Kind.LOST
    text = str(error).strip() or type(error).__name__
    return Failed(address, kind, f"{type(error).__name__}: {text.splitlines()[0]}", traceback=text)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _node_name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def _node_types() -> list[Node]:
    """The node types that the autoscaler may start, where Ray keeps them (autoscaler v2)."""
    if ray.util.client.ray.is_connected():
        return []  # a driver behind `ray://` sees no state
    from ray._private.state import state  # ray.train and ray.data ask here too; there is no public way in 2.60

    config = state.get_cluster_config()
    groups = config.node_group_configs if config else ()
    return [Node(f"node type {group.name}", dict(group.resources)) for group in groups if group.max_count != 0]


def _may_autoscale() -> bool:
    """Whether nodes may come that nobody has seen: autoscaler v1 (`ray up`) keeps its node types to itself.

    Its report names the types of live nodes; without an autoscaler these are `node_<id>` of a read-only provider
    (ray/autoscaler/_private/readonly/node_provider.py).
    """
    if ray.util.client.ray.is_connected():
        return True
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    if not report:
        return False
    types = json.loads(report).get("autoscaler_report", {}).get("active_nodes", {})
    return any(not name.startswith("node_") for name in types)


def _store_problems(store: Store, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Have every node write the store, and read what the driver wrote."""
    path, data = f".probe-{uuid.uuid4().hex[:8]}", os.urandom(64)
    store.folders.write(path, data)
    try:
        probes = {_probe_from(node["NodeID"]).remote(store, path, data): _node_name(node) for node in nodes}
        ready, late = ray.wait(list(probes), num_returns=len(probes), timeout=_PROBE_TIMEOUT_S)
        found = [f"On {probes[ref]}: {problem}" for ref in ready if (problem := _answer(ref))]
        return found + [f"On {probes[ref]}: no answer within {_PROBE_TIMEOUT_S:.0f} s." for ref in late]
    finally:
        store.folders.delete(path)


def _answer(reference: Any) -> str:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return f"the store could not be tried: {failed('', error).message}"


def _probe_from(node_id: str) -> Any:
    probe: Callable[..., str] = _probe
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(probe).options(num_cpus=0, scheduling_strategy=strategy)


def _probe(store: Store, path: str, data: bytes) -> str:
    """What is wrong with the store on this node; empty if nothing is."""
    try:
        store.probe()
    except StoreError as error:
        return str(error)
    if store.folders.read(path) != data:
        return (
            f"the store `{store.root}` is another one than the driver's. "
            f"Use a folder that all nodes share (NFS), or a URI (s3://, gs://, abfs://)."
        )
    return ""
