"""One rank of a DeepSpeed job on CPUs, run by `test_engine.py`: FOLDER [load-only].

Reads `job.pt` (three batches, settings of the training) and writes, for every ZeRO stage and precision, a V-MoE's
weights after three steps: by torch alone, by DeepSpeed straight through, killed and resumed after the first, and in
micro-batches.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.models import family
from m2mkd_ray.training import (
    Classification,
    DeepSpeedConfig,
    DeepSpeedEngine,
    Engine,
    TorchEngine,
    TrainConfig,
    seeded,
)
from m2mkd_ray.training.engine import micro_batches

SIZE = {"name": "vit_tiny_patch16_224", "img_size": 28, "patch_size": 14, "num_classes": 10, "num_heads": 2}
BLUEPRINT = Blueprint(
    teacher=Vit(width=16, depth=2, **SIZE),
    teacher_depths=(1, 1),
    student=Student(vit=Vit(width=16, depth=2, **SIZE), moe=Moe(num_experts=3)),
    student_depths=(1, 1),
)


def student(*, seed: int = 0) -> Classification:
    with seeded(seed):
        return Classification(family("vmoe").model(BLUEPRINT))


def new_engine(
    job: dict, zero_stage: int, precision: str, *, micro_batch: int | None = None, seed: int = 0
) -> DeepSpeedEngine:
    return DeepSpeedEngine(
        student(seed=seed),
        TrainConfig(**job["config"], precision=precision),
        DeepSpeedConfig(zero_stage=zero_stage),
        rows=len(job["batches"][0][0]) // dist.get_world_size(),
        micro_batch=micro_batch,
    )


def steps(engine: Engine, batches: list[tuple[Tensor, Tensor]], micro_batch: int | None = None) -> None:
    for batch in batches:
        images, targets = (part.tensor_split(engine.world)[engine.rank] for part in batch)
        parts = micro_batches(images, targets, micro_batch)
        engine.begin(1e-2, is_logged=True)
        for number, part in enumerate(parts, start=1):
            engine.accumulate(*part, weight=1 / len(parts), is_last=number == len(parts))
        engine.update()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(job: dict, zero_stage: int, precision: str, folder: Path) -> None:
    name, batches = f"zero-{zero_stage}-{precision}", job["batches"]
    through = new_engine(job, zero_stage, precision)
    steps(through, batches[:1])
    through.snapshot()(folder / f"checkpoint-{name}")
    steps(through, batches[1:])
    resumed = new_engine(job, zero_stage, precision, seed=1)
    resumed.load(folder / f"checkpoint-{name}")
    steps(resumed, batches[1:])
    accumulated = new_engine(job, zero_stage, precision, micro_batch=4)
    steps(accumulated, batches, micro_batch=4)
    assert [through.agree(yes) for yes in (True, False)] == [True, False]
    assert through.agree(through.rank == 0), "rank 0 decides"
    if through.rank == 0:
        ends = {"through": through, "resumed": resumed, "accumulated": accumulated}
        found = {end: weights(engine.engine.module.model) for end, engine in ends.items()}
        torch.save(found, folder / f"{name}.pt")


def train_alone(job: dict, precision: str, folder: Path) -> None:
    """By torch, before there is a process group, in which its engine would be a rank."""
    alone = TorchEngine(student(), TrainConfig(**job["config"], precision=precision))
    steps(alone, job["batches"])
    torch.save(weights(alone.objective.trainable), folder / f"torch-{precision}.pt")


def refuse(job: dict, folder: Path) -> None:
    try:
        new_engine(job, 1, "fp32").load(folder / "checkpoint-zero-1-fp32")
    except ValueError as error:
        (folder / "refused.txt").write_text(str(error))


def main() -> None:
    folder, load_only = Path(sys.argv[1]), sys.argv[2:] == ["load-only"]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = torch.load(folder / "job.pt", weights_only=True)
    if rank == 0 and not load_only:
        for precision in ("fp32", "bf16"):
            train_alone(job, precision, folder)
    meeting = folder / f"meeting-{world}-{load_only}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    if load_only:
        refuse(job, folder)
    else:
        for zero_stage in (0, 1, 2):
            for precision in ("fp32", "bf16"):
                train(job, zero_stage, precision, folder)
    leave_together(folder, rank, world, f"left-{world}-{load_only}")


def leave_together(folder: Path, rank: int, world: int, name: str) -> None:
    """End the process when all ranks are done. gloo's threads abort a rank whose peer closes its sockets earlier."""
    (folder / f"{name}-{rank}").touch()
    deadline = time.monotonic() + 300
    while not all((folder / f"{name}-{other}").exists() for other in range(world)):
        assert time.monotonic() < deadline, "another rank never came to its end"
        time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
