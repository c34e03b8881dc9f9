"""From a recipe to a stage: which of its settings decide the stage's result.

One function a kind of stage. What is left out here cannot change the result, so
changing it runs nothing again; what decides only where and how fast goes into
resources and placement.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from m2mkd_ray.blueprint import Blueprint, Student
from m2mkd_ray.data import FeedConfig, find, rows_of_an_epoch
from m2mkd_ray.data.logits import LogitsFormat
from m2mkd_ray.data.parts import whole
from m2mkd_ray.data.shards import sha256
from m2mkd_ray.errors import DataError, UsageError
from m2mkd_ray.evaluation import Suite, find_suite
from m2mkd_ray.execution.stage import Spread, Stage
from m2mkd_ray.models import FAMILIES
from m2mkd_ray.models.compute import hybrid_flops, pair_flops
from m2mkd_ray.recipe import Pairs, Phase, Recipe
from m2mkd_ray.stages import assemble, data, evaluate, export, finetune, incubate, logits, report, split, vit
from m2mkd_ray.stages.incubate import DistillConfig
from m2mkd_ray.stages.parts import Training

TRAINED = 2
"""Version of the stages that train, and of those that look at mixtures. 2: AdamW is fused on CPUs, each micro-batch
has its own seed, the block before a head is computed for the class token, experts are run one by one on a CPU."""
INCUBATED = 3
"""Version of the stages that run modules in the meta model. 3: that block makes no keys and values of all tokens."""


def training(recipe: Recipe, phase: Phase) -> Training:
    """What decides a training, but for what is trained."""
    return Training(feed=feed(recipe, phase), train=phase.train, validation=recipe.data.validation, seed=recipe.seed)


def feed(recipe: Recipe, phase: Phase) -> FeedConfig:
    """What decides the batches of a training."""
    source = recipe.data
    return FeedConfig(
        dataset=source.dataset,
        split=source.split,
        max_rows=source.max_rows,
        batch_size=phase.batch_size,
        lanes=source.lanes,
        shuffle_window=source.shuffle_window,
        img_size=recipe.blueprint.teacher.img_size,
        augmentation=phase.augmentation or source.augmentation,
        seed=recipe.seed,
        views=phase.views if isinstance(phase, Pairs) else None,
    )


def data_of(recipe: Recipe) -> Stage:
    """The data set that is trained on."""
    splits = dict.fromkeys(map(whole, (recipe.data.split, recipe.data.validation.split)))
    return _data_stage(recipe, recipe.data.dataset, tuple(splits))


def suite_data(recipe: Recipe) -> dict[str, Stage]:
    """The data set of every suite, by role."""
    suites = (find_suite(name) for name in recipe.suites)
    return {f"suite-{suite.name}": _data_stage(recipe, suite.dataset, (suite.split,)) for suite in suites}


def trained_vit(recipe: Recipe, name: Literal["meta", "teacher"], needs: Mapping[str, Stage]) -> Stage:
    """The meta model, or the teacher: from scratch, pretrained or assembled."""
    blueprint, placement = recipe.blueprint, recipe.placement.models
    if name == "meta":
        config = vit.VitConfig(vit=blueprint.meta, training=training(recipe, recipe.meta))
    else:
        weights = recipe.teacher.weights
        config = vit.VitConfig(
            vit=blueprint.teacher,
            training=training(recipe, recipe.teacher.phase),
            weights=weights,
            weights_are=weights if weights in (None, "timm") else sha256_of(Path(weights)),
            tune=recipe.teacher.tune,
        )
    placed = _with_data_root(placement, recipe)
    return Stage(name, vit.run, config, needs, placement.resources, placed, version=TRAINED, of=recipe.name)


def incubation(
    recipe: Recipe,
    index: int,
    module: Literal["student", "teacher"],
    phase: Phase,
    needs: Mapping[str, Stage],
    cached: Stage | None = None,
) -> Stage:
    """One module in the meta model: a pair, or a teacher's module with labels alone.

    `phase` is the pair's own (`Pairs.at`), or the teacher's incubation. `cached` are the teacher's logits; exact ones
    are read only to be faster, others change the result.
    """
    distill = phase.distill if isinstance(phase, Pairs) else DistillConfig(alpha=0)
    has_teacher = distill.alpha > 0
    config = incubate.IncubateConfig(
        blueprint=_of_teacher(recipe) if module == "teacher" else _for_modules(recipe),
        index=index,
        module=module,
        distill=distill if has_teacher else DistillConfig(alpha=0),
        training=training(recipe, phase),
    )
    placement = recipe.placement.pairs.model_copy(update={"data_root": recipe.placement.data_root})
    on_devices = {
        ranks: Spread(recipe.placement.driver, placement.model_copy(update={"ranks": ranks}), placement.resources)
        for ranks in range(2, recipe.data.lanes + 1)
        if recipe.data.lanes % ranks == 0
    }
    flops = _flops(pair_flops, config.blueprint, index, module=module, with_teacher=has_teacher and cached is None)
    is_exact = recipe.pairs.cache is not None and recipe.pairs.cache.kind == "float32"
    read = {} if cached is None else {"logits": cached}
    return Stage(
        f"{'pair' if module == 'student' else 'incubate'}-{index}",
        incubate.run,
        config,
        {**needs, **({} if is_exact else read)},
        resources=placement.resources if placement.ranks == 1 else recipe.placement.driver,
        placement=placement,
        version=INCUBATED,
        of=recipe.name,
        aids=read if is_exact else {},
        together=incubate.together if placement.ranks == 1 else None,
        mates=_mates(config.training.feed, config.training.train.precision, needs),
        cohort=placement.cohort,
        spread=on_devices,
        flops=flops * images(recipe, phase),
    )


def _flops(of: Callable[..., float], blueprint: Blueprint, index: int, **more: Any) -> float:
    """Per image; 0 for what cannot be built, a plan that can be looked at and is refused before it runs."""
    try:
        return of(blueprint, index, **more)
    except UsageError:
        return 0.0


def teachings(recipe: Recipe, needs: Mapping[str, Stage]) -> dict[str, Stage]:
    """The logits of every taught pair's teacher hybrid for all views, for the pairs to read; none without a cache."""
    cache = recipe.pairs.cache
    if cache is None:
        return {}
    taught = [pair.index for pair in recipe.blueprint.pairs if recipe.pairs.at(pair.index).distill.alpha > 0]
    return {f"logits-{index}": _teaching(recipe, cache, index, needs) for index in taught}


