"""One rank of a DeepSpeed job on CPUs, run by `test_engine.py`: FOLDER [load-only].

Reads `job.pt` (settings, start weights, three batches) and writes, for every ZeRO stage, the weights after three
steps: straight through, killed and resumed after the first, and in micro-batches.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.models import create_vit
from m2mkd_ray.training import Classification, DeepSpeedConfig, DeepSpeedEngine, TrainConfig

SMALL = Vit(
    name="vit_tiny_patch16_224",
    img_size=28,
    patch_size=14,
    num_classes=10,
    width=16,
    depth=2,
    num_heads=2,
    mlp_ratio=2,
)


def new_engine(job: dict, zero_stage: int, micro_batch: int | None = None, *, blank: bool = False) -> DeepSpeedEngine:
    objective = Classification(nn.Sequential(nn.Dropout(0.0), create_vit(SMALL)))
    if not blank:
        objective.load_state_dict(job["state"])
    rows = len(job["batches"][0][0]) // dist.get_world_size()
    config = TrainConfig(**job["config"])
    return DeepSpeedEngine(
        objective, config, DeepSpeedConfig(zero_stage=zero_stage), rows=rows, micro_batch=micro_batch
    )


def step(engine: DeepSpeedEngine, batch: tuple[Tensor, Tensor]) -> None:
    images, targets = (part.tensor_split(engine.world)[engine.rank] for part in batch)
    engine.step(images, targets, lr=1e-2)


def weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.engine.module.model.state_dict().items()}


def train(job: dict, zero_stage: int, folder: Path) -> None:
    through = new_engine(job, zero_stage)
    step(through, job["batches"][0])
    through.save(folder / f"checkpoint-{zero_stage}")
    for batch in job["batches"][1:]:
        step(through, batch)
    resumed = new_engine(job, zero_stage, blank=True)
    resumed.load(folder / f"checkpoint-{zero_stage}")
    for batch in job["batches"][1:]:
        step(resumed, batch)
    accumulated = new_engine(job, zero_stage, micro_batch=4)
    for batch in job["batches"]:
        step(accumulated, batch)
    assert [through.agree(yes) for yes in (True, False)] == [True, False]
    assert through.agree(through.rank == 0), "rank 0 decides"
    if through.rank == 0:
        ends = {"through": through, "resumed": resumed, "accumulated": accumulated}
        torch.save({name: weights(engine) for name, engine in ends.items()}, folder / f"zero-{zero_stage}.pt")


def refuse(job: dict, folder: Path) -> None:
    try:
        new_engine(job, 1).load(folder / "checkpoint-1")
    except ValueError as error:
        (folder / "refused.txt").write_text(str(error))


def main() -> None:
    folder, load_only = Path(sys.argv[1]), sys.argv[2:] == ["load-only"]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = folder / f"meeting-{world}-{load_only}"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    job = torch.load(folder / "job.pt", weights_only=True)
    if load_only:
        refuse(job, folder)
    else:
        for zero_stage in (0, 1, 2):
            train(job, zero_stage, folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
