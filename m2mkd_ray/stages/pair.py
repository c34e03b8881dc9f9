"""What a module's training is made of, in whatever process it runs: config, modules, objective, and a rank's part.

This is no stage; `incubate` is. A module is trained in one process, beside others in
a cohort, or on several ranks, and is the same training in each: it is put together
here.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import BaseModel, Field
from torch import nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data.logits import Logits
from m2mkd_ray.execution.context import Checkpoints, StageContext
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.models import create_vit, drop_path_rates, family, set_drop_path, splice, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.models.compute import step_cost, vit_block_macs
from m2mkd_ray.stages.group import Group, has_notice, tell_errors
from m2mkd_ray.stages.parts import (
    Trainee,
    Training,
    feed_of,
    load_meta,
    load_module,
    train_rank,
    validator,
)
from m2mkd_ray.training import (
    GIVEN,
    Kind,
    ModuleDistillation,
    Prefix,
    Reduction,
    StepFlops,
    TeacherHybrid,
    TrainPlacement,
    seeded,
)
from m2mkd_ray.training.engine import local_device

if TYPE_CHECKING:
    from ray.actor import ActorHandle


LOGITS = "logits.parquet"


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


class IncubatePlacement(TrainPlacement, frozen=True, extra="forbid"):
    """Where modules are trained, and how many share a device or have several."""

    resources: Resources = Resources()
    """Of a worker, or of each rank."""
    cohort: int = Field(1, gt=0)
    """Most modules that one worker trains together, on the same batches. Fewer batches are made and less of the meta
    model is run; each module has a smaller part of the device."""
    ranks: int = Field(1, gt=0)
    """Devices that train one module together, data parallel; divides `data.lanes`. Equal but for rounding."""
    max_failures: int = Field(3, ge=0)
    """How often Ray Train starts the ranks again from the last checkpoint."""
    start_timeout_s: float = Field(1800, gt=0)
    """How long to wait for the ranks' resources before trying again (a cluster may have to grow)."""

    @property
    def group(self) -> Group | None:
        """The ranks; None: there is one process."""
        if self.ranks == 1:
            return None
        own = self.resources
        return Group(self.ranks, own.cpus, own.gpus, self.max_failures, self.start_timeout_s, own.node_group)


@dataclass
class Frozen:
    """The meta model and the teacher's hybrids, each loaded once for all that train in a process."""

    blueprint: Blueprint
    context: StageContext
    hybrids: dict[int, TeacherHybrid] = field(default_factory=dict)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)
    """By index, what `teacher_top1` has found."""

    @cached_property
    def meta(self) -> list[nn.Module]:
        """The meta model's modules, first to last."""
        *meta, last = load_meta(self.blueprint, self.context.inputs["meta"])
        return [*meta, class_token_alone(last)]

    @cached_property
    def prefix(self) -> Prefix:
        """What all members run of the meta model, run once."""
        return Prefix(self.meta)

    def hybrid(self, index: int, context: StageContext) -> TeacherHybrid:
        """The teacher's hybrid of a pair, for all members of that pair."""
        if index not in self.hybrids:
            modules = split(create_vit(self.blueprint.teacher), self.blueprint.teacher_depths)
            teacher = load_module(modules[index], context.inputs["split"] / f"module-{index}.safetensors")
            self.hybrids[index] = TeacherHybrid(self.prefix, index, class_token_alone(teacher))
        return self.hybrids[index]


def trainee(config: IncubateConfig, context: StageContext, frozen: Frozen, rank: int = 0, world: int = 1) -> Trainee:
    """A module, ready to be trained in this process."""
    index, has_teacher = config.index, config.distill.alpha > 0
    cached = cached_logits(config, context, rank, world) if has_teacher else None
    if cached is not None:
        frozen.hybrids.pop(index, None)  # no device has to hold a teacher that is not run
    teacher = GIVEN if cached is not None else frozen.hybrid(index, context) if has_teacher else None
    student = class_token_alone(fresh_module(config))
    return Trainee(
        objective=ModuleDistillation(frozen.prefix, index, student, teacher, **config.distill.model_dump()),
        training=config.training,
        context=context,
        validated=splice(frozen.meta, index, student),
        teacher_logits=cached,
        flops_per_image=_flops(config),
    )


