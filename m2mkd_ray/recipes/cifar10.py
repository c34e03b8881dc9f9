"""CIFAR-10 at 32 pixels: GPU minutes or CPU hours."""

from typing import Any

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Data, Pairs, Phase, Placement, Recipe, Teacher
from m2mkd_ray.stages.incubate import DistillConfig
from m2mkd_ray.stages.parts import Validation


def cifar10() -> Recipe:
    """A ViT of 12 blocks on 8 x 8 patches of 4 pixels becomes a V-MoE of 8 blocks with 8 experts.

    Command: `m2mkd data import cifar10 --source FOLDER`, then `m2mkd run cifar10`.
    On GPUs add `--set placement.pairs.resources.gpus=0.25` and the like. Epochs are in
    the reference's proportions, warm-up is a fifth of a phase (docs/method.md).
    """
    size: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "num_classes": 10}
    phase: dict[str, Any] = {"batch_size": 128, "lr": 1e-3, "validate_every_epochs": 1}
    return Recipe(
        name="cifar10",
        title="m2mKD",
        data=Data(
            dataset="cifar10",
            validation=Validation(split="test", max_rows=2000),
            lanes=2,
            augmentation=Augmentation(
                kind="light",
                shift=4,
                random_erasing=0.25,
                label_smoothing=0.1,
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.2470, 0.2435, 0.2616),
            ),
        ),
        blueprint=Blueprint(
            teacher=Vit(**size, width=192, depth=12, num_heads=3),
            teacher_depths=(3, 3, 3, 3),
            student=Student(vit=Vit(**size, width=128, depth=8, num_heads=4), moe=Moe(num_experts=8)),
            student_depths=(2, 2, 2, 2),
        ),
        meta=Phase(epochs=60, warmup_epochs=12, **phase),
        teacher=Teacher(source="trained", phase=Phase(epochs=60, warmup_epochs=12, drop_path=0.1, **phase)),
        pairs=Pairs(epochs=20, warmup_epochs=4, distill=DistillConfig(reduction="batchmean"), **phase),
        finetune=Phase(**{**phase, "epochs": 20, "lr": 5e-4, "clip_norm": 1.0, "drop_path": 0.1}),
        suites=("cifar10", "cifar10-corrupted"),
        baselines=("pure", "pure_matched", "incubation"),
        placement=Placement(data_root="data"),
    )
