"""The paper's neural attentive circuit: a ViT-H, cut 4-3-3-3-3-3-3-3-3-4, into a NAC on Tiny-ImageNet."""

from m2mkd_ray.blueprint import Blueprint, Nac, Student, Vit
from m2mkd_ray.data import IMAGENET
from m2mkd_ray.recipe import Data, Phase, Recipe, Teacher
from m2mkd_ray.recipes.published import INCUBATED, META, PAIRS, TUNED, on_gpus
from m2mkd_ray.stages.parts import Validation


def nac_tiny() -> Recipe:
    """m2mKD's NAC with the scale-free prior on Tiny-ImageNet (arXiv 2402.16918; kamanphoebe/m2mKD `TRAIN-NAC.md`).

    Command: `m2mkd data import tiny-imagenet --source FOLDER`, the same for tiny-imagenet-r (docs/data.md), then
    `m2mkd run nac_tiny`.
    Cost: a cluster's work for days; the teacher's preparation is nearly all of it.
    Result to expect: the NAC authors' circuit from random weights has 60.8 % on Tiny-ImageNet and 19.5 % on
    Tiny-ImageNet-R (mweiss17/NeuralAttentiveCircuits); m2mKD's abstract gives up to 5.6 and 4.2 points more.

    Epochs, batches, learning rates, warm-up, drop path and clipping are the reference's, phase by phase. Different is
    what teaches: all phases read Tiny-ImageNet at 64 pixels, where the reference's teacher and modules have
    ImageNet-1k at 224, ten times the images, of the same classes and more. With patches of 4 pixels a ViT-H has as
    many tokens there, 257.
    """
    end_to_end = Phase(
        epochs=400,
        batch_size=1024,
        lr=2.4e-3,  # 1.2e-3 per 512 images, and so the least one
        min_lr=8e-5,
        warmup_epochs=25,
        weight_decay=0.075,
        decayed="all",
        drop_path=0.1,
        precision="bf16",
        validate_every_epochs=5,
    )
    return Recipe(
        name="nac_tiny",
        title="m2mKD",
        data=Data(dataset="tiny-imagenet", validation=Validation(split="val"), lanes=8, augmentation=IMAGENET),
        blueprint=Blueprint(
            teacher=Vit(name="vit_huge_patch14_224", img_size=64, patch_size=4, num_classes=200, depth=32),
            teacher_depths=(4, 3, 3, 3, 3, 3, 3, 3, 3, 4),
            student=Student(family="nac", nac=Nac(num_classes=200)),
            student_depths=(1,) * 10,
        ),
        meta=META,
        teacher=Teacher(source="incubated", incubation=INCUBATED, phase=TUNED),
        pairs=PAIRS,
        finetune=end_to_end,
        suites=("tiny-imagenet", "tiny-imagenet-r"),
        baselines=("pure", "incubation"),
        placement=on_gpus(micro_batch=64),
    )
