"""Recipes: everything that decides a run's result, as frozen data, with what decides where and how fast beside it.

A recipe is made by a Python function in `m2mkd_ray.recipes`, varied by a baseline
(`demo/pure`), by a YAML file that starts `from: demo`, and by `--set a.b=value`.
Stages get only the slices that they need (`m2mkd_ray.pipeline`).
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.data import Augmentation
from m2mkd_ray.data.logits import LogitsFormat
from m2mkd_ray.errors import UsageError
from m2mkd_ray.execution.stage import Resources
from m2mkd_ray.stages.finetune import FinetunePlacement
from m2mkd_ray.stages.incubate import DistillConfig, IncubatePlacement
from m2mkd_ray.stages.parts import Validation
from m2mkd_ray.training import Kind, Reduction, TrainConfig, TrainPlacement
from m2mkd_ray.yaml_files import read_mapping


class Data(BaseModel, frozen=True, extra="forbid"):
    """What is trained on."""

    dataset: str
    """A name in `m2mkd_ray.data.DATASETS`, or of any imported data set."""
    split: str = "train"
    """Or a part of one: with `train[5000:]` here, `train[:5000]` is free to choose settings on."""
    max_rows: int | None = Field(None, gt=0)
    """Only so many rows, as many of every class, the same ones for every seed; None takes all."""
    validation: Validation
    lanes: int = Field(1, gt=0)
    """Independent streams that make up a batch; every number of ranks used must divide it."""
    shuffle_window: int = Field(16, gt=0)
    """Row groups that are shuffled together."""
    augmentation: Augmentation


class Phase(TrainConfig, frozen=True, extra="forbid"):
    """One training of the recipe: how long and how fast, on which batches."""

    batch_size: int = Field(gt=0)
    """Images a step, over all ranks."""
    augmentation: Augmentation | None = None
    """None: the recipe's."""

    @property
    def train(self) -> TrainConfig:
        """The part that the training loop reads."""
        return TrainConfig(**self.model_dump(include=set(TrainConfig.model_fields)))


class Teacher(BaseModel, frozen=True, extra="forbid"):
    """Where the teacher comes from."""

    source: Literal["trained", "pretrained", "incubated"]
    """trained: end to end with labels. pretrained: `weights`, then tuned. incubated: module by module inside the
    meta model, put together and fine-tuned (Deep Incubation; the paper's)."""
    phase: Phase
    """The end-to-end training: all of it, the tuning, or the fine-tuning after incubation."""
    incubation: Phase | None = None
    """Of each module; only for `incubated`."""
    weights: str | None = None
    """`timm` for the entry point's weights, or a local file; only for `pretrained`."""
    tune: Literal["all", "head"] = "all"
    """What of a pretrained teacher learns."""

    @model_validator(mode="after")
    def _has_what_its_source_needs(self) -> "Teacher":
        if (self.source == "incubated") != (self.incubation is not None):
            raise ValueError("`incubation` is needed by source=incubated, and only by it")
        if (self.source == "pretrained") != (self.weights is not None):
            raise ValueError("`weights` is needed by source=pretrained, and only by it")
        if self.source != "pretrained" and self.tune != "all":
            raise ValueError(f"tune={self.tune} is for source=pretrained; this teacher is {self.source}")
        return self


