"""Stage `profile-<device>`: what a training step of every pair costs on a type of device, measured.

A few steps of each pair with random weights on random images: what a step costs does
not depend on what was learnt. They are the training's own steps, taken by its engine
on its objective, and its stopwatch tells the parts apart, because a cohort runs the
prefix once. Stochastic depth and clipping are left out. Reading and decoding are timed
by themselves on the training's own images, because they may go on beside the device.
The planner reads `profile.json`; nothing else does, so the stage decides no result.

B = images, K = classes
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Augmentation, Batches, FeedConfig, find
from m2mkd_ray.errors import TrainingError
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.planning.devices import known_type, same_type
from m2mkd_ray.execution.reports import is_out_of_memory
from m2mkd_ray.execution.stage import Metrics
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.training import (
    ModuleDistillation,
    Precision,
    Prefix,
    TeacherHybrid,
    TorchEngine,
    TrainConfig,
    TrainPlacement,
    seeded,
)
from m2mkd_ray.training.counters import Stopwatch, peak_memory_gb
from m2mkd_ray.training.engine import local_device

logger = logging.getLogger(__name__)

PROFILE = "profile.json"
VERSION = 2
"""Of the stage. 2: steps are the training's own."""
_LR = 1e-4


class ProfileConfig(BaseModel, frozen=True, extra="forbid"):
    """What is measured, and on what: all that decides what a step costs, and no more, so that trials share it."""

    blueprint: Blueprint
    module: Literal["student", "teacher"] = "student"
    """Whose modules are trained: those of pairs, or the teacher's own (incubation)."""
    with_teacher: bool
    """Whether a step runs the teacher (alpha above 0)."""
    precision: Precision
    dataset: str
    split: str
    """What is read and decoded."""
    batch_size: int = Field(gt=0)
    lanes: int = Field(gt=0)
    augmentation: Augmentation
    cpus: float
    """Cores that the training has, of which a step on a CPU takes so many threads."""
    micro_batch: int | None = Field(None, gt=0)
    """Most images at a time on a device; None: the whole batch."""
    compile: bool = False
    """Whether the training compiles its blocks."""
    device: str
    """Type of device, as the cluster calls it (H100, cpu)."""
    steps: int = Field(5, gt=0)
    """Steps that are timed, after one that is not; the median counts."""

    @property
    def rows(self) -> int:
        """Images of a step that is timed. What an optimizer step costs is counted once for these."""
        return min(self.batch_size, self.micro_batch or self.batch_size)

    @property
    def feed(self) -> FeedConfig:
        """Batches that cost what the training's do."""
        return FeedConfig(
            dataset=self.dataset,
            split=self.split,
            batch_size=self.batch_size,
            lanes=self.lanes,
            img_size=self.blueprint.teacher.img_size,
            augmentation=self.augmentation,
        )


class PairProfile(BaseModel, frozen=True, extra="forbid"):
    """What one image costs a pair's training step. Seconds, on one device, decoding apart."""

    seconds: float
    """All of it: forward, backward, and its part of the optimizer's step."""
    prefix: float
    """The meta modules before the pair, forward: what a cohort shares."""
    teacher: float
    """The teacher module and the meta modules after it, forward."""
    student: float
    """The student module, forward and backward, and the optimizer."""
    suffix: float
    """The meta modules after the student and the loss, forward and backward."""
    memory_gb: float
    """Most memory that was held on the device; on a CPU, of the process so far."""
    occupancy: float
    """Share of the time in which the device was at work, 0 to 1; 1 on a CPU."""


class Profile(BaseModel, frozen=True, extra="forbid"):
    """What `profile.json` holds."""

    device: str
    name: str
    """What the device calls itself."""
    decode: float
    """Seconds of one CPU core to read, decode and augment an image."""
    pairs: list[PairProfile | None]
    """None: the device's memory was too small for a step."""


