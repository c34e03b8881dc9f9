"""Which nodes an autoscaler may start, as far as a driver can find out.

Ray 2.60 tells nobody: autoscaler v1 reports names of live node types only, v2 not even
those, and the cluster's configuration is in the store of the head only on Anyscale. So a
task on the head looks for the autoscaler's process and reads the file that it was started
with (`ray start --autoscaling-config`, which `ray up` calls). KubeRay's autoscaler runs in
a container of its own: nodes may come, but nobody can say which.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.util.client
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from m2mkd_ray.execution.feasibility import Node, said

logger = logging.getLogger(__name__)

_HEAD = "node:__internal_head__"
_ANSWER_TIMEOUT_S = 60.0
_DEFAULT_MOST = 2
"""`max_workers` where a file does not say (ray/autoscaler/ray-schema.json)."""


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that the autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    most: int
    """How many there may be."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of each of its nodes."""

    @property
    def node(self) -> Node:
        """One of them."""
        return Node(f"node type {self.name}", self.resources, labels=self.labels)

    def __str__(self) -> str:
        return f"{self.name} ({said(self.resources)}, up to {self.most} node{'s' if self.most != 1 else ''})"


@dataclass(frozen=True)
class Autoscaler:
    """What is known of a cluster's autoscaler."""

    may_grow: bool
    groups: tuple[NodeGroup, ...] = ()
    """All groups that may have nodes; empty where they are not known."""
    reads_labels: bool = True
    """Whether it starts nodes by the labels that are asked for: version 2 does, version 1 looks at resources only."""

    @property
    def most_nodes(self) -> list[Node]:
        """All nodes that it may have started at once, as far as that is known."""
        return [group.node for group in self.groups for _ in range(group.most)]


def find_autoscaler() -> Autoscaler:
    """What is known of the autoscaler of the cluster that this driver is connected to; takes a second or two."""
    if ray.util.client.ray.is_connected():
        return Autoscaler(may_grow=True)  # a driver behind `ray://` sees no state
    is_v2 = _is_v2()
    if not is_v2 and not _has_reported_node_types():
        return Autoscaler(may_grow=False)
    found = _ask_head()
    if found is None:  # no such process there, as with KubeRay; or it cannot be asked
        return Autoscaler(may_grow=True, reads_labels=is_v2)
    groups = tuple(group for group in groups_of(found) if group.most)
    are_known = all(group.resources for group in groups)
    return Autoscaler(may_grow=bool(groups), groups=groups if are_known else (), reads_labels=is_v2)


def groups_of(config: Mapping[str, Any]) -> list[NodeGroup]:
    """The node groups of an autoscaler's file, but for the head's; none of an empty one (`ray start --head` alone).

    A type without `resources`, which the cloud tells when a node has started, has a `resources` of none.
    """
    most = config.get("max_workers", _DEFAULT_MOST)
    return [
        NodeGroup(
            name, kind.get("resources") or {}, min(most, kind.get("max_workers", most)), kind.get("labels") or {}
        )
        for name, kind in (config.get("available_node_types") or {}).items()
        if name != config.get("head_node_type")
    ]


def _is_v2() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def _has_reported_node_types() -> bool:
    """Whether autoscaler v1 runs: without one, node types are `node_<id>` of a read-only provider
    (ray/autoscaler/_private/readonly/node_provider.py)."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    if not report:
        return False
    types = json.loads(report).get("autoscaler_report", {}).get("active_nodes", {})
    return any(not name.startswith("node_") for name in types)


def head_id() -> str | None:
    """The id of the cluster's head; None: it has none that is alive."""
    return next((node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]), None)


def _ask_head() -> Mapping[str, Any] | None:
    if (head := head_id()) is None:
        return None
    strategy = NodeAffinitySchedulingStrategy(head, soft=False)
    ask = ray.remote(_read_config).options(num_cpus=0, scheduling_strategy=strategy)
    try:
        found: Mapping[str, Any] | None = ray.get(
            ask.remote(ray.get_runtime_context().gcs_address), timeout=_ANSWER_TIMEOUT_S
        )
    except ray.exceptions.RayError as error:
        logger.warning("The head cannot tell which nodes its autoscaler may start: %s", error)
        return None
    return found


def _read_config(gcs_address: str) -> Mapping[str, Any] | None:
    """The file that this machine's autoscaler of a cluster was started with; empty if with none; None: not here."""
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # not a process, or it has ended, or is another user's
        if f"--gcs-address={gcs_address}" not in words or not any(word.endswith("/monitor.py") for word in words):
            continue
        files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
        return yaml.safe_load(Path(files[0]).expanduser().read_text(encoding="utf-8")) or {} if files else {}
    return None
