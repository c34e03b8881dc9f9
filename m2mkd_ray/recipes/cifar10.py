"""CIFAR-10 at 32 pixels: GPU minutes or CPU hours."""

from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Data, Placement, Recipe
from m2mkd_ray.recipes.small import small_blueprint, small_phases
from m2mkd_ray.stages.parts import Validation


def cifar10() -> Recipe:
    """A ViT of 12 blocks on 8 x 8 patches of 4 pixels becomes a V-MoE of 8 blocks with 8 experts.

    Command: `m2mkd data import cifar10 --source FOLDER`, then `m2mkd run cifar10`.
    On GPUs add `--set placement.pairs.resources.gpus=0.25` and the like. Epochs are in
    the reference's proportions, warm-up is a fifth of a phase (docs/method.md).
    """
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
        blueprint=small_blueprint(img_size=32, patch_size=4, num_classes=10, student_width=128, student_heads=4),
        **small_phases(batch_size=128, epochs=20, validate_every_epochs=1),
        suites=("cifar10", "cifar10-corrupted"),
        baselines=("pure", "pure_matched", "incubation"),
        placement=Placement(data_root="data"),
    )
