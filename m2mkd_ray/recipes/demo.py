"""The demo: m2mKD on Fashion-MNIST, in minutes on two CPU cores."""

from typing import Any

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.recipe import Data, Pairs, Phase, Placement, Recipe, StagePlacement, Teacher
from m2mkd_ray.stages.finetune import FinetunePlacement
from m2mkd_ray.stages.incubate import DistillConfig, IncubatePlacement
from m2mkd_ray.stages.parts import Validation


def demo() -> Recipe:
    """A ViT of 12 blocks becomes a V-MoE of 8 blocks with 8 experts each, in four pairs.

    Command: `make demo`, or `m2mkd run demo`: seven minutes on two cores (docs/results/performance.md).
    Expect about 74 % top-1 in domain against 62 % of `pure`, over three seeds, and 81 % of pure with as much
    computation (docs/results/demo.md). Sizes and epochs follow the CPU protocol of docs/method.md.
    """
    size: dict[str, Any] = {"img_size": 28, "num_classes": 10, "patch_size": 7, "num_heads": 4}
    return Recipe(
        name="demo",
        title="m2mKD",
        data=Data(
            dataset="fashion-mnist-small",
            validation=Validation(split="validation", max_rows=1000),
            lanes=2,
            augmentation=Augmentation(
                kind="light", hflip=0.5, shift=2, label_smoothing=0.1, mean=(0.286,) * 3, std=(0.353,) * 3
            ),
        ),
        blueprint=Blueprint(
            teacher=Vit(name="vit_tiny_patch16_224", width=64, depth=12, **size),
            teacher_depths=(3, 3, 3, 3),
            student=Student(
                vit=Vit(name="vit_tiny_patch16_224", width=48, depth=8, **size), moe=Moe(num_experts=8, top_k=2)
            ),
            student_depths=(2, 2, 2, 2),
        ),
        meta=Phase(epochs=16, batch_size=64, lr=1e-3, warmup_epochs=2, validate_every_epochs=4),
        teacher=Teacher(
            source="incubated",
            incubation=Phase(epochs=6, batch_size=64, lr=1e-3, warmup_epochs=1, validate_every_epochs=2),
            phase=Phase(epochs=6, batch_size=64, lr=5e-4, clip_norm=1.0, validate_every_epochs=1),
        ),
        pairs=Pairs(
            epochs=6,
            batch_size=64,
            lr=1e-3,
            warmup_epochs=1,
            validate_every_epochs=2,
            distill=DistillConfig(alpha=0.5, temperature=1.0, reduction="batchmean"),
        ),
        finetune=Phase(epochs=3, batch_size=64, lr=5e-4, clip_norm=1.0, validate_every_epochs=0.5),
        suites=("fashion-small", "fashion-small-corrupted"),
        baselines=("pure",),
        placement=Placement(
            models=StagePlacement(resources=Resources(cpus=1)),
            pairs=IncubatePlacement(resources=Resources(cpus=1)),
            # Half a core booked for each rank: so pure's ranks share the machine with the meta model's training,
            # which has no other stage beside it, and no core stands idle. A rank runs one thread all the same.
            finetune=FinetunePlacement(num_workers=2, cpus_per_worker=0.5),
        ),
    )
