"""Icons of a hundred things, with a true rendition shift: from monochrome icons to emoji."""

from typing import Any

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Data, Pairs, Phase, Placement, Recipe, Teacher
from m2mkd_ray.stages.incubate import DistillConfig
from m2mkd_ray.stages.parts import Validation


def icons() -> Recipe:
    """A ViT of 12 blocks on 8 x 8 patches of 8 pixels becomes a V-MoE of 8 blocks with 8 experts.

    Command: `m2mkd data import icon-domains --source FILE`, then `m2mkd run icons`.
    CPU hours or GPU minutes. Artists of the test icons are unseen; emoji and colour icons are
    the shifted suites, a stand-in for ImageNet-R.
    """
    size: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 64, "patch_size": 8, "num_classes": 100}
    phase: dict[str, Any] = {"batch_size": 128, "lr": 1e-3, "validate_every_epochs": 2}
    return Recipe(
        name="icons",
        title="m2mKD",
        data=Data(
            dataset="icon-domains",
            validation=Validation(split="test", max_rows=2000),
            lanes=2,
            augmentation=Augmentation(
                kind="light", shift=6, fill=255, recolor=True, random_erasing=0.1, label_smoothing=0.1
            ),
        ),
        blueprint=Blueprint(
            teacher=Vit(**size, width=192, depth=12, num_heads=3),
            teacher_depths=(3, 3, 3, 3),
            student=Student(vit=Vit(**size, width=128, depth=8, num_heads=4), moe=Moe(num_experts=8)),
            student_depths=(2, 2, 2, 2),
        ),
        meta=Phase(epochs=90, warmup_epochs=18, **phase),
        teacher=Teacher(source="trained", phase=Phase(epochs=90, warmup_epochs=18, drop_path=0.1, **phase)),
        pairs=Pairs(epochs=30, warmup_epochs=6, distill=DistillConfig(reduction="batchmean"), **phase),
        finetune=Phase(**{**phase, "epochs": 30, "lr": 5e-4, "clip_norm": 1.0, "drop_path": 0.1}),
        suites=("icons", "icons-emoji", "icons-uicolor"),
        baselines=("pure", "pure_matched", "incubation"),
        placement=Placement(data_root="data"),
    )
