"""The paper's V-MoE: DeiT-Large, cut 6-6-6-6, into V-MoE-Base on ImageNet-1k."""

from typing import Any

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import IMAGENET
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.recipe import Data, Pairs, Phase, Placement, Recipe, StagePlacement, Teacher
from m2mkd_ray.stages.finetune import FinetunePlacement
from m2mkd_ray.stages.incubate import DistillConfig, IncubatePlacement
from m2mkd_ray.stages.parts import Validation


def vmoe_base() -> Recipe:
    """m2mKD's V-MoE-Base as published (arXiv 2402.16918; commands in kamanphoebe/m2mKD `TRAIN-MOE.md`).

    Command: `m2mkd data import imagenet-1k --source FOLDER`, then `m2mkd run vmoe_base`.
    Cost: about 590 + 242 + 100 epochs' worth of training V-MoE-Base (docs/method.md): a cluster's work.
    Pairs run on one GPU each, in bf16 where the reference used fp16 with a scaler.

    The learning rate is 5e-4 per 512 images; batches, epochs, warm-up, drop path and
    clipping are the reference's, phase by phase. Its off-by-one of the epoch schedule is kept.
    """
    common: dict[str, Any] = {"schedule": "epoch", "precision": "bf16", "validate_every_epochs": 5}
    incubated = Phase(epochs=100, batch_size=2048, lr=2e-3, warmup_epochs=20, drop_path=0.1, **common)
    tuned = Phase(epochs=100, batch_size=1024, lr=1e-3, drop_path=0.1, clip_norm=1.0, **common)
    gpu = StagePlacement(resources=Resources(cpus=12, gpus=1), data_workers=11, micro_batch=256)
    return Recipe(
        name="vmoe_base",
        title="m2mKD",
        data=Data(
            dataset="imagenet-1k",
            validation=Validation(split="val"),
            lanes=8,
            augmentation=IMAGENET,
        ),
        blueprint=Blueprint(
            teacher=Vit(name="vit_large_patch16_224", depth=24),
            teacher_depths=(6, 6, 6, 6),
            student=Student(vit=Vit(name="vit_base_patch16_224", depth=12), moe=Moe(expert_init="fastmoe")),
            student_depths=(3, 3, 3, 3),
        ),
        meta=Phase(epochs=300, batch_size=2048, lr=2e-3, warmup_epochs=20, **common),
        teacher=Teacher(source="incubated", incubation=incubated, phase=tuned),
        pairs=Pairs(**incubated.model_dump(), distill=DistillConfig(alpha=0.5, temperature=1.0, reduction="numel")),
        finetune=tuned,
        suites=("imagenet-1k",),
        baselines=("pure", "incubation"),
        placement=Placement(
            data_root="data",
            models=gpu,
            pairs=IncubatePlacement(**gpu.model_dump()),
            evaluation=StagePlacement(resources=Resources(cpus=8, gpus=1), data_workers=7),
            finetune=FinetunePlacement(
                num_workers=8, cpus_per_worker=12, gpus_per_worker=1, data_workers=11, micro_batch=128
            ),
        ),
    )
