"""Stages `pair-i` and `incubate-i`: train one module inside the frozen meta model.

A pair trains a student module, stitches included, against its teacher module
(m2mKD, arXiv 2402.16918). Incubation trains the teacher's own module with labels
alone (Deep Incubation, arXiv 2212.04129): the same stage with `alpha=0`.
"""

from typing import Literal

from pydantic import BaseModel, Field
from torch import nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import create_vit, drop_path_rates, family, set_drop_path, splice, split
from m2mkd_ray.stages.parts import MODULE, Training, load_meta, load_module, save_weights, train_here, validator
from m2mkd_ray.training import Kind, ModuleDistillation, Reduction, TrainPlacement, seeded
from m2mkd_ray.training.engine import local_device


class DistillConfig(BaseModel, frozen=True, extra="forbid"):
    """The loss of a pair: (1 - alpha) CE + alpha KD (see `m2mkd_ray.training.ModuleDistillation`)."""

    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher's term; 0 needs no teacher: module incubation."""
    temperature: float = Field(1.0, gt=0)
    kind: Kind = "soft"
    reduction: Reduction = "numel"
    """What the soft term is divided by: numel (B * K, the reference's) or batchmean (B)."""


class IncubateConfig(BaseModel, frozen=True, extra="forbid"):
    """One module, and how it is trained."""

    blueprint: Blueprint
    index: int
    module: Literal["student", "teacher"]
    """Whose module is trained."""
    distill: DistillConfig
    training: Training


def run(config: IncubateConfig, context: StageContext) -> Metrics:
    """Reads `data`, `meta` and, unless alpha is 0, `split`; writes `module.safetensors` and `history.json`."""
    index = config.index
    meta = load_meta(config.blueprint, context.inputs["meta"])
    teacher = _teacher_module(config, context) if config.distill.alpha > 0 else None
    student = fresh_module(config)
    metrics = _accuracy_of_teacher(config, context, meta, teacher)
    objective = ModuleDistillation(meta, index, student, teacher, **config.distill.model_dump())
    trained = train_here(objective, config.training, context, validated=splice(meta, index, student))
    save_weights(student, context.out / MODULE)
    return {**metrics, **trained}


def fresh_module(config: IncubateConfig) -> nn.Module:
    """The module to be trained, with random weights that follow from seed and place, and its stochastic depth."""
    blueprint, drop_path = config.blueprint, config.training.train.drop_path
    with seeded(config.training.seed, config.module, config.index):
        if config.module == "teacher":
            module = split(create_vit(blueprint.teacher), blueprint.teacher_depths)[config.index]
            set_drop_path(module, _rates_in_hybrid(blueprint, config.index, drop_path))
            return module
        return family(blueprint.student.family).modules(blueprint, drop_path=drop_path)[config.index]


def _rates_in_hybrid(blueprint: Blueprint, index: int, drop_path: float) -> list[float]:
    """Linear over all blocks of the hybrid, of which the frozen ones drop nothing here (docs/method.md)."""
    depth = blueprint.teacher_depths[index]
    return drop_path_rates(drop_path, blueprint.num_modules - 1 + depth)[index : index + depth]


def _teacher_module(config: IncubateConfig, context: StageContext) -> nn.Module:
    modules = split(create_vit(config.blueprint.teacher), config.blueprint.teacher_depths)
    return load_module(modules[config.index], context.inputs["split"] / f"module-{config.index}.safetensors")


def _accuracy_of_teacher(
    config: IncubateConfig, context: StageContext, meta: list[nn.Module], teacher: nn.Module | None
) -> dict[str, float]:
    """Top-1 of the teacher's hybrid: fine-tuned modules may have left the meta model's feature space."""
    if teacher is None:
        return {}
    assert isinstance(context.placement, TrainPlacement)
    hybrid, device = splice(meta, config.index, teacher), local_device()
    validate = validator(hybrid.to(device), config.training, context.placement, device)
    return {"teacher_hybrid_top1": validate()["val_top1"]}
