"""Checks of a recipe before anything expensive, each in sentences, all of them at once.

What a frozen model can check alone it has checked already (`recipe.py`, `blueprint.py`);
here the recipe meets the data sets on disk, the ViTs that timm can build, and the
machines. Models are built on the meta device, so that nothing is computed.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from timm.models import get_pretrained_cfg

from m2mkd_ray.blueprint import Blueprint, Vit
from m2mkd_ray.data import Augmentation, DatasetFolder, find, undrawable
from m2mkd_ray.data.lanes import balanced
from m2mkd_ray.data.parts import parts_problems
from m2mkd_ray.errors import DataError, M2mkdError
from m2mkd_ray.evaluation import class_columns, find_suite
from m2mkd_ray.execution import Stage
from m2mkd_ray.execution.feasibility import Node, in_ray, is_in_group, lack, misfits
from m2mkd_ray.execution.planning.devices import type_name
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.models.moe import Experts
from m2mkd_ray.recipe import Phase, Recipe
from m2mkd_ray.stages.finetune import FinetunePlacement
from m2mkd_ray.stages.group import Group
from m2mkd_ray.stages.incubate import IncubatePlacement
from m2mkd_ray.training.engine import deepspeed_config


def problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe here, whatever the machines; empty if it can run."""
    checks: tuple[Callable[[Recipe], Iterator[str]], ...] = (
        _of_data,
        _of_suites,
        _of_models,
        _of_experts,
        _of_settings,
        _of_preprocessing,
        _of_augmentation,
    )
    return [problem for check in checks for problem in check(recipe)]


def warnings(recipe: Recipe) -> list[str]:
    """What may be wrong with a recipe and cannot be known, whatever the machines."""
    weights, other = recipe.teacher.weights, _other_normalisation(recipe)
    if weights in (None, "timm") or other is None:
        return []
    return [f"{other} Do so if {weights} comes from there; if not, set what it was trained with."]


def phases(recipe: Recipe) -> dict[str, Phase]:
    """The trainings that a run of the recipe does, by their place in it."""
    tuned = {"finetune": recipe.finetune}
    if recipe.start == "scratch":
        return tuned
    incubation = {"teacher.incubation": recipe.teacher.incubation} if recipe.teacher.incubation else {}
    return {"meta": recipe.meta, **incubation, "teacher.phase": recipe.teacher.phase, "pairs": recipe.pairs, **tuned}


# Data


def _of_data(recipe: Recipe) -> Iterator[str]:
    source, blueprint = recipe.data, recipe.blueprint
    try:
        folder = find(source.dataset, recipe.placement.data_root)
    except DataError as error:
        yield str(error)
        return
    wrong = {}
    for name in (source.split, source.validation.split):
        try:
            folder.part(name)
        except DataError as error:
            wrong[name] = str(error)
    yield from wrong.values()
    if folder.index.num_classes != blueprint.teacher.num_classes:
        of_student = "vit" if blueprint.student.nac is None else "nac"
        yield (
            f"Data set {source.dataset!r} has {folder.index.num_classes} classes, but the blueprint's num_classes is "
            f"{blueprint.teacher.num_classes}. Set blueprint.teacher.num_classes and "
            f"blueprint.student.{of_student}.num_classes to {folder.index.num_classes}."
        )
    if source.split not in wrong:
        yield from _of_rows(recipe, folder)
    if not wrong:
        yield from parts_problems(folder, source.split, source.validation.split)


def _of_rows(recipe: Recipe, folder: DatasetFolder) -> Iterator[str]:
    source = recipe.data
    groups = row_groups(folder, source.split, source.max_rows)
    rows = sum(groups)
    if len(groups) < source.lanes:
        yield (
            f"data.lanes {source.lanes} is more than the {len(groups)} row groups that split {source.split!r} of "
            f"{source.dataset!r} has. Set data.lanes lower, or import the data set with smaller row groups "
            f"(--rows-per-group)."
        )
    for name, phase in phases(recipe).items():
        if phase.batch_size > rows:
            yield (
                f"{name}.batch_size {phase.batch_size} is more than the {rows} rows that are trained on. Lower it"
                + (" or raise data.max_rows." if source.max_rows else ".")
            )


def row_groups(folder: DatasetFolder, split: str, max_rows: int | None) -> list[int]:
    """Rows that are used of every row group that has any."""
    sizes = [len(group) for group in folder.rows(split).row_groups]
    if max_rows is None or max_rows >= sum(sizes):
        return sizes
    used = balanced(folder.rows(split).labels, max_rows, seed=0)
    counts = np.histogram(used, bins=np.cumsum([0, *sizes]))[0].tolist()
    return [count for count in counts if count]


def _of_suites(recipe: Recipe) -> Iterator[str]:
    root = recipe.placement.data_root
    for name in recipe.suites:
        try:
            suite = find_suite(name)
            folder = find(suite.dataset, root)
            rows = folder.split(suite.split).rows_per_class
        except M2mkdError as error:
            if not _is_told_already(name, recipe):
                yield f"Suite {name!r}: {error}"
            continue
        try:
            trained_on = find(recipe.data.dataset, root).index
        except DataError:
            continue  # told by `_of_data`
        try:
            of_model, of_suite = ([entry.id for entry in index.classes] for index in (trained_on, folder.index))
            class_columns(name, of_model, of_suite, [count > 0 for count in rows])
        except DataError as error:
            yield str(error)


def _is_told_already(suite: str, recipe: Recipe) -> bool:
    """Whether the suite's data set is the one that is trained on, and is not there at all."""
    dataset = find_suite(suite).dataset
    try:
        find(dataset, recipe.placement.data_root)
    except DataError:
        return dataset == recipe.data.dataset
    return False


# Models


def _of_models(recipe: Recipe) -> Iterator[str]:
    blueprint = recipe.blueprint
    yield from _tried("the teacher", partial(_build_and_cut, blueprint.teacher, blueprint.teacher_depths))
    yield from _tried("the student", partial(_build_student, blueprint, recipe.keep_stitches))


def _tried(what: str, build: Callable[[], object]) -> Iterator[str]:
    try:
        with torch.device("meta"):
            build()
    except (M2mkdError, ValueError) as error:
        yield f"Cannot build {what}: {error}"


def _build_and_cut(vit: Vit, depths: Sequence[int]) -> None:
    split(create_vit(vit), depths)


def _build_student(blueprint: Blueprint, keep_stitches: bool) -> None:
    of_family = family(blueprint.student.family)
    of_family.model(blueprint, keep_stitches=keep_stitches)
    of_family.modules(blueprint)


def _of_experts(recipe: Recipe) -> Iterator[str]:
    """Widths that `grouped_mm` refuses: it wants rows of whole 16 bytes."""
    try:
        with torch.device("meta"):
            student = family(recipe.blueprint.student.family).model(recipe.blueprint)
    except (M2mkdError, ValueError):
        return  # told by `_of_models`
    widths = {size for part in student.modules() if isinstance(part, Experts) for size in part.w1.shape[1:]}
    by_precision: dict[str, list[str]] = {}
    for name, phase in phases(recipe).items():
        if name in ("pairs", "finetune"):
            by_precision.setdefault(phase.precision, []).append(name)
    for precision, names in by_precision.items():
        step = {"fp32": 4, "bf16": 8, "bf16_pure": 8}[precision]
        if bad := sorted(width for width in widths if width % step):
            yield (
                f"The experts' width or hidden width is {' and '.join(map(str, bad))}, but in {precision}, the "
                f"precision of {' and '.join(names)}, both have to be multiples of {step} (16 bytes). Set "
                f"blueprint.student.vit.width, or its mlp_ratio, so that they are"
                + (", or use fp32, which wants multiples of 4." if precision != "fp32" else ".")
            )


# Settings


def _of_settings(recipe: Recipe) -> Iterator[str]:
    weights = recipe.teacher.weights
    if weights not in (None, "timm") and not Path(str(weights)).is_file():
        yield f"teacher.weights: there is no file {weights}. Give a .safetensors, .pth or .pt file, or `timm`."
    placement = recipe.placement.finetune
    if placement.engine == "deepspeed" and recipe.finetune.batch_size % placement.num_workers == 0:
        rows = recipe.finetune.batch_size // placement.num_workers
        try:
            deepspeed_config(
                recipe.finetune.train,
                placement.deepspeed,
                rows=rows,
                world=placement.num_workers,
                micro_batch=placement.micro_batch,
            )
        except ValueError as error:
            yield f"placement.finetune.micro_batch: {error}"


# Preprocessing


def _of_preprocessing(recipe: Recipe) -> Iterator[str]:
    """Every phase has to see images as the evaluation and the export will."""
    shown = _preprocessing(recipe.data.augmentation)
    for name, phase in phases(recipe).items():
        of_phase = _preprocessing(phase.augmentation or recipe.data.augmentation)
        differ = [setting for setting in shown if of_phase[setting] != shown[setting]]
        if differ:
            yield (
                f"{name}.augmentation has "
                + ", ".join(f"{setting} {of_phase[setting]}" for setting in differ)
                + ", but evaluation and export read images by data.augmentation with "
                + ", ".join(f"{setting} {shown[setting]}" for setting in differ)
                + f". Set {' and '.join(differ)} to the same in both."
            )
    if recipe.teacher.weights == "timm" and (other := _other_normalisation(recipe)) is not None:
        yield other


def _of_augmentation(recipe: Recipe) -> Iterator[str]:
    """What a device is to augment, but cannot."""
    placement = recipe.placement
    of = {"pairs": placement.pairs, "teacher.incubation": placement.pairs, "finetune": placement.finetune}
    for name, phase in phases(recipe).items():
        if of.get(name, placement.models).augment_on_device:
            problem = undrawable(phase.augmentation or recipe.data.augmentation)
            if problem is not None:
                yield f"{name}: {problem}"


def _preprocessing(augmentation: Augmentation) -> dict[str, object]:
    names = ("mean", "std", "interpolation")
    return {name: getattr(augmentation, name) for name in names} | {"crop_pct": augmentation.eval_crop}


def _other_normalisation(recipe: Recipe) -> str | None:
    """A sentence if timm's weights of the teacher's name were trained on images of another mean or deviation."""
    if recipe.start == "scratch" or recipe.teacher.source != "pretrained":
        return None
    name, ours = recipe.blueprint.teacher.name, recipe.data.augmentation
    theirs = get_pretrained_cfg(name)
    if theirs is None or (tuple(theirs.mean), tuple(theirs.std)) == (ours.mean, ours.std):
        return None
    mean, std = list(theirs.mean), list(theirs.std)
    return (
        f"timm's weights of {name} were trained on images with mean {mean} and std {std}, but data.augmentation has "
        f"mean {list(ours.mean)} and std {list(ours.std)}. Set data.augmentation.mean={mean} and "
        f"data.augmentation.std={std}."
    )


# Machines


def this_machine(num_cpus: int | None) -> Node:
    """What a Ray of our own on this machine has."""
    cpus = num_cpus if num_cpus is not None else available_cpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = torch.cuda.device_count()
    labels = {}
    if gpus:
        labels["ray.io/accelerator-type"] = type_name(torch.cuda.get_device_name())
        labels["gpu-memory-gb"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.3g}"
    resources = {"CPU": float(cpus), "GPU": float(gpus), "memory": float(memory)}
    return Node(socket.gethostname(), resources, labels=labels)


