"""The paper's V-MoE: DeiT-Large, cut 6-6-6-6, into V-MoE-Base on ImageNet-1k."""

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.data import IMAGENET
from m2mkd_ray.recipe import Data, Recipe, Teacher
from m2mkd_ray.recipes.published import INCUBATED, META, PAIRS, TUNED, on_gpus
from m2mkd_ray.stages.parts import Validation


def vmoe_base() -> Recipe:
    """m2mKD's V-MoE-Base as published (arXiv 2402.16918; commands in kamanphoebe/m2mKD `TRAIN-MOE.md`).

    Command: `m2mkd data import imagenet-1k --source FOLDER`, then `m2mkd run vmoe_base`.
    Cost: about 590 + 242 + 100 epochs' worth of training V-MoE-Base (docs/method.md): a cluster's work.
    Pairs run on one GPU each, in bf16 where the reference used fp16 with a scaler.

    The learning rate is 5e-4 per 512 images; batches, epochs, warm-up, drop path and
    clipping are the reference's, phase by phase. Its off-by-one of the epoch schedule is kept.
    """
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
        meta=META,
        teacher=Teacher(source="incubated", incubation=INCUBATED, phase=TUNED),
        pairs=PAIRS,
        finetune=TUNED,
        suites=("imagenet-1k",),
        baselines=("pure", "incubation"),
        placement=on_gpus(micro_batch=256),
    )
