"""B4: our incubation step against a straightforward PyTorch step of the reference's procedure, on the same work.

    python -m benchmarks.step --json step.json

Both have the same weights and take the same batches; that their losses agree is checked before anything is timed. They
take turns, a few steps each after some that are not timed, and every turn gives a ratio: the table shows its median,
smallest and largest. One thread, unless --threads says otherwise. The plain step is in `benchmarks/_plain_step.py`.

    fp32_ratio      plain fp32 / ours fp32
    autocast_ratio  plain autocast / the faster of our bf16 and bf16_pure
    best_ratio      the faster plain step / our fastest of the three precisions
    cached_ratio    plain fp32 / ours fp32 where the teacher's logits are in memory: less work
    compiled_ratio  plain fp32 / ours fp32 with placement.compile; only with --compile

And as the product's step is with `pairs.cache` from the second pass over the cached views on, and in every trial of a
sweep: no teacher is run, its logits come from the artifact, and reading that is part of our time. The plain step runs
teacher and student, so it does more: these ratios are of procedures, those above of the same work.

    artifact_ratio           plain fp32 / ours fp32
    artifact_compiled_ratio  the same, ours with placement.compile; only with --compile
    artifact_autocast_ratio  plain autocast / the faster of our bf16 and bf16_pure

On a GPU the model is V-MoE-B at its published widths, on a CPU at an eighth of them.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks._artifact import Artifact
from benchmarks._plain_step import PlainStep
from benchmarks._run import write
from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.training import ModuleDistillation, TorchEngine, TrainConfig
from m2mkd_ray.training.engine import local_device
from m2mkd_ray.training.precision import Precision

_UNTIMED = 2
"""Steps of each way in a turn that are not timed: what ran before has taken the caches and the allocator's memory."""
CACHED, COMPILED = "fp32 cached", "fp32 compiled"
"""Ways of ours beside its precisions."""
ARTIFACT = " artifact"
"""What the name of a way ends with whose logits come from an artifact."""
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


class Batch(NamedTuple):
    """What a step gets."""

    images: Tensor
    """(B, 3, H, W)."""
    targets: Tensor
    """(B, K)."""
    teacher_logits: Tensor | None = None
    """(B, K), float32; for the way that has them at hand."""


@dataclass(frozen=True)
class Shape:
    """What is trained, and on how many images."""

    name: str
    blueprint: Blueprint
    batch_size: int


def shapes() -> list[Shape]:
    """The shapes that are measured: the published models, on a CPU at an eighth of their widths; and the demo's."""
    published = (
        Shape("vmoe_base", vmoe_base(1), 128) if torch.cuda.is_available() else Shape("vmoe_base / 8", vmoe_base(8), 8)
    )
    return [published, Shape("demo", find_recipe("demo").blueprint, 64)]


def modules(blueprint: Blueprint, index: int) -> Modules:
    """The meta model's modules, the student module and the teacher module, with random weights."""
    torch.manual_seed(0)
    meta = split(create_vit(blueprint.meta), (1,) * blueprint.num_modules)
    teacher = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[index]
    student = family(blueprint.student.family).modules(blueprint)[index]
    return list(meta), student, teacher


class OurStep:
    """The product's engine and objective, as a function of a batch."""

    def __init__(
        self, of: Modules, index: int, precision: Precision, *, is_cached: bool = False, compile: bool = False
    ) -> None:
        meta, student, teacher = of
        meta, student, teacher = [*meta[:-1], class_token_alone(meta[-1])], *map(class_token_alone, (student, teacher))
        self.objective = ModuleDistillation(meta, index, student, teacher)
        self.engine = TorchEngine(self.objective, TrainConfig(epochs=1, lr=1e-3, precision=precision), compile=compile)
        self.precision, self.is_cached = precision, is_cached

    def __call__(self, batch: Batch, *, is_logged: bool = False) -> Mapping[str, Tensor]:
        """One step on a batch, logged or as between two points of a history."""
        logits = batch.teacher_logits if self.is_cached else None
        self.engine.begin(1e-3, is_logged=is_logged)
        self.engine.accumulate(batch.images, batch.targets, logits, weight=1.0, is_last=True)
        return self.engine.update()


def measure(shape: Shape, index: int, *, turns: int, steps: int, compile: bool) -> dict[str, Any]:
    """Seconds of a step of every way, by turns, and their ratios."""
    device = local_device()
    torch.manual_seed(1)
    size, classes = shape.blueprint.teacher.img_size, shape.blueprint.teacher.num_classes
    made = modules(shape.blueprint, index)
    ours = {precision: OurStep(copy.deepcopy(made), index, precision) for precision in get_args(Precision)}
    for precision in get_args(Precision):
        ours[precision + ARTIFACT] = OurStep(copy.deepcopy(made), index, precision, is_cached=True)
    ours[CACHED] = OurStep(copy.deepcopy(made), index, "fp32", is_cached=True)
    if compile:
        ours[COMPILED] = OurStep(copy.deepcopy(made), index, "fp32", compile=True)
        ours[COMPILED + ARTIFACT] = OurStep(copy.deepcopy(made), index, "fp32", is_cached=True, compile=True)
    plain = {
        name: PlainStep(*_moved(made, index, device), is_autocast=name == "autocast") for name in ("fp32", "autocast")
    }
    teacher = ours["fp32"].objective.teacher
    assert teacher is not None
    batches = []
    for _ in range(2):
        images = torch.randn(shape.batch_size, 3, size, size, device=device)
        targets = torch.randn(shape.batch_size, classes, device=device).softmax(dim=-1)
        batches.append(Batch(images, targets, teacher(images)))
    ways: dict[str, Callable[[Batch], Any]] = {f"ours {name}": step for name, step in ours.items()}
    ways |= {f"plain {name}": _on_batches(step) for name, step in plain.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="m2-") as folder:
        logits = [batch.teacher_logits.cpu() for batch in batches if batch.teacher_logits is not None]
        artifact = Artifact(Path(folder) / "logits.parquet", logits, img_size=size)
        reader = artifact.reader()
        read = [batch._replace(teacher_logits=reader(step).to(device)) for step, batch in enumerate(batches)]
        given = {name: read if name.endswith(ARTIFACT) else batches for name in ways}
        differences = check(ours, plain, {name: given[f"ours {name}"] for name in ours})
        for _ in range(turns):
            for name, step in ways.items():
                reading_s = artifact.read_s() if name.endswith(ARTIFACT) else 0.0
                seconds[name].append(timed(step, given[name], steps, device) + reading_s)
    return {"shape": shape.name, "pair": index, "loss_differences": differences, "seconds": seconds, **ratios(seconds)}


