"""The nodes of a cluster as they are now, for people."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray.util.client

from m2mkd_ray.execution.feasibility import is_spot, node_group
from m2mkd_ray.execution.leaving import leaving_nodes


@dataclass(frozen=True)
class NodeNow:
    """A node that is alive."""

    id: str
    host: str
    group: str
    """Empty: it has no label."""
    spot: bool
    resources: Mapping[str, float]
    """CPU, GPU and memory (bytes) in all."""
    free: Mapping[str, float] | None
    """Of these, what nobody holds; None: not known (behind `ray://`)."""
    leaves_in_s: float | None
    """Seconds until it is taken away, 0 where that is not known; None: it is not being drained."""


def nodes_now() -> list[NodeNow]:
    """The nodes of the cluster that this process is connected to, the head first."""
    free, leaving = _free_by_node(), leaving_nodes()
    alive = [node for node in ray.nodes() if node["Alive"]]
    in_order = sorted(alive, key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeID"]))
    return [_now(node, free, leaving) for node in in_order]


def _now(
    node: Mapping[str, Any], free: Mapping[str, Mapping[str, float]] | None, leaving: Mapping[str, float]
) -> NodeNow:
    deadline = leaving.get(node["NodeID"])
    return NodeNow(
        id=node["NodeID"],
        host=node["NodeManagerHostname"],
        group=node_group(node["Labels"]),
        spot=is_spot(node["Labels"]),
        resources=_counted(node["Resources"]),
        free=None if free is None else _counted(free.get(node["NodeID"], {})),
        leaves_in_s=None if deadline is None else max(0.0, deadline - time.time()) if deadline else 0.0,
    )


def _counted(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: resources[name] for name in ("CPU", "GPU", "memory") if name in resources}


def _free_by_node() -> Mapping[str, Mapping[str, float]] | None:
    if ray.util.client.ray.is_connected():
        return None
    from ray._private.state import available_resources_per_node  # no public way in 2.60 without the dashboard

    found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return found
