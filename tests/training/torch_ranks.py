"""One rank of a torch engine on CPUs, run by `test_ranks.py`: FOLDER TRAININGS (JSON: a list of name, settings).

Each training is of the two pairs of a V-MoE in a cohort, in FOLDER/NAME, where it writes `ended-RANK.pt`: weights,
history or the error of each pair. They are in one process as it takes longer to start than all of them.
Where WORLD_SIZE is 1 there is no process group.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cuts import Cut, Killed
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation, Batches, FeedConfig, find
from m2mkd_ray.execution import Store
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.training import (
    Member,
    ModuleDistillation,
    Prefix,
    TorchEngine,
    TrainConfig,
    TrainPlacement,
    fit_together,
    seeded,
)

SIZE: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "img_size": 28,
    "patch_size": 14,
    "num_classes": 10,
    "num_heads": 2,
}
BLUEPRINT = Blueprint(
    teacher=Vit(width=16, depth=2, **SIZE),
    teacher_depths=(1, 1),
    student=Student(vit=Vit(width=16, depth=2, **SIZE), moe=Moe(num_experts=3)),
    student_depths=(1, 1),
)
FEED = FeedConfig(
    dataset="fashion-mnist-small",
    max_rows=96,
    batch_size=16,
    lanes=2,
    img_size=28,
    augmentation=Augmentation(kind="light", shift=2, label_smoothing=0.1),
    seed=3,
)
# A large epsilon, as in test_engine.py: rounding must not become whole steps.
CONFIG = TrainConfig(epochs=1, lr=1e-2, eps=1e-3, clip_norm=1.0, drop_path=0.5, validate_every_epochs=0.5, patience=2)


class OneRankKeeps:
    """A session whose checkpoints rank 0 keeps in a store that all ranks read."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.is_blind = False
        self.kept, self.rank = Store(str(folder)).checkpoints("training-000000000000"), rank

    @property
    def checkpoints(self) -> "OneRankKeeps":
        return self

    def latest(self) -> tuple[int, Path] | None:
        return None if self.is_blind else self.kept.latest()

    def scratch(self) -> Path:
        return self.kept.scratch()

    def save(self, step: int, files: Path) -> None:
        if self.rank == 0:
            self.kept.save(step, files)
        else:
            assert list(files.iterdir()) == [], "only rank 0 writes"

    def has_notice(self) -> bool:
        return False

    def report(self, step: int, total_steps: int, metrics: Any, landmarks: Any = ()) -> None:
        pass


def score(student: nn.Module) -> dict[str, float]:
    """A figure that follows from the weights."""
    return {"val_top1": sum(float(weight.detach().norm()) for weight in student.parameters())}


def members(folder: Path, rank: int, precision: str) -> list[Member]:
    """The two pairs, in a cohort."""
    config = TrainConfig(**{**CONFIG.model_dump(), "precision": precision})
    with seeded(0):
        prefix = Prefix(split(create_vit(BLUEPRINT.teacher.model_copy(update={"depth": 2})), (1, 1)))
        teachers = split(create_vit(BLUEPRINT.teacher), (1, 1))
        students = family("vmoe").modules(BLUEPRINT, drop_path=0.5)
    found = []
    for index in range(2):
        objective = ModuleDistillation(prefix, index, students[index], teachers[index], reduction="batchmean")
        engine = TorchEngine(objective, config)
        validate = partial(score, students[index]) if rank == 0 else None
        found.append(Member(engine, config, OneRankKeeps(folder / f"pair-{index}", rank), index, validate))
    return found


def train(
    folder: Path,
    rank: int,
    world: int,
    *,
    precision: str = "fp32",
    at: int | None = None,
    spoilt: bool = False,
    blind: bool = False,
) -> None:
    folder.mkdir(exist_ok=True)
    feed: Any = Batches(FEED, find("fashion-mnist-small"), rank, world)
    made = members(folder, rank, precision)
    if spoilt and rank == world - 1:
        student: nn.Module = made[1].engine.objective.trainable
        student.register_forward_hook(lambda module, args, output: output * float("nan"))
    for member in made:
        assert isinstance(member.session, OneRankKeeps)
        member.session.is_blind = blind and rank == world - 1
    placement = TrainPlacement(checkpoint_every_s=0, log_every_steps=1, micro_batch=8)
    ended = {}
    try:
        for end in fit_together(feed if at is None else Cut(feed, at), made, placement):
            weights: dict[str, Tensor] = made[end.place].engine.objective.trainable.state_dict()
            ended[end.place] = {"weights": weights, "history": end.history, "error": str(end.error)}
    except Killed:
        assert at is not None
    except RuntimeError as error:
        assert blind
        (folder / f"refused-{rank}.txt").write_text(str(error))
    torch.save(ended, folder / f"ended-{rank}.pt")


def main() -> None:
    folder, trainings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for name, settings in trainings:
        train(folder / name, rank, world, **settings)
    (folder / f"left-{rank}").touch()
    deadline = time.monotonic() + 120
    while not all((folder / f"left-{other}").exists() for other in range(world)):  # gloo aborts a rank left behind
        assert time.monotonic() < deadline, "another rank never came to its end"
        time.sleep(0.02)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
