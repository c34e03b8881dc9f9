"""Tiny-ImageNet at 64 pixels: the data set of the paper's claims, with a small V-MoE."""

from typing import Any

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Data, Pairs, Phase, Placement, Recipe, Teacher
from m2mkd_ray.stages.incubate import DistillConfig
from m2mkd_ray.stages.parts import Validation


def tiny_imagenet() -> Recipe:
    """A ViT of 12 blocks on 8 x 8 patches of 8 pixels becomes a V-MoE of 8 blocks with 8 experts.

    Command: `m2mkd data import tiny-imagenet --source FOLDER`, then `m2mkd run tiny_imagenet`.
    GPU minutes, or many CPU hours. The shifted suite is the corrupted validation set; for
    renditions import tiny-imagenet-r and add its suite: `--set suites=[tiny-imagenet,tiny-imagenet-r]`.
    """
    size: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 64, "patch_size": 8, "num_classes": 200}
    phase: dict[str, Any] = {"batch_size": 256, "lr": 1e-3, "validate_every_epochs": 1}
    return Recipe(
        name="tiny_imagenet",
        title="m2mKD",
        data=Data(
            dataset="tiny-imagenet",
            validation=Validation(split="val", max_rows=2000),
            lanes=2,
            augmentation=Augmentation(
                kind="timm",
                scale=(0.35, 1.0),
                auto_augment="rand-m5-mstd0.5-inc1",
                random_erasing=0.25,
                mixup=0.2,
                cutmix=1.0,
                mix_prob=0.5,
                label_smoothing=0.1,
                crop_pct=1.0,
            ),
        ),
        blueprint=Blueprint(
            teacher=Vit(**size, width=192, depth=12, num_heads=3),
            teacher_depths=(3, 3, 3, 3),
            student=Student(vit=Vit(**size, width=144, depth=8, num_heads=3), moe=Moe(num_experts=8)),
            student_depths=(2, 2, 2, 2),
        ),
        meta=Phase(epochs=60, warmup_epochs=12, **phase),
        teacher=Teacher(source="trained", phase=Phase(epochs=60, warmup_epochs=12, drop_path=0.1, **phase)),
        pairs=Pairs(epochs=20, warmup_epochs=4, distill=DistillConfig(reduction="batchmean"), **phase),
        finetune=Phase(**{**phase, "epochs": 20, "lr": 5e-4, "clip_norm": 1.0, "drop_path": 0.1}),
        suites=("tiny-imagenet", "tiny-imagenet-corrupted"),
        baselines=("pure", "pure_matched", "incubation"),
        placement=Placement(data_root="data"),
    )
