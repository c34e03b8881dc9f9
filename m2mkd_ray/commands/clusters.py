"""The nodes that a plan is made for: those of a Ray that runs, of this machine, or of a file.

A file describes nodes plainly (`nodes:`), is the YAML of a Ray cluster (`available_node_types:`),
or a RayCluster or RayJob of KubeRay, of which the most nodes that it may have are taken.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from m2mkd_ray.commands.kuberay import is_labelled_spot, of_kuberay, worker_groups
from m2mkd_ray.errors import UsageError
from m2mkd_ray.execution.feasibility import GROUP_LABEL, Node
from m2mkd_ray.yaml_files import read_mapping


class NodeType(BaseModel, frozen=True, extra="forbid"):
    """Nodes that are alike."""

    type: str
    """Their name; for nodes without GPUs also the type of device."""
    group: str = ""
    """Their label `m2mkd.node-group`; empty: they have none."""
    count: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    """GPUs of each."""
    gpu_type: str = ""
    """As Ray calls it (H100, A100-80G, L4, ...)."""
    gpu_memory_gb: float | None = Field(None, gt=0)
    """Of each GPU; None: as the table of types says."""
    cpus: float = Field(gt=0)
    """Cores of each."""
    memory_gb: float | None = Field(None, gt=0)
    """Of each; None: as much as is asked for."""
    spot: bool = False
    """Whether they may be taken away at any time."""


class NodesFile(BaseModel, frozen=True, extra="forbid"):
    """A file that describes nodes."""

    nodes: list[NodeType] = Field(min_length=1)


def cluster_nodes(cluster: str) -> list[Node]:
    """The nodes that `--cluster` names.

    Args:
        cluster: `local` for this machine, a YAML file, or the address of a Ray that runs (`auto`, `host:port`).

    Raises:
        UsageError: the file cannot be read, or says something else than nodes.
        ClusterError: no Ray answers at the address.
    """
    if Path(cluster).suffix in (".yaml", ".yml"):
        return nodes_of_file(Path(cluster))
    if cluster == "local":
        from m2mkd_ray import preflight

        return [preflight.this_machine(None)]
    from m2mkd_ray.execution.ray_launcher import RayLauncher

    launcher = RayLauncher(cluster)
    try:
        return launcher.nodes()
    finally:
        launcher.close()


def nodes_of_file(file: Path) -> list[Node]:
    """The nodes that a file describes, or the most that a Ray cluster of it may have.

    Raises:
        UsageError: it is missing, no YAML, or says something else; lists all problems.
    """
    content = read_mapping(file, "cluster file", "`nodes:`, or a cluster of Ray's or KubeRay's")
    groups = worker_groups(content)
    if not (groups or {"nodes", "available_node_types"} & content.keys()):
        raise UsageError(
            f"The cluster file {file} has neither `nodes:` (a list of type, count, gpus, gpu_type, gpu_memory_gb, "
            f"cpus, memory_gb, spot, group) nor `available_node_types:` (a Ray cluster's YAML) nor "
            f"`workerGroupSpecs:` (of KubeRay). Give one of them; for a cluster of fixed hosts, describe these as "
            f"`nodes:`."
        )
    if groups:
        content = {"nodes": list(of_kuberay(file, groups))}
    elif "nodes" not in content:
        content = {"nodes": list(_of_ray(file, content))}
    try:
        described = NodesFile.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(
            f"  - {'.'.join(str(part) for part in problem['loc'])}: {problem['msg']} (found {problem['input']!r})"
            for problem in error.errors()
        )
        raise UsageError(f"The cluster file {file} does not describe nodes:\n{problems}") from error
    return [_node(kind, number) for kind in described.nodes for number in range(kind.count)]


def _node(kind: NodeType, number: int) -> Node:
    from m2mkd_ray.execution.planning.devices import ACCELERATOR

    memory = kind.memory_gb * 1e9 if kind.memory_gb is not None else float("inf")
    resources = {"CPU": kind.cpus, "GPU": float(kind.gpus), "memory": memory}
    if kind.gpu_type:
        resources[f"{ACCELERATOR}{kind.gpu_type}"] = 1.0
    labels = {"ray.io/node-group": kind.type, "ray.io/market-type": "spot" if kind.spot else "on-demand"}
    if kind.group:
        labels[GROUP_LABEL] = kind.group
    if kind.gpu_memory_gb is not None:
        labels["gpu-memory-gb"] = f"{kind.gpu_memory_gb:g}"
    return Node(f"{kind.type}-{number}", resources, labels=labels)


def _of_ray(file: Path, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of `nodes` from a Ray cluster's YAML: one head, and of each other type its `max_workers`."""
    from m2mkd_ray.execution.planning.devices import ACCELERATOR

    types = content["available_node_types"]
    if not isinstance(types, dict):
        raise UsageError(f"`available_node_types` of {file} is {types!r}, expected node types by name.")
    for name, kind in types.items():
        resources = kind.get("resources") if isinstance(kind, dict) else None
        if not isinstance(resources, dict) or "CPU" not in resources:
            raise UsageError(
                f"Node type {name!r} of {file} has no `resources` with CPU (and GPU), which the cloud would tell only "
                f"when a node has started. Write them down to plan for them."
            )
        is_head = name == content.get("head_node_type")
        count = 1 if is_head else kind.get("max_workers", kind.get("min_workers", content.get("max_workers", 0)))
        if not resources["CPU"] or not count:
            continue  # a head that runs nothing, or a type that is switched off
        entry = {"type": name, "count": count, "cpus": resources["CPU"], "gpus": resources.get("GPU", 0)}
        known = [str(key).removeprefix(ACCELERATOR) for key in resources if str(key).startswith(ACCELERATOR)]
        entry["gpu_type"] = known[0] if known else ""
        if resources.get("memory"):
            entry["memory_gb"] = resources["memory"] / 1e9
        labels = kind.get("labels") or {}
        if label := labels.get("gpu-memory-gb"):
            entry["gpu_memory_gb"] = label
        entry["group"] = labels.get(GROUP_LABEL, "")
        yield entry | {"spot": _is_spot(kind)}


def _is_spot(kind: Mapping[str, Any]) -> bool:
    """Whether AWS, GCP or Azure may take such nodes away."""
    config = kind.get("node_config") or {}
    market = (config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
    scheduling = config.get("scheduling") or []
    preemptible = any(
        each.get("preemptible") for each in (scheduling if isinstance(scheduling, list) else [scheduling])
    )
    azure = (config.get("azure_arm_parameters") or {}).get("priority") == "Spot"
    return bool(market or preemptible or azure or is_labelled_spot(kind.get("labels") or {}))
