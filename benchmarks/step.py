"""B4: our incubation step against a straightforward PyTorch step of the reference's procedure, on the same work.

    python -m benchmarks.step --json step.json

Both have the same weights and take the same batches; that their losses agree is checked before anything is timed. They
take turns, a few steps each after some that are not timed, and every turn gives a ratio: the table shows its median,
smallest and largest. One thread, unless --threads says otherwise. The plain step is in `benchmarks/plain_step.py`.

    fp32_ratio      plain fp32 / ours fp32
    autocast_ratio  plain autocast / the faster of our bf16 and bf16_pure
    best_ratio      the faster plain step / our fastest, whatever their precisions
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks._run import write
from benchmarks.plain_step import PlainStep
from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.training import ModuleDistillation, TorchEngine, TrainConfig
from m2mkd_ray.training.engine import local_device
from m2mkd_ray.training.precision import Precision

_UNTIMED = 2
"""Steps of each way in a turn that are not timed: what ran before has taken the caches and the allocator's memory."""
FIELDS = ("fp32_ratio", "autocast_ratio", "best_ratio")
Modules = tuple[list[nn.Module], nn.Module, nn.Module]


def vmoe_base(width_divisor: int) -> Blueprint:
    """DeiT-L cut 6-6-6-6 and V-MoE-B, with all widths divided."""
    size: dict[str, Any] = {"img_size": 224, "num_classes": 1000}
    heads = {"teacher": max(1, 16 // width_divisor), "student": max(1, 12 // width_divisor)}
    teacher = Vit(
        name="vit_large_patch16_224", width=1024 // width_divisor, depth=24, num_heads=heads["teacher"], **size
    )
    student = Vit(
        name="vit_base_patch16_224", width=768 // width_divisor, depth=12, num_heads=heads["student"], **size
    )
    return Blueprint(
        teacher=teacher,
        teacher_depths=(6, 6, 6, 6),
        student=Student(vit=student, moe=Moe(num_experts=8, top_k=2)),
        student_depths=(3, 3, 3, 3),
    )


@dataclass(frozen=True)
class Shape:
    """What is trained, and on how many images."""

    name: str
    blueprint: Blueprint
    batch_size: int


def shapes() -> list[Shape]:
    """The shapes that are measured: the published models at an eighth of their widths, and the demo's."""
    return [Shape("vmoe_base / 8", vmoe_base(8), 8), Shape("demo", find_recipe("demo").blueprint, 64)]


def modules(blueprint: Blueprint, index: int) -> Modules:
    """The meta model's modules, the student module and the teacher module, with random weights."""
    torch.manual_seed(0)
    meta = split(create_vit(blueprint.meta), (1,) * blueprint.num_modules)
    teacher = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[index]
    student = family(blueprint.student.family).modules(blueprint)[index]
    return list(meta), student, teacher


class OurStep:
    """The product's engine and objective, as a function of a batch."""

    def __init__(self, of: Modules, index: int, precision: Precision, *, compile: bool = False) -> None:
        meta, student, teacher = of
        meta, student, teacher = [*meta[:-1], class_token_alone(meta[-1])], *map(class_token_alone, (student, teacher))
        self.objective = ModuleDistillation(meta, index, student, teacher)
        self.engine = TorchEngine(self.objective, TrainConfig(epochs=1, lr=1e-3, precision=precision), compile=compile)

    def __call__(self, images: Tensor, targets: Tensor, *, is_logged: bool = False) -> Mapping[str, Tensor]:
        """One step on a batch, logged or as between two points of a history."""
        self.engine.begin(1e-3, is_logged=is_logged)
        self.engine.accumulate(images, targets, weight=1.0, is_last=True)
        return self.engine.update()


def measure(shape: Shape, index: int, *, turns: int, steps: int, compile: bool) -> dict[str, Any]:
    """Seconds of a step of every way, by turns, and their ratios."""
    device = local_device()
    torch.manual_seed(1)
    size, classes = shape.blueprint.teacher.img_size, shape.blueprint.teacher.num_classes
    batches = [
        (
            torch.randn(shape.batch_size, 3, size, size, device=device),
            torch.randn(shape.batch_size, classes, device=device).softmax(dim=-1),
        )
        for _ in range(2)
    ]
    made = modules(shape.blueprint, index)
    ours = {
        precision: OurStep(copy.deepcopy(made), index, precision, compile=compile) for precision in get_args(Precision)
    }
    plain = {
        name: PlainStep(*_moved(made, index, device), is_autocast=name == "autocast") for name in ("fp32", "autocast")
    }
    differences = check(ours, plain, batches)
    seconds: dict[str, list[float]] = {name: [] for name in (*_names("ours", ours), *_names("plain", plain))}
    for _ in range(turns):
        for side, steppers in (("ours", ours), ("plain", plain)):
            for name, step in steppers.items():
                seconds[f"{side} {name}"].append(timed(step, batches, steps, device))
    return {"shape": shape.name, "pair": index, "loss_differences": differences, "seconds": seconds, **ratios(seconds)}


def check(
    ours: Mapping[str, OurStep], plain: Mapping[str, PlainStep], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """How far the losses of two steps differ, relatively.

    Raises:
        RuntimeError: further than rounding explains; then the work is not the same, and times mean nothing.
    """
    differences = dict.fromkeys(ours, 0.0)
    for images, targets in batches:
        theirs = {name: float(step(images, targets)) for name, step in plain.items()}
        for precision, step in ours.items():
            found = float(step(images, targets, is_logged=True)["loss"])
            expected = theirs["fp32" if precision == "fp32" else "autocast"]
            differences[precision] = max(differences[precision], abs(found - expected) / abs(expected))
    limits = {"fp32": 1e-4, "bf16": 1e-2, "bf16_pure": 2e-2}
    if wrong := {name: value for name, value in differences.items() if value > limits[name]}:
        raise RuntimeError(f"The losses of our step and the plain one differ by {wrong}, more than {limits}.")
    return differences


def timed(step: Callable[[Tensor, Tensor], Any], batches: Sequence[Any], steps: int, device: torch.device) -> float:
    """Seconds of a step, over a few, as in the middle of a training: after two that bring its memory back."""
    for images, targets in batches[:_UNTIMED]:
        step(images.clone(), targets)
    _wait(device)
    # One thread's seconds on a processor are not disturbed by what else runs on the machine.
    clock = time.perf_counter if device.type == "cuda" or torch.get_num_threads() > 1 else time.process_time
    began = clock()
    for number in range(steps):
        images, targets = batches[number % len(batches)]
        step(images.clone(), targets)  # new images each time, as in a training
    _wait(device)
    return (clock() - began) / steps


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, smallest and largest ratio over the turns."""
    pure = min(("ours bf16", "ours bf16_pure"), key=lambda name: statistics.median(seconds[name]))
    ours = min(
        (name for name in seconds if name.startswith("ours")), key=lambda name: statistics.median(seconds[name])
    )
    plain = min(("plain fp32", "plain autocast"), key=lambda name: statistics.median(seconds[name]))
    pairs = {
        "fp32_ratio": ("plain fp32", "ours fp32"),
        "autocast_ratio": ("plain autocast", pure),
        "best_ratio": (plain, ours),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (slow, fast) in pairs.items():
        by_turn = [theirs / mine for theirs, mine in zip(seconds[slow], seconds[fast], strict=True)]
        found[name] = {"median": statistics.median(by_turn), "min": min(by_turn), "max": max(by_turn)}
    return found


def main() -> None:
    """Measure, print the table, write the numbers."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--steps", type=int, default=6, help="of each way in a turn; default: 6")
    options.add_argument("--pairs", type=int, nargs="+", default=[0, 1, 3])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--compile", action="store_true", help="ours with placement.compile")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [
        measure(shape, index, turns=arguments.turns, steps=arguments.steps, compile=arguments.compile)
        for shape in shapes()
        for index in arguments.pairs
    ]
    ways = list(results[0]["seconds"])
    table = Table("shape", "pair", *(f"{way}, ms" for way in ways), *FIELDS)
    for result in results:
        times = (f"{1e3 * statistics.median(result['seconds'][way]):.0f}" for way in ways)
        shown = ("{median:.2f} ({min:.2f} to {max:.2f})".format(**result[field]) for field in FIELDS)
        table.add_row(result["shape"], str(result["pair"]), *times, *shown)
    Console(width=200).print(table)
    overall = {
        field: statistics.median(result[field]["median"] for result in results if result["shape"] != "demo")
        for field in FIELDS
    }
    where = {"device": str(local_device()), "threads": arguments.threads, "is_compiled": arguments.compile}
    write(arguments.json, {**overall, **where, "results": results})


def _moved(made: Modules, index: int, device: torch.device) -> tuple[list[nn.Module], int, nn.Module, nn.Module]:
    meta, student, teacher = copy.deepcopy(made)
    return [module.to(device) for module in meta], index, student.to(device), teacher.to(device)


def _names(side: str, steppers: Mapping[str, Any]) -> list[str]:
    return [f"{side} {name}" for name in steppers]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