def _flops(config: IncubateConfig) -> StepFlops:
    """Of a step, per image; the teacher's count only where it is run."""
    cost = step_cost(config.blueprint, config.blueprint.pairs[config.index], module=config.module)
    of_meta_module = vit_block_macs(config.blueprint.teacher)
    return StepFlops(own=2 * (cost.student + cost.after), prefix=2 * of_meta_module, teacher=2 * cost.teacher)


def cached_logits(config: IncubateConfig, context: StageContext, rank: int, world: int) -> Logits | None:
    """The teacher hybrid's logits of this rank's batches, from the artifact `logits`; None without one."""
    if "logits" not in context.inputs:
        return None
    teacher = context.input_manifests["split"]["key"]
    return Logits(context.inputs["logits"] / LOGITS, config.training.feed, teacher=teacher, rank=rank, world=world)


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


def teacher_top1(config: IncubateConfig, context: StageContext, frozen: Frozen) -> dict[str, float]:
    """Accuracy of the teacher's hybrid: fine-tuned modules may have left the meta model's feature space.

    Measured once for all members of a pair, before they train. Nothing where no teacher teaches.
    """
    if config.distill.alpha == 0:
        return {}
    if config.index not in frozen.measured:
        device, placement = local_device(), cast(TrainPlacement, context.placement)
        hybrid = splice(frozen.meta, config.index, frozen.hybrid(config.index, context).teacher)
        validate = validator(hybrid.to(device), config.training, placement, device)
        frozen.measured[config.index] = {"teacher_hybrid_top1": validate()["val_top1"]}
    return frozen.measured[config.index]


@dataclass(frozen=True)
class Onlooker:
    """The session of a rank that is not the first: it takes up what the first one kept, and keeps and says nothing."""

    context: StageContext

    @property
    def checkpoints(self) -> "Onlooker":
        """This session is its own."""
        return self

    def latest(self) -> tuple[int, Path] | None:
        """The newest checkpoint of the first rank."""
        return self.context.checkpoints.latest()

    def scratch(self) -> Path:
        """See `Checkpoints`."""
        return self.context.checkpoints.scratch()

    def save(self, step: int, files: Path) -> None:
        """Drop the folder, which is empty: the first rank's has everything."""
        shutil.rmtree(files)

    def has_notice(self) -> bool:
        """See `Session`."""
        return has_notice()

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Speaker:
    """The session of the first rank: it keeps and says what the stage itself would."""

    context: StageContext

    @property
    def checkpoints(self) -> Checkpoints:
        """The stage's."""
        return self.context.checkpoints

    def has_notice(self) -> bool:
        """See `Session`."""
        return has_notice()

    def report(
        self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """Say it for the stage."""
        self.context.report(step, total_steps, metrics, landmarks)


@dataclass(frozen=True)
class PairJob:
    """What every rank of a pair is given."""

    config: IncubateConfig
    elsewhere: Callable[[], StageContext]
    """The stage's context, in whatever process it is called."""
    relay: "ActorHandle"


def train_pair_on_this_rank(arguments: dict[str, Any]) -> None:
    """Train to the end as one of several ranks; rank 0 leaves the trained state as the stage's newest checkpoint."""
    job = cast(PairJob, arguments["job"])
    tell_errors(job.relay, lambda: _train_rank(job))


def _train_rank(job: PairJob) -> None:
    import ray.train
    import ray.train.torch

    context = job.elsewhere()
    placement = cast(IncubatePlacement, context.placement)
    torch.set_num_threads(max(1, round(placement.resources.cpus)))
    if torch.cuda.is_available():
        # Before anything is put on a device: ranks see all GPUs of their node, and the first is the current one.
        torch.cuda.set_device(ray.train.torch.get_device())
    of_train = ray.train.get_context()
    rank, world = of_train.get_world_rank(), of_train.get_world_size()
    frozen = Frozen(job.config.blueprint, context)
    measured = teacher_top1(job.config, context, frozen) if rank == 0 else {}
    one = trainee(job.config, context, frozen, rank, world)
    one = replace(one, session=Onlooker(context) if rank else Speaker(context))
    feed = feed_of(job.config.training.feed, context, rank, world)
    train_rank(one, feed, measured)