def _teaching(recipe: Recipe, format: LogitsFormat, index: int, needs: Mapping[str, Stage]) -> Stage:
    config = logits.LogitsConfig(
        blueprint=_of_teacher(recipe),
        index=index,
        feed=feed(recipe, recipe.pairs),
        precision=recipe.pairs.precision,
        format=format,
    )
    placement = recipe.placement.pairs.model_copy(update={"data_root": recipe.placement.data_root, "ranks": 1})
    return Stage(
        f"logits-{index}",
        logits.run,
        config,
        needs,
        placement.resources,
        placement,
        version=INCUBATED,
        of=recipe.name,
        together=logits.together,
        mates=_mates(config.feed, config.precision, needs),
        cohort=placement.cohort,
        flops=_flops(hybrid_flops, config.blueprint, index) * images(recipe, recipe.pairs, epochs=config.feed.views),
    )


def images(recipe: Recipe, phase: Phase, epochs: float | None = None) -> float:
    """Images that a training sees, or so many epochs of it; 0 if the data set is not there."""
    source = recipe.data
    rows = rows_of_an_epoch(source.dataset, source.split, source.max_rows, recipe.placement.data_root)
    return (phase.epochs if epochs is None else epochs) * (rows or 0)


def _mates(batches: FeedConfig, precision: str, needs: Mapping[str, Stage]) -> str:
    """Equal for stages that read the same batches, in the same precision, inside the same meta model and teacher."""
    same = [batches.model_dump(mode="json"), precision]
    same += [needs[role].key if role in needs else "" for role in ("data", "meta", "split")]
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]


def assembly(recipe: Recipe, model: Literal["student", "teacher"], modules: Sequence[Stage]) -> Stage:
    """A whole model from its modules."""
    config = assemble.AssembleConfig(
        blueprint=_of_teacher(recipe) if model == "teacher" else _for_training(recipe),
        model=model,
        keep_stitches=recipe.keep_stitches and model == "student",
        seed=recipe.seed,
    )
    needs = {f"module-{index}": stage for index, stage in enumerate(modules)}
    name = "assemble" if model == "student" else "assemble-teacher"
    return Stage(name, assemble.run, config, needs, recipe.placement.light, of=recipe.name)


def finetuning(recipe: Recipe, needs: Mapping[str, Stage]) -> Stage:
    """The whole student. Its worker only drives: Ray Train asks for the ranks' resources."""
    config = finetune.FinetuneConfig(
        blueprint=_for_training(recipe),
        keep_stitches=recipe.keep_stitches,
        start="scratch" if recipe.start == "scratch" else "assembled",
        training=training(recipe, recipe.finetune),
    )
    placement = recipe.placement.finetune
    resources = recipe.placement.models.resources if placement.engine == "torch" else recipe.placement.driver
    placed = _with_data_root(placement, recipe)
    return Stage("finetune", finetune.run, config, needs, resources, placed, version=TRAINED, of=recipe.name)


