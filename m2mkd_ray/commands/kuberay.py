"""The nodes that a RayCluster or RayJob of KubeRay may have at most, from its YAML."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2mkd_ray.errors import UsageError
from m2mkd_ray.execution.feasibility import GROUP_LABEL

_QUANTITY = re.compile(r"([0-9.]+)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_FACTORS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", start=1)
}


def worker_groups(content: Mapping[str, Any]) -> Sequence[Any] | None:
    """The worker groups of a RayCluster or a RayJob; None: it is neither, or has none."""
    spec = content.get("spec")
    if content.get("kind") == "RayJob" and isinstance(spec, dict):
        spec = spec.get("rayClusterSpec")
    groups = spec.get("workerGroupSpecs") if isinstance(spec, dict) else None
    return groups if isinstance(groups, list) else None


def of_kuberay(file: Path, groups: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Entries of `nodes` from worker groups: of each its `maxReplicas`. The head is taken to run nothing.

    As KubeRay does, `num-cpus` and `num-gpus` of `rayStartParams` come before the limits of the first container.

    Raises:
        UsageError: a group does not say how many cores a node of it has, or says it in no form of Kubernetes's.
    """
    for number, group in enumerate(groups):
        group = group if isinstance(group, dict) else {}
        name = group.get("groupName", f"number {number}")
        limits = _limits(group)
        start = group.get("rayStartParams") or {}
        cpus = start.get("num-cpus", limits.get("cpu"))
        if cpus is None:
            raise UsageError(
                f"Worker group {name} of {file} has no limit of `cpu` in its first container, and no `num-cpus` in "
                f"`rayStartParams`. Give one of them."
            )
        count = group.get("maxReplicas", group.get("replicas", 0))
        if not count:
            continue  # switched off
        labels = group.get("labels") or {}
        entry = {"type": name, "count": count, "cpus": quantity(file, cpus)}
        entry["gpus"] = int(quantity(file, start.get("num-gpus", limits.get("nvidia.com/gpu", 0))))
        entry["gpu_type"] = labels.get("ray.io/accelerator-type", "")
        if label := labels.get("gpu-memory-gb"):
            entry["gpu_memory_gb"] = label
        entry["group"] = labels.get(GROUP_LABEL, "")
        if "memory" in limits:
            entry["memory_gb"] = quantity(file, limits["memory"]) / 1e9
        yield entry | {"spot": is_labelled_spot(labels)}


def is_labelled_spot(labels: Mapping[str, str]) -> bool:
    """Whether a group's labels say that its nodes may be taken away: this project's label, or Ray's own."""
    return labels.get("m2mkd.spot") == "true" or labels.get("ray.io/market-type") == "spot"


def quantity(file: Path, value: object) -> float:
    """A quantity of Kubernetes's: `500m` is 0.5, `16Gi` 16 x 1024^3.

    Raises:
        UsageError: it is none.
    """
    found = _QUANTITY.fullmatch(str(value))
    if found is None:
        raise UsageError(f"{file} says {value!r} where a quantity of Kubernetes's belongs, such as 4, 500m or 16Gi.")
    number, suffix = found.groups()
    return float(number) * _FACTORS.get(suffix, 1.0)


def _limits(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Limits of the first container, which runs Ray."""
    pod = (group.get("template") or {}).get("spec") or {}
    containers = pod.get("containers") or [{}]
    return (containers[0].get("resources") or {}).get("limits") or {}
