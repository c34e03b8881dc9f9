"""Icons of a hundred things, with a true rendition shift: from monochrome icons to emoji."""

from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Data, Placement, Recipe
from m2mkd_ray.recipes.small import small_blueprint, small_phases
from m2mkd_ray.stages.parts import Validation


def icons() -> Recipe:
    """A ViT of 12 blocks on 8 x 8 patches of 8 pixels becomes a V-MoE of 8 blocks with 8 experts.

    Command: `m2mkd data import icon-domains --source FILE`, then `m2mkd run icons`.
    CPU hours or GPU minutes. Artists of the test icons are unseen; emoji and colour icons are
    the shifted suites, a stand-in for ImageNet-R.
    """
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
        blueprint=small_blueprint(img_size=64, patch_size=8, num_classes=100, student_width=128, student_heads=4),
        **small_phases(batch_size=128, epochs=30, validate_every_epochs=2),
        suites=("icons", "icons-emoji", "icons-uicolor"),
        baselines=("pure", "pure_matched", "incubation"),
        placement=Placement(data_root="data"),
    )