def evaluation(recipe: Recipe, subject: str, needs: Mapping[str, Stage]) -> Stage:
    """One subject on all suites."""
    suites: tuple[Suite, ...] = tuple(find_suite(name) for name in recipe.suites)
    config = evaluate.EvaluateConfig.model_validate(
        {
            "subject": subject,
            "blueprint": _evaluated(subject, recipe),
            "keep_stitches": recipe.keep_stitches and subject == "student",
            "dataset": recipe.data.dataset,
            "augmentation": recipe.data.augmentation,
            "suites": suites,
            "precision": _precision(recipe, subject),
            "seed": recipe.seed,
        }
    )
    placement = recipe.placement.evaluation
    name = f"evaluate-{subject}"
    placed = _with_data_root(placement, recipe)
    return Stage(name, evaluate.run, config, needs, placement.resources, placed, version=TRAINED, of=recipe.name)


def _precision(recipe: Recipe, subject: str) -> str:
    """A network is evaluated in the precision that it was trained in."""
    of = {"teacher": recipe.teacher.phase, "meta": recipe.meta, "hybrids": recipe.pairs, "student": recipe.finetune}
    return of[subject].evaluation_precision


def cut(recipe: Recipe, teacher: Stage) -> Stage:
    """The teacher's modules, a file each."""
    config = split.SplitConfig(vit=recipe.blueprint.teacher, depths=recipe.blueprint.teacher_depths)
    return Stage("split", split.run, config, {"teacher": teacher}, recipe.placement.light, of=recipe.name)


def reported(recipe: Recipe, read: Mapping[str, Stage], titles: Mapping[str, str]) -> Stage:
    """The page about all stages that it reads; `titles` are those of the baselines."""
    config = report.ReportConfig(recipe=_told(recipe), titles=dict(titles))
    return Stage("report", report.run, config, read, recipe.placement.light, of=recipe.name)


def exported(recipe: Recipe, own: Mapping[str, Stage]) -> Stage:
    """The student as files that stand alone."""
    config = export.ExportConfig(
        blueprint=recipe.blueprint,
        keep_stitches=recipe.keep_stitches,
        augmentation=recipe.data.augmentation,
        recipe=_told(recipe, "baselines"),
    )
    needs = {"data": own["data"], "model": own["finetune"], "evaluation": own["evaluate-student"]}
    return Stage("export", export.run, config, needs, recipe.placement.light, of=recipe.name)


def _evaluated(subject: str, recipe: Recipe) -> Blueprint:
    if subject == "hybrids":
        return _for_modules(recipe)
    return recipe.blueprint if subject == "student" else _of_teacher(recipe)


def _of_teacher(recipe: Recipe) -> Blueprint:
    """The recipe's blueprint with the teacher in the student's place.

    So another student leaves the teacher, its modules and its evaluation as they are, and the meta model's.
    """
    blueprint = recipe.blueprint
    return Blueprint(
        teacher=blueprint.teacher,
        teacher_depths=blueprint.teacher_depths,
        student=Student(vit=blueprint.teacher),
        student_depths=blueprint.teacher_depths,
    )


def _for_modules(recipe: Recipe) -> Blueprint:
    """What of the blueprint the student's modules go by; of an unknown family all, which is refused before it runs."""
    blueprint, student = recipe.blueprint, FAMILIES.get(recipe.blueprint.student.family)
    return blueprint if student is None else student.for_modules(blueprint)


def _for_training(recipe: Recipe) -> Blueprint:
    """What of the blueprint the whole student's start and training go by; else as for modules."""
    blueprint, student = recipe.blueprint, FAMILIES.get(recipe.blueprint.student.family)
    return blueprint if student is None else student.for_training(blueprint)


def _told(recipe: Recipe, *but: str) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude={"placement", *but})


def _data_stage(recipe: Recipe, dataset: str, splits: tuple[str, ...]) -> Stage:
    root = recipe.placement.data_root
    config = data.DataConfig(dataset=dataset, fingerprint=_fingerprint(dataset, root), splits=splits)
    return Stage(
        "data", data.run, config, {}, recipe.placement.light, data.DataPlacement(data_root=root), of=recipe.name
    )


def _fingerprint(dataset: str, data_root: str | None) -> str | None:
    """None for a data set that is not there: such a plan can be looked at, and is refused before it runs."""
    try:
        return find(dataset, data_root).index.fingerprint
    except DataError:
        return None


def sha256_of(file: Path) -> str | None:
    """Hash of a file; None if it is not there: such a plan can be looked at, and is refused before it runs."""
    return sha256(file) if file.is_file() else None


def _with_data_root(placement: BaseModel, recipe: Recipe) -> BaseModel:
    return placement.model_copy(update={"data_root": recipe.placement.data_root})