def available_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def capacity_problems(plan: Sequence[Stage], nodes: Sequence[Node]) -> list[str]:
    """Stages, and ranks of a fine-tuning, that these nodes cannot hold."""
    return misfits(plan, nodes) + rank_problems(plan, nodes)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a stage, and the settings that they come from."""

    group: Group
    number: str
    """The setting that says how many."""
    none: str
    """The setting with which there are none."""


def ranks_of(stage: Stage) -> Ranks | None:
    """The ranks that a stage starts through Ray Train; None: it starts none."""
    placement = stage.placement
    if isinstance(placement, FinetunePlacement) and placement.group is not None:
        return Ranks(placement.group, "placement.finetune.num_workers", "placement.finetune.engine=torch")
    if isinstance(placement, IncubatePlacement) and placement.group is not None:
        return Ranks(placement.group, "placement.pairs.ranks", "placement.pairs.ranks=1")
    return None


def holds(stage: Stage) -> tuple[Resources, ...]:
    """All that a stage holds while it runs, a bundle a process: its worker's, and those of its ranks."""
    group = ranks.group if (ranks := ranks_of(stage)) is not None else None
    return (stage.resources,) if group is None else (stage.resources, *[group.each] * group.num_ranks)


def rank_problems(plan: Sequence[Stage], nodes: Sequence[Node]) -> list[str]:
    """Ranks that these nodes cannot hold; a stage with ranks asks itself only for what drives them."""
    ranked = {(ranks, stage.resources): stage for stage in plan if (ranks := ranks_of(stage)) is not None}
    problems = (_too_many_ranks(stage, ranks, nodes) for (ranks, _), stage in ranked.items())
    return [problem for problem in problems if problem]


def _too_many_ranks(stage: Stage, ranks: Ranks, nodes: Sequence[Node]) -> str | None:
    group = ranks.group
    wanted = in_ray(group.each)
    driver = {"CPU": stage.resources.cpus, "GPU": stage.resources.gpus}
    rooms = [
        sum(room(other, wanted, driver if other is node else {}) for other in nodes if is_in_group(other, group.each))
        for node in nodes
        if all(node.resources.get(name, 0.0) >= amount for name, amount in driver.items())
    ]
    if not rooms or (most := max(rooms)) >= group.num_ranks:
        return None  # a driver that no node can hold is a misfit of its stage
    if group.each.group and (text := lack(group.each, nodes)) is not None:
        return f"A rank of {stage.name} asks for {text}"
    each = " and ".join(f"{amount:g} {name}s" for name, amount in wanted.items())
    nodes = [node for node in nodes if is_in_group(node, group.each)]
    has = ", ".join(f"{sum(node.resources.get(name, 0.0) for node in nodes):g} {name}s" for name in wanted)
    held = " and ".join(f"{amount:g} {name}s" for name, amount in driver.items() if amount)
    return (
        f"{stage.name} asks for {group.num_ranks} ranks of {each} each, but there is room for {most} "
        f"({len(nodes)} nodes with {has} in all"
        + (f", of which its driver holds {held}). Lower placement.driver, " if held else "). Lower ")
        + f"{ranks.number} or what each rank gets, or, for a Ray of our own, raise --num-cpus."
    )


def room(node: Node, wanted: Mapping[str, float], taken: Mapping[str, float] = MappingProxyType({})) -> int:
    """Processes that a node can hold, beside what is taken of it; each has to want something."""
    return int(min((node.resources.get(name, 0.0) - taken.get(name, 0.0)) / each for name, each in wanted.items()))


def cluster_warnings(recipe: Recipe, nodes: Sequence[Node]) -> list[str]:
    """What may go wrong on several nodes, and cannot be known from here."""
    if len(nodes) < 2 or recipe.placement.data_root is None:
        return []
    return [
        f"There are {len(nodes)} nodes: the data sets in {recipe.placement.data_root} have to lie at that path on "
        f"every one of them (a shared file system, or copies)."
    ]
