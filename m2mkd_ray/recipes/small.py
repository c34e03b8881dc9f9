"""What the recipes for small images have in common: models of one size, and epochs in the reference's proportions."""

from typing import Any

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.recipe import Pairs, Phase, Teacher
from m2mkd_ray.stages.incubate import DistillConfig


def small_blueprint(
    *, img_size: int, patch_size: int, num_classes: int, student_width: int, student_heads: int
) -> Blueprint:
    """A ViT of 12 blocks and width 192 becomes a V-MoE of 8 blocks with 8 experts each, in four pairs."""
    size: dict[str, Any] = {
        "name": "vit_tiny_patch16_224",
        "img_size": img_size,
        "patch_size": patch_size,
        "num_classes": num_classes,
    }
    return Blueprint(
        teacher=Vit(**size, width=192, depth=12, num_heads=3),
        teacher_depths=(3, 3, 3, 3),
        student=Student(
            vit=Vit(**size, width=student_width, depth=8, num_heads=student_heads), moe=Moe(num_experts=8)
        ),
        student_depths=(2, 2, 2, 2),
    )


def small_phases(*, batch_size: int, epochs: int, validate_every_epochs: float) -> dict[str, Any]:
    """The recipe's trainings: 3 * `epochs` for meta model and teacher, `epochs` for pairs and student.

    300 : 100 in the reference; warm-up is a fifth of a phase, as for small runs (docs/method.md).
    """
    common: dict[str, Any] = {"batch_size": batch_size, "lr": 1e-3, "validate_every_epochs": validate_every_epochs}
    whole: dict[str, Any] = {**common, "epochs": 3 * epochs, "warmup_epochs": 3 * epochs / 5}
    tuned: dict[str, Any] = {**common, "epochs": epochs, "lr": 5e-4, "clip_norm": 1.0, "drop_path": 0.1}
    distill = DistillConfig(reduction="batchmean")
    return {
        "meta": Phase(**whole),
        "teacher": Teacher(source="trained", phase=Phase(**whole, drop_path=0.1)),
        "pairs": Pairs(**common, epochs=epochs, warmup_epochs=epochs / 5, distill=distill),
        "finetune": Phase(**tuned),
    }
