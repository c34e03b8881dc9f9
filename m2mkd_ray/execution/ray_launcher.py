"""Runs stages in Ray actors: on this machine, or on a cluster.

The connection to Ray and what its nodes can hold are here; the actors are in
`pool.py`.
"""

import logging
import os
import socket
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import ray
import ray.exceptions
import ray.util.client
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.errors import ClusterError, StoreError
from m2mkd_ray.execution.feasibility import Node, in_ray, label_selector, misfits
from m2mkd_ray.execution.job import Job
from m2mkd_ray.execution.leaving import leaving_nodes
from m2mkd_ray.execution.node_groups import Autoscaler, find_autoscaler
from m2mkd_ray.execution.pool import Pool, Shape, failed
from m2mkd_ray.execution.reports import Report
from m2mkd_ray.execution.stage import Resources, Stage
from m2mkd_ray.execution.store import Store
from m2mkd_ray.execution.withdrawal import Withdrawal

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 1_000_000_000
"""Of a local Ray: ten windows of shared batches (`Sharing.window_bytes`), or one of steps of up to 100 MB with what
its readers have in hand; what is over goes to disk. Stages exchange files; Ray's own default is 30 % of the memory."""
_PROBE_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 10.0
_SETTINGS = 4
_NO_SETTINGS = bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
"""An HTTP/2 frame: length (3 bytes), type, flags, stream (4 bytes)."""


class RayLauncher:
    """Runs stages in Ray actors, which are kept warm between them.

    Args:
        address: of the cluster (`auto`, `host:port`, `ray://…`); None: a Ray of our own on this machine, or the one
            that this process is connected to already.
        num_cpus: cores of a Ray of our own; None: what the machine has. So for `num_gpus`.
        temp_dir: where a Ray of our own keeps sockets and logs; short, as a socket's path has at most 107 bytes.
        runtime_env: Ray's runtime environment for all workers.
        keep_idle_s: how long a worker may be idle before its resources are given back; 0: every seat has a worker of
            its own.
        prewarm: names of modules that most stages need, which a worker imports while it is idle.

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
        keep_idle_s: float = 30.0,
        prewarm: Sequence[str] = (),
    ) -> None:
        self._pool, self._withdrawal = Pool(keep_idle_s, prewarm), Withdrawal()
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

    def submit(
        self,
        jobs: Sequence[Job],
        store: Store,
        node: str | None = None,
        resources: Resources | None = None,
        *,
        goes_first: bool = False,
    ) -> None:
        """See `Launcher`; a worker is asked of Ray, or a free one taken, with the next `poll`."""
        self._pool.submit(jobs, store, Shape(resources or jobs[0].resources, node), goes_first=goes_first)

    def poll(self, timeout_s: float) -> list[Report]:
        """See `Launcher`."""
        return self._pool.poll(timeout_s)

    def kill(self, address: str) -> set[str]:
        """See `Launcher`."""
        return self._pool.kill(address)

    def recall(self, addresses: Collection[str]) -> set[str]:
        """See `Launcher`."""
        return self._pool.recall(addresses)

    def problems(self, plan: Sequence[Stage], store: Store) -> list[str]:
        """Stages that no node can hold, and nodes that cannot write the store."""
        groups = self.autoscaler.groups
        found = misfits(plan, self.nodes() + [group.node for group in groups])
        if found and groups:
            found.append(f"Node groups: {'; '.join(str(group) for group in groups)}.")
        elif found and self.may_grow():
            for text in found:
                logger.warning("%s If the cluster's autoscaler has a node type for it, it will come.", text)
            found = []
        return found + ([] if self._is_local else _store_problems(store, _staying()))

    def nodes(self) -> list[Node]:
        """The nodes that are there now and stay: those that are being drained take nothing more."""
        return [Node(_node_name(node), node["Resources"], node["NodeID"], node["Labels"]) for node in _staying()]

    def may_grow(self) -> bool:
        """Whether an autoscaler may start more nodes."""
        return self.autoscaler.may_grow

    def most_nodes(self) -> list[Node]:
        """The nodes that an autoscaler may have started at once, where its groups are known; else those there are."""
        return self.autoscaler.most_nodes or self.nodes()

    @cached_property
    def autoscaler(self) -> Autoscaler:
        """What is known of the cluster's. It is asked for once: it does not change while a cluster runs."""
        return Autoscaler(may_grow=False) if self._is_local else find_autoscaler()

    def may_request(self) -> bool:
        """Whether an autoscaler takes requests from here: it may grow, and is not behind `ray://`."""
        return self.may_grow() and not ray.util.client.ray.is_connected()

    def request(self, wanted: Sequence[Resources]) -> None:
        """Have the autoscaler see that the cluster can hold all of these at once, until the next request, or until
        this driver is gone.

        What cannot be told is logged: nodes then come when they are needed, which is later.
        """
        asked = [each for each in wanted if in_ray(each)]  # a worker that only drives holds nothing
        bundles, selectors = [in_ray(each) for each in asked], [label_selector(each) for each in asked]
        try:
            if bundles:
                self._withdrawal.prepare()
            request_resources(bundles=bundles, bundle_label_selectors=selectors)
            if not bundles:
                self._withdrawal.cancel()
        except Exception:  # a hint is not worth a run, and at the end of one would hide how it ended
            logger.warning("The autoscaler could not be asked for %d bundles ahead", len(bundles), exc_info=True)

    def close(self) -> None:
        """End all workers, and Ray if this launcher started or connected it."""
        self._pool.close()
        if self._is_ours:
            self._is_ours = False
            ray.shutdown()


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


def _staying() -> list[dict[str, Any]]:
    leaving = leaving_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _node_name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


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
