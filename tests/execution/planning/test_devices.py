"""Types of GPUs, and what nodes say of themselves."""

import math

import pytest

from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.planning.devices import (
    GPU_TYPES,
    UNKNOWN_TFLOPS,
    device_type,
    gpu_memory_gb,
    is_spot,
    known_type,
    same_type,
    speed_of,
    type_name,
)
from m2mkd_ray.execution.stage import Resources

GPU, CPU = Resources(gpus=1), Resources()


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("H100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100"), ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA H200", "H200"),
    ],
)  # fmt: skip
def test_what_cuda_calls_a_gpu_is_found_in_the_table(name: str, entry: str) -> None:
    assert known_type(name) is GPU_TYPES[entry]
    assert same_type(name, entry)


@pytest.mark.parametrize("name", ["cpu", "gpu", "NVIDIA B200", "L400", ""])
def test_what_the_table_lacks_is_as_fast_as_a_cpu(name: str) -> None:
    assert known_type(name) is None
    assert speed_of(name) == UNKNOWN_TFLOPS
    assert not same_type(name, "L4")


def test_a_node_says_its_type_market_and_memory() -> None:
    node = Node("a", {"GPU": 1, "accelerator_type:L4": 1}, labels={"ray.io/market-type": "spot"})
    assert (device_type(node, GPU), is_spot(node), gpu_memory_gb(node)) == ("L4", True, 24)
    labelled = Node("b", {"GPU": 1}, labels={"ray.io/accelerator-type": "H100", "gpu-memory-gb": "94"})
    assert (device_type(labelled, GPU), is_spot(labelled), gpu_memory_gb(labelled)) == ("H100", False, 94)
    assert device_type(Node("c", {"CPU": 1}, labels={"ray.io/node-group": "large"}), CPU) == "large"
    assert (device_type(Node("d", {"GPU": 1}), GPU), gpu_memory_gb(Node("d", {"GPU": 1}))) == ("gpu", math.inf)
    assert device_type(Node("e", {"CPU": 1}), CPU) == "cpu"


def test_cores_beside_gpus_are_no_gpus() -> None:
    node = Node("a", {"GPU": 1, "accelerator_type:H100": 1}, labels={"ray.io/node-group": "h100-workers"})
    assert (device_type(node, CPU), device_type(node, GPU)) == ("cpu", "H100")
    assert device_type(Node("b", {"CPU": 1}, labels={"ray.io/node-group": "l4-spare"}), CPU) == "cpu"


def test_a_gpu_is_called_as_the_table_does() -> None:
    assert [type_name(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA L4", "B9")] == ["H100", "L4", "B9"]