def check(
    ours: Mapping[str, OurStep], plain: Mapping[str, PlainStep], batches: Mapping[str, Sequence[Batch]]
) -> dict[str, float]:
    """How far the losses of two steps differ, relatively; `batches` are those of each way of ours, the same images.

    Raises:
        RuntimeError: further than rounding explains; then the work is not the same, and times mean nothing.
    """
    differences = dict.fromkeys(ours, 0.0)
    for number, batch in enumerate(batches["fp32"]):
        theirs = {name: float(step(batch.images, batch.targets)) for name, step in plain.items()}
        for name, step in ours.items():
            found = float(step(batches[name][number], is_logged=True)["loss"])
            expected = theirs["fp32" if step.precision == "fp32" else "autocast"]
            differences[name] = max(differences[name], abs(found - expected) / abs(expected))
    limits = {"fp32": 1e-4, "bf16": 1e-2, "bf16_pure": 2e-2}
    if wrong := {name: value for name, value in differences.items() if value > limits[ours[name].precision]}:
        raise RuntimeError(f"The losses of our step and the plain one differ by {wrong}, more than {limits}.")
    return differences


def timed(step: Callable[[Batch], Any], batches: Sequence[Batch], steps: int, device: torch.device) -> float:
    """Seconds of a step, over a few, as in the middle of a training: after two that bring its memory back."""
    for batch in batches[:_UNTIMED]:
        step(batch._replace(images=batch.images.clone()))
    _wait(device)
    # One thread's seconds on a processor are not disturbed by what else runs on the machine.
    clock = time.perf_counter if device.type == "cuda" or torch.get_num_threads() > 1 else time.process_time
    began = clock()
    for number in range(steps):
        batch = batches[number % len(batches)]
        step(batch._replace(images=batch.images.clone()))  # new images each time, as in a training
    _wait(device)
    return (clock() - began) / steps


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, smallest and largest ratio over the turns."""

    def fastest(*names: str) -> str:
        return min(names, key=lambda name: statistics.median(seconds[name]))

    pairs = {
        "fp32_ratio": ("plain fp32", "ours fp32"),
        "autocast_ratio": ("plain autocast", fastest("ours bf16", "ours bf16_pure")),
        "best_ratio": (
            fastest("plain fp32", "plain autocast"),
            fastest(*(f"ours {precision}" for precision in get_args(Precision))),
        ),
        "cached_ratio": ("plain fp32", f"ours {CACHED}"),
        "artifact_ratio": ("plain fp32", f"ours fp32{ARTIFACT}"),
        "artifact_autocast_ratio": (
            "plain autocast",
            fastest(f"ours bf16{ARTIFACT}", f"ours bf16_pure{ARTIFACT}"),
        ),
    }
    if f"ours {COMPILED}" in seconds:
        pairs["compiled_ratio"] = ("plain fp32", f"ours {COMPILED}")
        pairs["artifact_compiled_ratio"] = ("plain fp32", f"ours {COMPILED}{ARTIFACT}")
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
    options.add_argument("--pairs", type=int, nargs="+", default=[0, 1, 2, 3])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--compile", action="store_true", help="also ours with placement.compile")
    known = {shape.name: shape for shape in shapes()}
    options.add_argument("--shapes", nargs="+", choices=known, default=list(known), help="default: all")
    options.add_argument("--store", help="without effect: for `make bench`")
    options.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [
        measure(known[name], index, turns=arguments.turns, steps=arguments.steps, compile=arguments.compile)
        for name in dict.fromkeys(arguments.shapes)
        for index in arguments.pairs
    ]
    ways = list(results[0]["seconds"])
    fields = [name for name in results[0] if name.endswith("_ratio")]
    table = Table("shape", "pair", *(f"{way}, ms" for way in ways), *fields)
    for result in results:
        times = (f"{1e3 * statistics.median(result['seconds'][way]):.0f}" for way in ways)
        shown = ("{median:.2f} ({min:.2f} to {max:.2f})".format(**result[field]) for field in fields)
        table.add_row(result["shape"], str(result["pair"]), *times, *shown)
    Console(width=200).print(table)
    counted = [result for result in results if result["shape"] != "demo"] or results
    overall = {field: statistics.median(result[field]["median"] for result in counted) for field in fields}
    where = {"device": str(local_device()), "threads": arguments.threads}
    write(arguments.json, {**overall, **where, "results": results})


def _moved(made: Modules, index: int, device: torch.device) -> tuple[list[nn.Module], int, nn.Module, nn.Module]:
    meta, student, teacher = copy.deepcopy(made)
    return [module.to(device) for module in meta], index, student.to(device), teacher.to(device)


def _on_batches(step: PlainStep) -> Callable[[Batch], Tensor]:
    return lambda batch: step(batch.images, batch.targets)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
