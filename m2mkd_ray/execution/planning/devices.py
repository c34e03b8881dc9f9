"""Types of GPUs: how fast each is at best and how much it holds, to plan with before anything was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from m2mkd_ray.execution import feasibility
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.stage import Resources

_ONE_GPU = Resources(gpus=1)
ACCELERATOR = "accelerator_type:"
"""What the resource starts with that Ray gives a node with a GPU that it knows."""


@dataclass(frozen=True)
class GpuType:
    """A type of GPU."""

    peak_tflops: float
    """Dense matrix products in bf16 (fp16 where there is no bf16), without sparsity."""
    memory_gb: float


GPU_TYPES: Mapping[str, GpuType] = {
    "H200": GpuType(989, 141),  # NVIDIA H200 datasheet: 1,979 with sparsity
    "H100": GpuType(989, 80),  # NVIDIA H100 datasheet, SXM: 1,979 with sparsity
    "A100": GpuType(312, 40),  # NVIDIA A100 datasheet; Ray calls both sizes A100, so this is the smaller
    "A100-40G": GpuType(312, 40),
    "A100-80G": GpuType(312, 80),
    "L40S": GpuType(362, 48),  # NVIDIA L40S datasheet: 362.05, 733 with sparsity
    "L4": GpuType(121, 24),  # NVIDIA L4 datasheet: 242 with sparsity
    "A10G": GpuType(70, 24),  # NVIDIA A10G datasheet: 140 with sparsity
    "V100": GpuType(125, 16),  # NVIDIA V100 datasheet, SXM2, fp16
    "T4": GpuType(65, 16),  # NVIDIA T4 datasheet, fp16
    "RTX 4090": GpuType(165, 24),  # NVIDIA Ada whitepaper, appendix A: 165.2 with fp32 accumulation
}
"""By the names that Ray uses (`ray.util.accelerators`), where it has one."""

UNKNOWN_TFLOPS = 1.0
"""Of CPUs and of GPUs that the table lacks: all are taken to be equally fast, about as 16 server cores."""


def speed_of(type_name: str) -> float:
    """Peak TFLOP/s of a type of device; `UNKNOWN_TFLOPS` for what the table lacks."""
    known = known_type(type_name)
    return known.peak_tflops if known else UNKNOWN_TFLOPS


@cache
def known_type(name: str) -> GpuType | None:
    """The entry of the table: by its name, or by what `torch.cuda.get_device_name()` says ("NVIDIA L4")."""
    plain = name.upper().replace("-", " ")
    if name in GPU_TYPES:
        return GPU_TYPES[name]
    words = plain.split()
    found = [key for key in GPU_TYPES if _holds(words, key.upper().replace("-", " ").split())]
    return GPU_TYPES[max(found, key=len)] if found else None


@cache
def same_type(one: str, other: str) -> bool:
    """Whether two names mean one type: equal, or the same entry of the table ("H100", "NVIDIA H100 80GB HBM3")."""
    entry = known_type(one)
    return one == other or (entry is not None and entry is known_type(other))


def device_type(node: Node, request: Resources) -> str:
    """The type of device that a node has for a request.

    For GPUs Ray's accelerator type, else the node's group, else `gpu`. For CPU cores `cpu`, or the group of a node
    without GPUs: what cores beside GPUs can do has nothing to do with the GPUs.
    """
    group = node.labels.get("ray.io/node-group", "")
    if not request.gpus:
        return group if group and not node.resources.get("GPU") and known_type(group) is None else "cpu"
    for name in node.resources:
        if name.startswith(ACCELERATOR):
            return name.removeprefix(ACCELERATOR)
    return node.labels.get("ray.io/accelerator-type") or group or "gpu"


def type_name(name: str) -> str:
    """The table's name of a GPU that calls itself so ("NVIDIA L4": "L4"); its own where the table has none."""
    return next((key for key, entry in GPU_TYPES.items() if entry is known_type(name)), name)


def is_spot(node: Node) -> bool:
    """Whether the node may be taken away at any time."""
    return feasibility.is_spot(node.labels)


def gpu_memory_gb(node: Node) -> float:
    """Memory of each GPU: the label `gpu-memory-gb`, else that of its type; infinite where neither says."""
    if label := node.labels.get("gpu-memory-gb"):
        return float(label)
    known = known_type(device_type(node, _ONE_GPU))
    return known.memory_gb if known else float("inf")


def _holds(words: list[str], wanted: list[str]) -> bool:
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))