class PairSettings(BaseModel, frozen=True, extra="forbid"):
    """What one pair has instead of what all pairs have; None: the same as all."""

    alpha: float | None = None
    temperature: float | None = None
    kind: Kind | None = None
    reduction: Reduction | None = None
    lr: float | None = None
    weight_decay: float | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The settings that differ, by name."""
        return self.model_dump(exclude_none=True)


class Pairs(Phase, frozen=True, extra="forbid"):
    """The module stage."""

    distill: DistillConfig = DistillConfig()
    of: Mapping[int, PairSettings] = Field({}, exclude_if=lambda of: not of)
    """Settings of single pairs, by index: the best temperature may differ by depth. Left out of dumps while empty, so
    that what is made from them (keys of reports and exports) stays as it was before there was this field."""
    views: int | None = Field(None, gt=0)
    """Views of each image, in turns: after so many epochs the same batches come again; None: a new one each epoch."""
    cache: LogitsFormat | None = None
    """Write the teacher's logits of all views down first, and read them while training: for many epochs, tries or
    trials. Exact ones (`{kind: float32}`) change no result; None: the teacher is run each time."""

    @model_validator(mode="after")
    def _a_cache_needs_views_that_come_again(self) -> "Pairs":
        if self.cache is not None and self.views is None:
            raise ValueError("`cache` keeps the logits of views that come again: set `views`, such as views=8")
        return self

    @model_validator(mode="after")
    def _single_pairs_fit(self) -> "Pairs":
        given = {index: settings for index, settings in self.of.items() if settings.given}
        object.__setattr__(self, "of", given)  # so that one that says nothing is equal to none
        problems = []
        for index in given:
            try:
                self.at(index)
            except ValidationError as error:
                problems += [
                    f"of.{index}.{problem['loc'][-1]}: {problem['msg']} (found {problem['input']!r})"
                    for problem in error.errors()
                ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def at(self, index: int) -> "Pairs":
        """What pair `index` is trained with: these settings with its own in their place.

        Raises:
            ValidationError: one of its own has a value that does not fit.
        """
        if index not in self.of:
            return self if not self.of else self.model_copy(update={"of": {}})
        given = self.of[index].given
        tree = self.model_dump(exclude={"of"})
        for name, value in given.items():
            (tree["distill"] if name in DistillConfig.model_fields else tree)[name] = value
        return Pairs.model_validate(tree)


class StagePlacement(TrainPlacement, frozen=True, extra="forbid"):
    """Where a training on one device runs."""

    resources: Resources = Resources()


class Placement(BaseModel, frozen=True, extra="forbid"):
    """Where and how fast; never changes a key."""

    data_root: str | None = None
    """Folder with imported data sets, reachable from every node; None: only what ships with the package."""
    models: StagePlacement = StagePlacement()
    """Training the meta model and the teacher."""
    pairs: IncubatePlacement = IncubatePlacement()
    """Training a module: a worker each, several in one (`cohort`), or several devices for one (`ranks`)."""
    finetune: FinetunePlacement = FinetunePlacement()
    """Training the whole student."""
    evaluation: StagePlacement = StagePlacement()
    """Each evaluation."""
    light: Resources = Resources(cpus=0.5)
    """Stages that move and check files."""
    driver: Resources = Resources(cpus=0)
    """What the fine-tuning's own worker holds while Ray Train's ranks do the work."""


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """A run of the whole flow."""

    name: str
    title: str
    seed: int = Field(0, ge=0)
    """Of weights, batches, dropout and corruptions; nothing else is random."""
    data: Data
    blueprint: Blueprint
    meta: Phase
    teacher: Teacher
    pairs: Pairs
    keep_stitches: bool = False
    """Leave the stitches between the modules of the whole student (the reference's first version)."""
    start: Literal["distilled", "scratch"] = "distilled"
    """What the whole student starts from; scratch leaves out teacher, meta model and pairs."""
    finetune: Phase
    suites: tuple[str, ...]
    """Names in `m2mkd_ray.evaluation.SUITES`; the first is the one that routing is shown on."""
    baselines: tuple[str, ...] = ()
    """Names in `m2mkd_ray.recipes.BASELINES` that the report sets beside this recipe."""
    placement: Placement = Placement()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        problems = []
        phases = {
            "meta": self.meta,
            "teacher.phase": self.teacher.phase,
            "pairs": self.pairs,
            "finetune": self.finetune,
        }
        if self.teacher.incubation is not None:
            phases["teacher.incubation"] = self.teacher.incubation
        lanes = self.data.lanes
        for name, phase in phases.items():
            if phase.batch_size % lanes:
                problems.append(f"{name}.batch_size {phase.batch_size} is not a multiple of data.lanes {lanes}")
            elif (phase.augmentation or self.data.augmentation).is_mixing and phase.batch_size // lanes % 2:
                problems.append(
                    f"{name}.batch_size {phase.batch_size} in data.lanes {lanes} gives {phase.batch_size // lanes} "
                    f"images each, an odd number, but mixup and cutmix mix pairs in a lane"
                )
        ranks = self.placement.finetune.num_workers
        if self.placement.finetune.engine == "deepspeed" and lanes % ranks:
            problems.append(f"placement.finetune.num_workers {ranks} does not divide data.lanes {lanes}")
        pairs = self.placement.pairs
        if lanes % pairs.ranks:
            problems.append(f"placement.pairs.ranks {pairs.ranks} does not divide data.lanes {lanes}")
        if pairs.ranks > 1 and pairs.cohort > 1:
            problems.append(
                f"placement.pairs has ranks {pairs.ranks} and cohort {pairs.cohort}: a pair has several devices, or "
                f"shares one, not both"
            )
        unknown = [index for index in self.pairs.of if index not in range(self.blueprint.num_modules)]
        if unknown:
            problems.append(
                f"pairs.of names pairs {unknown}, but there are pairs 0 to {self.blueprint.num_modules - 1}"
            )
        if not self.suites:
            problems.append("suites is empty: name at least one")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def distills(self) -> bool:
        """Whether a teacher teaches any pair."""
        return any(self.pairs.at(pair.index).distill.alpha > 0 for pair in self.blueprint.pairs)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with settings of the form `a.b=value` changed; values are YAML.

    Raises:
        UsageError: a setting is misspelt, not of the form, or has a value that does not fit; lists all of them.
    """
    changes, problems = [], []
    for setting in settings:
        try:
            changes.append(typed(setting))
        except UsageError as error:
            problems.append(str(error))
    return _changed(recipe, changes, recipe.name, problems)


def typed(setting: str) -> tuple[str, Any]:
    """A setting of the form `a.b=value` as (path, value), the value read as YAML.

    Raises:
        UsageError: it is not of the form, or the value is not YAML.
    """
    path, equals, value = setting.partition("=")
    if not equals:
        raise UsageError(f"{setting!r} is not of the form a.b=value")
    try:
        return path, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise UsageError(f"the value of {setting!r} is not YAML: {error}") from error


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values at dotted paths.

    Raises:
        UsageError: a path is misspelt or a value does not fit; lists all of them.
    """
    return _changed(recipe, list(changes.items()), recipe.name, [])


def merged(recipe: Recipe, changes: Mapping[str, Any], source: str) -> Recipe:
    """The recipe with the nested changes of a YAML file.

    Raises:
        UsageError: a setting is misspelt or has a value that does not fit; lists all of them.
    """
    return _changed(recipe, _leaves(changes, _tree(recipe)), source, [])


def read_yaml(file: Path) -> tuple[str, Mapping[str, Any]]:
    """A recipe file as (name of the recipe that it starts from, changes).

    Raises:
        UsageError: the file is missing, no YAML, or does not start `from:` a recipe.
    """
    content = read_mapping(file, "recipe file", "`from: NAME`, the recipe that it changes, and settings")
    if not isinstance(content.get("from"), str):
        raise UsageError(f"The recipe file {file} must start with `from: NAME`, the recipe that it changes.")
    return content["from"], {name: value for name, value in content.items() if name != "from"}


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML, every setting written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _validated(tree: Mapping[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(
            f"  - {'.'.join(str(part) for part in problem['loc']) or 'recipe'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            + (f" (found {problem['input']!r})" if not isinstance(problem["input"], dict | BaseModel) else "")
            for problem in error.errors()
        )
        raise UsageError(f"Recipe {source!r} does not fit together:\n{problems}") from error


def _changed(recipe: Recipe, changes: Sequence[tuple[str, Any]], source: str, problems: list[str]) -> Recipe:
    tree = _tree(recipe)
    for path, value in changes:
        try:
            _put(tree, path, value)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError(f"Cannot change recipe {source!r}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return _validated(tree, source)


def _tree(recipe: Recipe) -> dict[str, Any]:
    """All settings, those that dumps leave out and those of every single pair too, given or not."""
    tree: dict[str, Any] = _settings(recipe)
    tree["pairs"]["of"] = {
        str(pair.index): recipe.pairs.of.get(pair.index, PairSettings()).model_dump()
        for pair in recipe.blueprint.pairs
    }
    return tree


def _settings(value: Any) -> Any:
    if not isinstance(value, BaseModel):
        return value
    return {name: _settings(getattr(value, name)) for name in type(value).model_fields}


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        _require_known(name, tree, path)
        if tree[name] is None:
            raise UsageError(f"{path!r} lies below {name!r}, which is not set in this recipe; give all of {name!r}")
        if not isinstance(tree[name], dict):
            raise UsageError(f"{path!r} lies below {name!r}, which is a plain value ({tree[name]!r})")
        tree = tree[name]
    _require_known(last, tree, path)
    tree[last] = value


def _require_known(name: str, tree: Mapping[str, Any], path: str) -> None:
    if name not in tree:
        near = difflib.get_close_matches(name, tree, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(tree)}"
        raise UsageError(f"there is no setting {path!r}: {name!r} is unknown; {hint}")


def _leaves(changes: Mapping[str, Any], tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """The changes by dotted path, as deep as the recipe has settings below them."""
    leaves = []
    for name, value in changes.items():
        below = tree
        for part in str(name).split("."):
            below = below.get(part) if isinstance(below, Mapping) else None
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            leaves += _leaves(value, below, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves
