"""What the module stage of a sweep costs: as its trials share it, and as each would cost alone.

Shared: members of a cohort run the frozen meta model once up to the deepest pair, and
a pair's teacher once; batches are made once a worker. Alone: each does all of it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from m2mkd_ray.data import rows_of_an_epoch
from m2mkd_ray.data.pixels import SMALL
from m2mkd_ray.execution.stage import Stage
from m2mkd_ray.models.compute import step_cost, vit_block_macs
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.stages.incubate import IncubateConfig


@dataclass(frozen=True)
class Cost:
    """Of trainings of modules."""

    flops: float = 0.0
    """Floating-point operations of training steps; validation is not counted."""
    teacher_calls: float = 0.0
    """Images that go through a teacher."""
    decodes: float = 0.0
    """Images that are decoded."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def rows_of(recipe: Recipe) -> int:
    """Images of an epoch; 0 if the data set is not there."""
    source = recipe.data
    return rows_of_an_epoch(source.dataset, source.split, source.max_rows, recipe.placement.data_root) or 0


def images_of(stage: Stage, recipe: Recipe, epochs: float | None = None) -> float:
    """Images of all steps of a pair's training, or of so many epochs of it."""
    training = stage.config.training  # type: ignore[attr-defined]  # of a stage that trains
    batch, rows = training.feed.batch_size, rows_of(recipe)
    steps_per_epoch = max(1, rows // batch)
    steps = training.train.total_steps(steps_per_epoch)
    return float(batch * (steps if epochs is None else min(steps, round(epochs * steps_per_epoch)))) if rows else 0.0


def alone(stage: Stage, images: float, recipe: Recipe) -> Cost:
    """What so many images cost a pair's training that has a worker to itself."""
    return together([(stage, images)], recipe)


def together(members: Sequence[tuple[Stage, float]], recipe: Recipe) -> Cost:
    """What members of one cohort cost that train on so many images each; shared work goes on for the longest."""
    if not members:
        return Cost()
    flops, prefix, teachers = 0.0, 0.0, dict[int, tuple[float, float]]()
    block = 2 * vit_block_macs(recipe.blueprint.teacher)
    # Up to each depth, the meta model is run as long as a member needs it there.
    for depth in range(1, recipe.blueprint.num_modules):
        prefix += block * max((images for stage, images in members if _index(stage) >= depth), default=0.0)
    for stage, images in members:
        config = _config(stage)
        cost = step_cost(config.blueprint, config.blueprint.pairs[config.index])
        flops += 2 * (cost.student + cost.after) * images
        if config.distill.alpha > 0 and "logits" not in stage.reads:
            teachers[config.index] = max(teachers.get(config.index, (0.0, 0.0)), (images, 2 * cost.teacher))
    flops += prefix + sum(images * of_teacher for images, of_teacher in teachers.values())
    longest = max(images for _, images in members)
    return Cost(
        flops=flops,
        teacher_calls=sum(images for images, _ in teachers.values()),
        decodes=min(longest, rows_of(recipe)) if keeps_pixels(recipe) else longest,
    )


def keeps_pixels(recipe: Recipe) -> bool:
    """Whether a worker decodes every image once for all epochs (`m2mkd_ray.data.feed`)."""
    augmentation = recipe.pairs.augmentation or recipe.data.augmentation
    return augmentation.kind != "timm" and rows_of(recipe) * recipe.blueprint.teacher.img_size**2 * 3 <= SMALL


def seated(stages: Iterable[Stage], seats: int) -> list[list[Stage]]:
    """Cohorts as they are formed: mates, the trials of a pair beside each other, up to so many a worker."""
    by_mates: dict[str, list[Stage]] = {}
    for stage in {stage.address: stage for stage in stages}.values():
        by_mates.setdefault(stage.mates, []).append(stage)
    ordered = [sorted(mates, key=_index) for mates in by_mates.values()]
    return [mates[start : start + seats] for mates in ordered for start in range(0, len(mates), seats)]


def is_pair(stage: Stage) -> bool:
    """Whether a stage trains a student's module."""
    return isinstance(stage.config, IncubateConfig) and stage.config.module == "student"


def _config(stage: Stage) -> IncubateConfig:
    assert isinstance(stage.config, IncubateConfig)
    return stage.config


def _index(stage: Stage) -> int:
    return _config(stage).index
