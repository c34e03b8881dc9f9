"""The whole flow.

    data ─┬─ teacher ── split ─┐
          └─ meta ─────────────┴─ pair-0 … pair-N ── assemble ── finetune ─┬─ evaluate-* ── report
                                                                           └─ export

With `pairs.cache` a stage `logits-i` stands before each pair, and writes the teacher's
logits down for it.

`plan(recipe)` runs nothing: a plan is data, to be printed, compared with the store,
cut short or carried out. Stages get the slices of the recipe that decide their
result; two recipes that agree on a slice share the stage. A baseline adds the
stages that it does not share.
"""

from collections.abc import Mapping

from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.recipe import Phase, Recipe
from m2mkd_ray.recipes import baseline
from m2mkd_ray.slices import (
    assembly,
    cut,
    data_of,
    evaluation,
    exported,
    finetuning,
    incubation,
    reported,
    suite_data,
    teachings,
    trained_vit,
)


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe and of its baselines, each after what it reads."""
    own = variant(recipe)
    baselines = {name: baseline(recipe, name) for name in recipe.baselines}
    of_baselines = {
        f"{name}/{role}": stage for name, control in baselines.items() for role, stage in variant(control).items()
    }
    titles = {name: control.title for name, control in baselines.items()}
    return in_order([reported(recipe, {**own, **of_baselines}, titles), exported(recipe, own)])


def variant(recipe: Recipe) -> dict[str, Stage]:
    """The stages of one recipe that its report reads, by role: trainings and evaluations."""
    data, suites = data_of(recipe), suite_data(recipe)
    if recipe.start == "scratch":
        tuned = finetuning(recipe, {"data": data})
        student = evaluation(recipe, "student", {"model": tuned, "data": data, **suites})
        return {"data": data, "finetune": tuned, "evaluate-student": student}
    distills = recipe.distills  # without a teacher's term there is no teacher
    meta = trained_vit(recipe, "meta", {"data": data})
    teacher, incubated = teacher_of(recipe, data, meta)
    frozen = {"data": data, "meta": meta}
    taught = {**frozen, "split": cut(recipe, teacher)} if distills else frozen
    phases = {pair.index: recipe.pairs.at(pair.index) for pair in recipe.blueprint.pairs}
    logits = teachings(recipe, taught) if distills else {}
    pairs = {
        f"pair-{index}": incubation(
            recipe,
            index,
            "student",
            phase,
            taught if phase.distill.alpha > 0 else frozen,
            logits.get(f"logits-{index}"),
        )
        for index, phase in phases.items()
    }
    assembled = assembly(recipe, "student", list(pairs.values()))
    tuned = finetuning(recipe, {"data": data, "assembled": assembled})
    subjects: Mapping[str, Mapping[str, Stage]] = {
        "meta": {"model": meta},
        "hybrids": {"meta": meta, **pairs},
        "student": {"model": tuned},
        **({"teacher": {"model": teacher}} if distills else {}),
    }
    evaluations = {
        f"evaluate-{subject}": evaluation(recipe, subject, {**models, "data": data, **suites})
        for subject, models in subjects.items()
    }
    trainings = {"meta": meta, **({"teacher": teacher, **incubated} if distills else {}), **logits, **pairs}
    return {"data": data, **trainings, "finetune": tuned, **evaluations}


def teacher_of(recipe: Recipe, data: Stage, meta: Stage) -> tuple[Stage, dict[str, Stage]]:
    """The teacher, and the trainings of its modules if it is incubated."""
    phase: Phase | None = recipe.teacher.incubation
    if phase is None:
        return trained_vit(recipe, "teacher", {"data": data}), {}
    modules = {
        f"incubate-{pair.index}": incubation(recipe, pair.index, "teacher", phase, {"data": data, "meta": meta})
        for pair in recipe.blueprint.pairs
    }
    assembled = assembly(recipe, "teacher", list(modules.values()))
    return trained_vit(recipe, "teacher", {"data": data, "assembled": assembled}), modules
