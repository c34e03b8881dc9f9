"""Tiny-ImageNet at 64 pixels: the data set of the paper's claims, with a small V-MoE."""

from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Data, Placement, Recipe
from m2mkd_ray.recipes.small import small_blueprint, small_phases
from m2mkd_ray.stages.parts import Validation


def tiny_imagenet() -> Recipe:
    """A ViT of 12 blocks on 8 x 8 patches of 8 pixels becomes a V-MoE of 8 blocks with 8 experts.

    Command: `m2mkd data import tiny-imagenet --source FOLDER`, then `m2mkd run tiny_imagenet`.
    GPU minutes, or many CPU hours. The shifted suite is the corrupted validation set; for
    renditions import tiny-imagenet-r and add its suite: `--set suites=[tiny-imagenet,tiny-imagenet-r]`.
    """
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
        blueprint=small_blueprint(img_size=64, patch_size=8, num_classes=200, student_width=144, student_heads=3),
        **small_phases(batch_size=256, epochs=20, validate_every_epochs=1),
        suites=("tiny-imagenet", "tiny-imagenet-corrupted"),
        baselines=("pure", "pure_matched", "incubation"),
        placement=Placement(data_root="data"),
    )
