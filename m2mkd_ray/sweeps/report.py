"""From a sweep's results to its report, and to the recipe of its best point.

Written beside the results: `best.yaml`, which `m2mkd run` takes, and `report/`.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from m2mkd_ray.data.parts import whole
from m2mkd_ray.evaluation import find_suite
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.stage import Stage, in_order
from m2mkd_ray.recipe import Recipe, read_yaml
from m2mkd_ray.reporting.sweep import Saving, SweepReport, SweptParameter, TrialRow, TrialSpan
from m2mkd_ray.reporting.sweep_page import render_sweep
from m2mkd_ray.sweeps import points
from m2mkd_ray.sweeps.cost import Cost, alone, images_of, is_pair
from m2mkd_ray.sweeps.results import StageRecord, SweepResults, TrialRecord
from m2mkd_ray.sweeps.space import Parameter
from m2mkd_ray.sweeps.sweep import Asha, Full, Median, OnePair, Sweep, to_yaml

BEST = "best.yaml"
TRAININGS = ("meta", "teacher", "incubate", "logits")
"""Beginnings of the names of what trials share that costs something."""


def best_yaml(results: SweepResults) -> str:
    """The recipe of the best point, as the file of changes that `m2mkd run` takes; empty: there is none yet.

    Its seed is the recipe's own, and settings that only make a sweep short are in it: they are the sweep's recipe.
    """
    best = results.best
    if best is None or best.value is None:
        return ""
    sweep = results.sweep
    title = f"# Trial {results.numbers[best.name]} ({best.name}) of the sweep {sweep.name}-{sweep.key}: "
    title += f"{sweep.measured} {best.value:.6g}"
    title += "" if best.state == "complete" else f" after {best.epochs:g} epochs; not complete"
    base, changes = _base_changes(sweep)
    tree: dict[str, Any] = {"from": base}
    for path, value in {**changes, **best.point}.items():
        _put(tree, path, value)
    return f"{title}\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}"


def write_best(store: Store, results: SweepResults) -> str | None:
    """Write the recipe of the best point beside the results, whole; where it is, None if there is none yet."""
    text = best_yaml(results)
    if not text:
        return None
    path = f"{results.sweep.folder}/{BEST}"
    store.folders.write(path, text.encode())
    return store.folders.where(path)


def write_report(store: Store, results: SweepResults) -> str:
    """Write the page with its figures and numbers beside the results; where the page is."""
    report = report_of(store, results)
    with tempfile.TemporaryDirectory() as scratch:
        render_sweep(report, Path(scratch))
        files = [file for file in Path(scratch).rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda file: file.name == "report.html"):  # the page last
            path = f"{results.sweep.folder}/report/{file.relative_to(scratch).as_posix()}"
            store.folders.write(path, file.read_bytes())
    return store.folders.where(f"{results.sweep.folder}/report/report.html")


def report_of(store: Store, results: SweepResults) -> SweepReport:
    """All that the page shows."""
    sweep, recipe, numbers = results.sweep, points.base(results.sweep), results.numbers
    in_order = sorted(results.trials, key=lambda trial: numbers[trial.name])
    return SweepReport(
        title=sweep.title,
        name=sweep.name,
        key=sweep.key,
        recipe=sweep.recipe,
        level=level_words(sweep),
        metric=sweep.measured,
        mode=sweep.mode,
        seeds=sweep.seeds,
        scheduler=scheduler_words(sweep),
        state=results.state,
        why=results.why,
        created=_iso(results.created),
        updated=_iso(results.updated),
        parameters=tuple(_parameter(path, of) for path, of in sweep.space.items()),
        trials=tuple(_trial(numbers[trial.name], trial, results.updated) for trial in in_order),
        rungs=rungs(sweep, recipe),
        savings=tuple(savings(results, recipe)),
        sweep_yaml=to_yaml(sweep),
        best_yaml=best_yaml(results),
        best_file=store.folders.where(f"{sweep.folder}/{BEST}"),
        notes=tuple(_notes(sweep, recipe)),
    )


def level_words(sweep: Sweep) -> str:
    """What is measured, in words."""
    match sweep.level:
        case OnePair(index=index):
            return f"hybrid of pair {index}"
        case Full():
            return "fine-tuned student"
    return f"hybrids of all pairs, {'the worst' if sweep.level.over == 'worst' else 'their mean'}"


def scheduler_words(sweep: Sweep) -> str:
    """Who stops trials, in words."""
    match sweep.scheduler:
        case Asha(grace=grace, reduction=reduction):
            return f"ASHA from {grace:g} epochs on, the best 1/{reduction:g} go on"
        case Median(grace=grace):
            return f"median stopping from {grace:g} epochs on"
    return "no trial stopped early"


def rungs(sweep: Sweep, recipe: Recipe) -> tuple[float, ...]:
    """Epochs at which ASHA decides, the end left out."""
    if not isinstance(sweep.scheduler, Asha):
        return ()
    found, most = [sweep.scheduler.grace], points.epochs_of(sweep, recipe)
    while found[-1] * sweep.scheduler.reduction < most:
        found.append(found[-1] * sweep.scheduler.reduction)
    return tuple(found)


@dataclass(frozen=True)
class _Pair:
    """A pair of a trial, with its stage."""

    record: StageRecord
    stage: Stage
    recipe: Recipe


def savings(results: SweepResults, recipe: Recipe) -> Iterator[Saving]:
    """What the counters say against the same images alone; what was not counted is left out."""
    pairs = list(_pairs(results, recipe))
    if not pairs:
        return
    once = list({pair.record.address: pair for pair in pairs}.values())
    otherwise = sum((alone(pair.stage, pair.record.counted_images, pair.recipe) for pair in pairs), Cost())
    for what, counter, unit, because in (
        ("computing the pairs", "flops", "FLOP", "the meta model and the teacher are run once a cohort"),
        ("images through a teacher", "teacher_calls", "images", "once a cohort"),
        ("images decoded", "decodes", "images", "once a worker"),
    ):
        counted = [pair.record.counters[counter] for pair in once if counter in pair.record.counters]
        if counted and getattr(otherwise, counter):
            yield Saving(
                what=what, spent=sum(counted), otherwise=getattr(otherwise, counter), unit=unit, because=because
            )
    whole = sum(images_of(pair.stage, pair.recipe) for pair in pairs)
    trained = sum(pair.record.images for pair in once)
    if trained < whole:
        yield Saving(
            what="images trained on",
            spent=trained,
            otherwise=whole,
            unit="images",
            because="trials behind are stopped",
        )
    trainings = [stage for stage in results.shared if _is_training(stage.name)]
    alone_too = sum(_trainings_of(results.sweep, trial, recipe) for trial in results.trials if trial.started)
    if trainings and alone_too > len(trainings):
        yield Saving(
            what="trainings of meta model and teacher",
            spent=len(trainings),
            otherwise=alone_too,
            unit="trainings",
            because="all trials of a seed read the same",
        )


def _is_training(name: str) -> bool:
    """Whether a stage that trials share trains something."""
    return name.partition("-")[0] in TRAININGS


def _trainings_of(sweep: Sweep, trial: TrialRecord, recipe: Recipe) -> int:
    """How many of them a trial would have run alone."""
    by_seed = points.recipes(sweep, trial.point, recipe).values()
    return sum(_is_training(stage.name) for one in by_seed for stage in in_order(points.targets(sweep, one)))


def _pairs(results: SweepResults, recipe: Recipe) -> Iterator[_Pair]:
    for trial in results.trials:
        of_seed = points.recipes(results.sweep, trial.point, recipe)
        stages = {
            (seed, stage.name): stage
            for seed, one in of_seed.items()
            for stage in points.recorded(results.sweep, one)
            if is_pair(stage)
        }
        for record in trial.stages:
            if (record.seed, record.name) in stages and record.images:
                yield _Pair(record, stages[record.seed, record.name], of_seed[record.seed])


def _parameter(path: str, parameter: Parameter) -> SweptParameter:
    domain = parameter.parsed
    low, high = (None, None) if domain.values is not None else domain.ends
    return SweptParameter(
        path=path, values=domain.values, low=low, high=high, is_log=domain.is_log, is_numeric=domain.is_numeric
    )


def _trial(number: int, trial: TrialRecord, now: float) -> TrialRow:
    return TrialRow(
        name=str(number),
        point=trial.point,
        state=trial.state,
        history=trial.history,
        by_seed=trial.by_seed,
        spans=tuple(
            TrialSpan(
                stage=stage.name,
                seed=stage.seed,
                start=stage.started,
                end=max(stage.started, now if stage.ended is None else stage.ended),
                worker=stage.worker,
            )
            for stage in trial.stages
            if stage.started is not None and not stage.reused
        ),
        why=trial.why,
    )


def _notes(sweep: Sweep, recipe: Recipe) -> Iterator[str]:
    source = recipe.data
    same = [
        name
        for name in recipe.suites
        if (suite := find_suite(name)).dataset == source.dataset and suite.split == whole(source.validation.split)
    ]
    if same:
        yield (
            f"The values come from split {source.validation.split!r} of {source.dataset}, which the suite "
            f"{', '.join(same)} evaluates too: accuracies of the best setting there are not those of unseen images. "
            f"For a claim choose on other ones, such as a part of those that are trained on: "
            f"data.split={source.split}[5000:] and data.validation.split={source.split}[:5000]."
        )


def _base_changes(sweep: Sweep) -> tuple[str, Mapping[str, Any]]:
    """The recipe's name and what the sweep changes in it; of a file, the file's own changes too."""
    if Path(sweep.recipe).suffix not in (".yaml", ".yml"):
        return sweep.recipe, sweep.settings
    base, changes = read_yaml(Path(sweep.recipe))
    return base, {**changes, **sweep.settings}


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        below = tree.get(name)
        tree[name] = dict(below) if isinstance(below, Mapping) else {}
        tree = tree[name]
    tree[last] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
