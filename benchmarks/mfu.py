"""B6: how much of a GPU's peak the incubation step uses, and how much memory, at the sizes of V-MoE-S and V-MoE-B.

    python -m benchmarks.mfu --json mfu.json

Model operations are those of the step as it is carried out (`m2mkd_ray.models.compute.step_flops`), so that blocks
which are computed for the class token alone count as such. A cohort's operations count the meta modules before its
pairs once, as they are run once. Without a GPU nothing is run, and that is what is written.

    mfu            of the best precision of the published pairs, one at a time: the median
    cohort_mfu     all four published pairs in one process, on the same batches
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._run import write
from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.models.compute import pair_cost, step_flops
from m2mkd_ray.training import ModuleDistillation, Prefix, TorchEngine, TrainConfig
from m2mkd_ray.training.counters import peak_flops
from m2mkd_ray.training.precision import Precision

NOT_RUN = "not run: no GPU here"


def blueprints() -> dict[str, Blueprint]:
    """V-MoE-B with DeiT-L, as published; and V-MoE-S with DeiT-B in the same proportions."""
    teachers = {"vmoe_small": ("vit_base_patch16_224", 12, 3), "vmoe_base": ("vit_large_patch16_224", 24, 6)}
    students = {"vmoe_small": "vit_small_patch16_224", "vmoe_base": "vit_base_patch16_224"}
    return {
        name: Blueprint(
            teacher=Vit(name=teacher, depth=depth),
            teacher_depths=(blocks,) * 4,
            student=Student(vit=Vit(name=students[name], depth=12), moe=Moe(num_experts=8, top_k=2)),
            student_depths=(3,) * 4,
        )
        for name, (teacher, depth, blocks) in teachers.items()
    }


def objectives(blueprint: Blueprint, pairs: Sequence[int]) -> list[ModuleDistillation]:
    """Pairs that share what is before them."""
    torch.manual_seed(0)
    prefix = Prefix([class_token_alone(module) for module in split(create_vit(blueprint.meta), (1,) * 4)])
    teachers = split(create_vit(blueprint.teacher), blueprint.teacher_depths)
    students = family(blueprint.student.family).modules(blueprint)
    return [
        ModuleDistillation(prefix, index, class_token_alone(students[index]), class_token_alone(teachers[index]))
        for index in pairs
    ]


def measure(
    name: str, pairs: Sequence[int], precision: Precision, *, batch_size: int, steps: int, compile: bool
) -> dict[str, Any]:
    """Images a second, share of the peak and memory of pairs that are trained together."""
    blueprint = blueprints()[name]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = TrainConfig(epochs=1, lr=1e-3, precision=precision)
    engines = [TorchEngine(objective, config, compile=compile) for objective in objectives(blueprint, pairs)]
    targets = torch.randn(batch_size, 1000, device="cuda").softmax(dim=-1)
    images = [torch.randn(batch_size, 3, 224, 224, device="cuda") for _ in range(2)]

    def step(number: int) -> None:
        for engine in engines:
            engine.begin(1e-3, is_logged=False)
            engine.accumulate(images[number % 2], targets, weight=1.0, is_last=True)
            engine.update()

    for number in range(4):
        step(number)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    torch.cuda.synchronize()
    images_per_s = steps * batch_size / (time.perf_counter() - began)
    peak = peak_flops(torch.cuda.get_device_name(), precision)
    return {
        "model": name,
        "pairs": list(pairs),
        "precision": precision,
        "batch_size": batch_size,
        "images_per_s": images_per_s,
        "tflops_per_s": flops(blueprint, pairs) * images_per_s / 1e12,
        "mfu": None if peak is None else flops(blueprint, pairs) * images_per_s / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def flops(blueprint: Blueprint, pairs: Sequence[int]) -> float:
    """Operations an image of pairs that share what is before them."""
    alone = sum(step_flops(blueprint, blueprint.pairs[index]) for index in pairs)
    before = [2 * pair_cost(blueprint, blueprint.pairs[index]).before for index in pairs]
    return alone - sum(before) + max(before)


def main() -> None:
    """Measure, print the table, write the numbers."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument(
        "--precisions", nargs="+", default=["bf16", "bf16_pure"], choices=["fp32", "bf16", "bf16_pure"]
    )
    options.add_argument("--compile", action="store_true")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        Console().print(NOT_RUN)
        write(arguments.json, {"mfu": NOT_RUN, "cohort_mfu": NOT_RUN, "results": []})
        return
    how = {"batch_size": arguments.batch_size, "steps": arguments.steps, "compile": arguments.compile}
    results = [
        measure(name, pairs, precision, **how)
        for precision in arguments.precisions
        for name in blueprints()
        for pairs in ((0,), (1,), (2,), (3,), (0, 1, 2, 3))
    ]
    table = Table(*(column for column in results[0]), title=torch.cuda.get_device_name())
    for result in results:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in result.values()))
    Console(width=160).print(table)
    published = [result for result in results if result["model"] == "vmoe_base" and result["mfu"] is not None]
    write(
        arguments.json,
        {
            "mfu": best(result for result in published if len(result["pairs"]) == 1),
            "cohort_mfu": best(result for result in published if len(result["pairs"]) == 4),
            "device": torch.cuda.get_device_name(),
            "results": results,
        },
    )


def best(results: Any) -> float | None:
    """The best precision's median; None where the device's peak is not known."""
    by_precision: dict[str, list[float]] = {}
    for result in results:
        by_precision.setdefault(result["precision"], []).append(result["mfu"])
    return max((statistics.median(found) for found in by_precision.values()), default=None)


if __name__ == "__main__":
    main()