def run(config: ProfileConfig, context: StageContext) -> Metrics:
    """Reads `data`; writes `profile.json`.

    Raises:
        TrainingError: the worker's device is of another type than the profile is of.
    """
    assert isinstance(context.placement, TrainPlacement)
    device = local_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if known_type(config.device) is not None and not same_type(config.device, name):
        raise TrainingError(
            f"Measuring costs on {config.device}: the worker's device is {name}. Let the planner place the profile "
            f"(--placement auto), or choose a node of that type for it."
        )
    decode = _decode_s(config, context.placement)
    pairs: list[PairProfile | None] = []
    for index in range(config.blueprint.num_modules):
        pairs.append(measured_if_it_fits(config, index))
        speed = {} if pairs[-1] is None else {"images_per_s": 1 / pairs[-1].seconds}
        context.report(index + 1, config.blueprint.num_modules, speed)
    profile = Profile(device=config.device, name=name, decode=decode, pairs=pairs)
    (context.out / PROFILE).write_text(json.dumps(profile.model_dump(), indent=1))
    seconds = [pair.seconds for pair in pairs if pair is not None]
    speeds = {"images_per_s": 1 / statistics.fmean(seconds)} if seconds else {}
    return {**speeds, "decode_s": decode, "device": name, "too_large": pairs.count(None)}


def measured_if_it_fits(config: ProfileConfig, index: int) -> PairProfile | None:
    """What `measure` finds; None where a step needs more memory than the device has."""
    try:
        return measure(config, index)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("Pair %d needs more memory than %s has: %s", index, config.device, error)
    return None  # here, where the error holds its step's tensors no more


def measure(config: ProfileConfig, index: int) -> PairProfile:
    """Time steps of a pair on this process's device, by the training's own engine and stopwatch."""
    rows, blueprint, device = config.rows, config.blueprint, local_device()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    size, classes = blueprint.teacher.img_size, blueprint.teacher.num_classes
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, size, size, generator=generator).to(device)  # (B, 3, H, W)
    labels = torch.randint(classes, (rows,), generator=generator)
    targets = nn.functional.one_hot(labels, classes).float().to(device)  # (B, K)
    engine = engine_of(config, index)
    objective = engine.objective

    def step() -> None:
        engine.begin(_LR, is_logged=False)
        engine.accumulate(images, targets, weight=1.0, is_last=True)
        for part in objective.frozen:
            part.forget()
        engine.update()

    total, parts = _median(step, objective.stopwatch, config.steps, device)
    return PairProfile(
        seconds=total / rows,
        prefix=parts["prefix"] / rows if index else 0.0,
        teacher=parts["teacher"] / rows if config.with_teacher else 0.0,
        student=parts["student"] / rows,
        suffix=parts["suffix"] / rows,
        memory_gb=peak_memory_gb(device),
        occupancy=_occupancy(step, device),
    )


def engine_of(config: ProfileConfig, index: int) -> TorchEngine:
    """The engine of a pair with random weights, put together as its training is (`stages/pair.py`, `trainee`)."""
    blueprint = config.blueprint
    with seeded(0, "profile", index):
        *meta, last = split(create_vit(blueprint.meta), (1,) * blueprint.num_modules)
        teachers = split(create_vit(blueprint.teacher), blueprint.teacher_depths)
        if config.module == "teacher":
            student: nn.Module = teachers[index]
        else:
            student = family(blueprint.student.family).modules(blueprint)[index]
    prefix = Prefix([*meta, class_token_alone(last)])
    teacher = TeacherHybrid(prefix, index, class_token_alone(teachers[index].eval())) if config.with_teacher else None
    alpha = 0.5 if teacher is not None else 0.0
    objective = ModuleDistillation(prefix, index, class_token_alone(student), teacher, alpha=alpha)
    train = TrainConfig(epochs=1, lr=_LR, precision=config.precision)
    return TorchEngine(objective, train, compile=config.compile)


def _median(
    step: Callable[[], None], watch: Stopwatch, steps: int, device: torch.device
) -> tuple[float, Mapping[str, float]]:
    """Seconds of the median step and of its parts, the first step not counted."""
    step()
    watch.take()
    taken = []
    for _ in range(steps):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        seconds = time.perf_counter() - start
        parts, _ = watch.take()
        taken.append((seconds, parts))
    return sorted(taken, key=lambda each: each[0])[steps // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _occupancy(step: Callable[[], None], device: torch.device) -> float:
    """Share of a step's time in which kernels ran; what they left of the device's cores is not counted as free."""
    if device.type != "cuda":
        return 1.0
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    taken = time.perf_counter() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        _wait(device)
    kernels = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return min(1.0, max(0.01, kernels / taken))


def _decode_s(config: ProfileConfig, placement: TrainPlacement) -> float:
    """Median seconds an image of making training batches in this process."""
    batches = Batches(config.feed, find(config.feed.dataset, placement.data_root))
    taken = []
    for step in range(min(config.steps, 3) + 1):
        start = time.perf_counter()
        batches[step]
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / config.feed.batch_size
