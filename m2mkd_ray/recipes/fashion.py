"""Fashion-MNIST by the protocol for CPUs of docs/method.md."""

from m2mkd_ray.data import Augmentation
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.recipes.demo import demo


def fashion() -> Recipe:
    """The demo's models on all 60,000 images, with epochs in the reference's proportions.

    Command: `m2mkd data import fashion-mnist --source FOLDER`, then `m2mkd run fashion`.
    Cost: hours on two CPU cores. Controls: pure with the same epochs, pure with the
    same computation, and pairs without a teacher.
    """
    base = demo()
    small, incubation = base.data.augmentation, base.teacher.incubation
    assert incubation is not None
    return base.model_copy(
        update={
            "name": "fashion",
            "data": base.data.model_copy(
                update={
                    "dataset": "fashion-mnist",
                    "validation": base.data.validation.model_copy(update={"split": "test", "max_rows": 2000}),
                    "augmentation": Augmentation(**{**small.model_dump(), "random_erasing": 0.1}),
                }
            ),
            "meta": base.meta.model_copy(update={"epochs": 30, "warmup_epochs": 6}),
            "teacher": base.teacher.model_copy(
                update={
                    "incubation": incubation.model_copy(update={"epochs": 10, "warmup_epochs": 2}),
                    "phase": base.teacher.phase.model_copy(update={"epochs": 10}),
                }
            ),
            "pairs": base.pairs.model_copy(update={"epochs": 10, "warmup_epochs": 2}),
            "finetune": base.finetune.model_copy(update={"epochs": 10, "validate_every_epochs": 1}),
            "suites": ("fashion", "fashion-corrupted"),
            "baselines": ("pure", "pure_matched", "incubation"),
            "placement": base.placement.model_copy(update={"data_root": "data"}),
        }
    )
