"""Whether any node can hold a stage: asked before a launch, because Ray waits for ever and says little.

Stuck autoscalers are among the most frequent complaints about Ray (ray-project/ray#18018, #27910, #47792).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from m2mkd_ray.execution.stage import Resources, Stage

GROUP_LABEL = "m2mkd.node-group"
"""Our own label of a node's group, by which workers ask for it."""
_UNITS = {"CPU": 1.0, "GPU": 1.0, "memory": 1e9}


@dataclass(frozen=True)
class Node:
    """A node, or a type of node that may be started: its name, and its resources as Ray counts them."""

    name: str
    resources: Mapping[str, float]
    id: str = ""
    """What a seat calls it (Ray's node id); empty: its name."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """As Ray labels it: `ray.io/accelerator-type`, `ray.io/market-type` and so on."""


def node_group(labels: Mapping[str, str]) -> str:
    """The group of a node: our own label, or the one that Ray's autoscaler and KubeRay give; empty: neither."""
    return labels.get(GROUP_LABEL) or labels.get("ray.io/node-group") or ""


def is_spot(labels: Mapping[str, str]) -> bool:
    """Whether a node may be taken away at any time, by our own label or Ray's."""
    if (own := labels.get("m2mkd.spot")) is not None:
        return own.lower() == "true"
    return labels.get("ray.io/market-type") == "spot"


def misfits(plan: Sequence[Stage], nodes: Sequence[Node]) -> list[str]:
    """A sentence for each request that no node can hold, with the stages that make it; empty if all fit."""
    by_request: dict[Resources, list[str]] = {}
    for stage in plan:
        by_request.setdefault(stage.resources, []).append(stage.name)
    found = []
    for resources, names in by_request.items():
        if (text := lack(resources, nodes)) is not None:
            found.append(f"{_who(names)} {text}")
    return found


def lack(resources: Resources, nodes: Sequence[Node]) -> str | None:
    """What is asked for and what there is, where no node can hold it; None if one can."""
    wanted = in_ray(resources)
    if resources.gpus > 1 and resources.gpus != int(resources.gpus):
        return f"{resources.gpus:g} GPUs, but above one GPU Ray gives only whole ones."
    allowed = [node for node in nodes if is_in_group(node, resources)]
    if any(_holds(node, wanted) for node in allowed):
        return None
    if not resources.group:
        return f"{_say(wanted)}, but no node has so much: {_largest(nodes, wanted)}."
    asked = f"{_say(wanted) or 'a place'} on a node of group {resources.group}"
    if allowed:
        return f"{asked}, but none of these has so much: {_largest(allowed, wanted)}."
    known = sorted({name for node in nodes if (name := node.labels.get(GROUP_LABEL))})
    has = f"the nodes are of {', '.join(known)}" if known else f"no node has the label {GROUP_LABEL}"
    return f"{asked}, but there is none: {has}."


def is_in_group(node: Node, resources: Resources) -> bool:
    """Whether a node is of the group that is asked for, if one is."""
    return not resources.group or node.labels.get(GROUP_LABEL) == resources.group


def label_selector(resources: Resources) -> dict[str, str]:
    """What a node's labels have to be, as Ray takes it; empty: any."""
    return {GROUP_LABEL: resources.group} if resources.group else {}


def in_ray(resources: Resources) -> dict[str, float]:
    """A request as Ray counts it, without what is not asked for."""
    memory = (resources.memory_gb or 0.0) * 1e9
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": memory}
    return {name: amount for name, amount in wanted.items() if amount}


def _holds(node: Node, wanted: Mapping[str, float]) -> bool:
    return all(node.resources.get(name, 0.0) >= amount for name, amount in wanted.items())


def _who(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'asks' if len(names) == 1 else 'ask'} for"


def said(resources: Mapping[str, float]) -> str:
    """What a node has, in words: cores, GPUs, memory."""
    return ", ".join(_amount(name, resources[name] / unit) for name, unit in _UNITS.items() if resources.get(name))


def _say(amounts: Mapping[str, float]) -> str:
    return " and ".join(_amount(name, amount / _UNITS[name]) for name, amount in amounts.items())


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount:.3g} GB of memory"
    return f"{amount:g} {name}" if 0 < amount <= 1 else f"{amount:g} {name}s"


def _largest(nodes: Sequence[Node], wanted: Mapping[str, float]) -> str:
    """The most of each wanted resource that a single node has."""
    if not nodes:
        return "there are no nodes"
    most = {name: max(node.resources.get(name, 0.0) for node in nodes) for name in wanted}
    return f"the most on one of {len(nodes)} is {_say(most)}. Lower the stages' resources or add a larger node"
