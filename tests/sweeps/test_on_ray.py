"""Sweeps of other kinds on a local Ray: whole students, all pairs, budgets, a worker that is killed, Optuna."""

import os
import signal
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest
from ray.util import placement_group_table
from small_sweeps import bits, lent, of_point, small_sweep

from m2mkd_ray.execution import Event, LocalLauncher, StageProgress, StageStarted, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.sweeps import tuning
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import base
from m2mkd_ray.sweeps.report import write_best
from m2mkd_ray.sweeps.results import SweepResults, TrialRecord, write
from m2mkd_ray.sweeps.sweep import to_yaml

pytestmark = [
    pytest.mark.ray,
    # Tune's loggers leave the files of trials open that it stops all at once (ray 2.60, tune/logger).
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def frozen(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What all trials of small sweeps read: data, meta model, teacher and its modules."""
    store, sweep = Store(str(tmp_path_factory.mktemp("frozen"))), small_sweep(tiny)
    execute(tuning.shared(sweep, base(sweep), drawn(sweep)), store, LocalLauncher()).raise_for_failures()
    return store


def lent_all(frozen: Store, folder: Path) -> Store:
    return lent(frozen, [address for of_name in frozen.addresses().values() for address in of_name], folder)


def test_whole_students_are_swept_and_the_best_is_what_its_recipe_gives(
    m2mkd, tiny: Path, frozen: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """Ray Train inside Ray Tune: two ranks fine-tune each trial's student."""
    settings = {
        "pairs.epochs": 0.5,
        "finetune.epochs": 1,
        "placement.finetune": {"engine": "deepspeed", "num_workers": 2, "log_every_steps": 1},
        "placement.evaluation.resources.cpus": 0.5,
    }
    sweep = small_sweep(
        tiny, settings=settings, level={"kind": "full"}, space={"pairs.lr": "grid([0.0003, 0.01])"},
        scheduler="none", searcher="grid", budget={"trials": 2},
    )  # fmt: skip
    store, events = lent_all(frozen, tmp_path / "store"), list[Event]()
    found = tuning.run(sweep, store, launcher, on_event=events.append)

    # validated twice an epoch
    assert [(trial.state, len(trial.history)) for trial in found.trials] == [("complete", 2)] * 2
    started = [event.stage for event in events if isinstance(event, StageStarted)]
    assert sorted(stage.name for stage in started) == sorted(["pair-0", "pair-1", "assemble", "finetune"] * 2)
    assert len({stage.address for stage in started}) == len(started)
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    first, second = sorted(
        (stage.started, stage.ended) for trial in found.trials for stage in trial.stages if stage.name == "finetune"
    )
    assert first[1] <= second[0], "two cores hold the ranks of one student"

    assert found.best is not None
    (tuned,) = (stage.address for stage in found.best.stages if stage.name == "finetune")
    apart, file = lent_all(frozen, tmp_path / "apart"), write_best(store, found)
    command = ("run", file, "--set", "baselines=[]", "--until", "finetune", "--launcher", "ray")
    assert m2mkd(*command, "--store", apart.root).code == 0
    assert apart.manifest(tuned)["metrics"]["val_top1"] == found.best.value
    assert bits(apart, tuned, "model.safetensors") == bits(store, tuned, "model.safetensors")


def spans(trials: Sequence[TrialRecord]) -> tuple[float, float]:
    """When the pairs of trials were first taken up, and when the last one ended."""
    stages = [stage for trial in trials for stage in trial.stages]
    return min(stage.started or 0.0 for stage in stages), max(stage.ended or 0.0 for stage in stages)


def test_a_worker_that_becomes_free_takes_a_whole_cohort_that_waited_for_it(
    tiny: Path, frozen: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """Six trials on a worker with two seats: ASHA frees one before the other, and no trial trains alone for that."""
    settings = {"placement.pairs.resources.cpus": 2, "pairs.epochs": 18, "pairs.validate_every_epochs": 6}
    sweep = small_sweep(
        tiny, settings=settings, budget={"trials": 6}, cohort=2,
        scheduler={"kind": "asha", "grace": 6, "reduction": 2},
    )  # fmt: skip
    store, events = lent_all(frozen, tmp_path / "store"), list[Event]()
    found = tuning.run(sweep, store, launcher, on_event=events.append)

    assert "stopped" in {trial.state for trial in found.trials}
    started = [event for event in events if isinstance(event, StageStarted)]
    assert [len(event.where.get("cohort", ())) for event in started] == [2] * 6
    by_cohort: dict[tuple[str, ...], list[TrialRecord]] = {}
    of_stage = {trial.stages[0].address: trial for trial in found.trials}
    for event in started:
        by_cohort.setdefault(tuple(event.where["cohort"]), []).append(of_stage[event.stage.address])
    cohorts = list(by_cohort.values())
    for before, after in pairwise(cohorts):
        assert spans(before)[1] <= spans(after)[0] + 0.5, "one after the other"
        assert max(trial.started or 0.0 for trial in after) < spans(before)[1], "it waited for the worker"


@pytest.mark.parametrize(("limit", "spent"), [("hours", {"seconds": 3586.0}), ("gpu_hours", {"gpu_seconds": 3598.0})])
def test_a_budget_that_is_used_up_ends_the_sweep_with_what_is_finished(
    limit: str, spent: dict, m2mkd, tiny: Path, frozen: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """An earlier run has finished one trial and left some seconds of an hour for the other, which takes minutes."""
    sweep = small_sweep(
        tiny, settings={"placement.pairs.resources.gpus": 1}, space={"pairs.epochs": "grid([1, 4000])"},
        scheduler="none", searcher="grid", budget={"trials": 2, limit: 1}, cohort=1,
    )  # fmt: skip
    store, (short, long) = lent_all(frozen, tmp_path / "store"), drawn(sweep)
    execute(of_point(sweep, short), store, LocalLauncher()).raise_for_failures()
    (pair,) = of_point(sweep, short)
    value = store.manifest(pair.address)["metrics"]["val_top1"]
    done = TrialRecord(name="before", point=short, state="complete", history=((1.0, value),))
    write(store, SweepResults(sweep=sweep, created=1e9, updated=1e9, trials=(done,), **spent))
    began = time.monotonic()
    found = tuning.run(sweep, store, launcher)

    assert (found.state, f"budget.{limit}" in found.why) == ("complete", True)
    assert found.best is not None
    assert (found.best.point, found.best.value, found.best.state) == (short, value, "complete")
    (cut,) = (trial for trial in found.trials if trial.point == long)
    assert (cut.state, cut.why) == ("stopped", found.why)
    assert cut.stages[0].started is not None, "it was at work"
    assert [store.status(stage.address).state for stage in of_point(sweep, long)] != ["complete"]
    assert found.seconds - spent.get("seconds", 0.0) <= time.monotonic() - began
    (tmp_path / "sweep.yaml").write_text(to_yaml(sweep))
    told = m2mkd("sweep", "status", tmp_path / "sweep.yaml", "--store", store.root)
    assert f"ended early: budget.{limit}" in told.out


def test_optunas_points_are_those_that_it_proposes_by_itself(
    tiny: Path, frozen: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """One seat, so that it is asked and told in turns; by hand with the values that were measured."""
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'm2mkd_ray[optuna]'")
    settings = {"placement.pairs.resources.cpus": 2, "pairs.epochs": 1}
    sweep = small_sweep(
        tiny, settings=settings, searcher={"kind": "optuna", "seed": 3}, scheduler="none",
        budget={"trials": 3}, cohort=1,
    )  # fmt: skip
    found = tuning.run(sweep, lent_all(frozen, tmp_path / "store"), launcher)

    assert [trial.state for trial in found.trials] == ["complete"] * 3
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=3))
    domains = {
        "pairs.lr": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
        "pairs.distill.temperature": optuna.distributions.FloatDistribution(1, 8, log=True),
    }
    for trial in found.trials:
        proposed = study.ask({f"point/{path}": domain for path, domain in domains.items()})
        assert {path: proposed.params[f"point/{path}"] for path in domains} == pytest.approx(dict(trial.point))
        study.tell(proposed, trial.value)


def stopped_by_the_median(
    histories: Sequence[dict[float, float]], *, grace: float, min_trials: int
) -> dict[int, float]:
    """Which trials the median rule stops, by number, and where: Golovin et al. 2017, 3.2.2, told in the desk's order.

    A trial stops whose best value so far is below the median of the running averages of those that have come as far.
    """
    stopped, told = dict[int, float](), {number: list[tuple[float, float]]() for number in range(len(histories))}
    for epoch in sorted({epoch for values in histories for epoch in values}):
        for number, values in enumerate(histories):
            if epoch not in values or number in stopped:
                continue
            told[number].append((epoch, values[epoch]))
            averages = [
                mean(value for at, value in others if grace <= at <= epoch)
                for other, others in told.items()
                if other != number and others and others[-1][0] >= epoch
            ]
            best = max(value for _, value in told[number])
            if epoch >= grace and len(averages) >= min_trials and best < median(averages):
                stopped[number] = epoch
    return stopped


def test_hybrids_of_all_pairs_and_seeds_are_one_value_that_the_median_rule_judges(
    tiny: Path, frozen: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """Two pairs, two seeds: a cohort of each seed, side by side on two workers of one core."""
    sweep = small_sweep(
        tiny, level={"kind": "stage", "over": "mean"}, seeds=[0, 1], budget={"trials": 4}, cohort=8,
        scheduler={"kind": "median", "grace": 1, "min_trials": 2},
    )  # fmt: skip
    store = lent_all(frozen, tmp_path / "store")
    found = tuning.run(sweep, store, launcher)

    assert [dict(trial.point) for trial in found.trials] == drawn(sweep)
    histories = []
    for trial in found.trials:
        by_epoch: dict[float, list[float]] = {}
        for stage in trial.stages:
            for epoch, value in stage.history:
                by_epoch.setdefault(epoch, []).append(value)
        assert sorted((stage.name, stage.seed) for stage in trial.stages) == [
            (name, seed) for name in ("pair-0", "pair-1") for seed in (0, 1)
        ]
        histories.append({epoch: mean(values) for epoch, values in by_epoch.items() if len(values) == 4})
        assert dict(trial.history) == {epoch: pytest.approx(histories[-1][epoch]) for epoch, _ in trial.history}
    stopped = stopped_by_the_median(histories, grace=1, min_trials=2)
    assert {number: t.epochs for number, t in enumerate(found.trials) if t.state == "stopped"} == stopped
    assert stopped, "the rule stops one of these four"


def test_a_killed_worker_takes_back_its_own_trials_to_their_checkpoints_and_no_others(
    tiny: Path, frozen: Store, launcher: RayLauncher, tmp_path: Path
) -> None:
    """Two workers with a trial each; one is killed when it has kept a checkpoint."""
    sweep = small_sweep(
        tiny, settings={"pairs.epochs": 24, "pairs.validate_every_epochs": 8}, scheduler="none",
        budget={"trials": 2}, cohort=1,
    )  # fmt: skip
    store, events, victim = lent_all(frozen, tmp_path / "store"), list[Event](), list[int]()

    def kill(event: Event) -> None:
        events.append(event)
        if not victim and isinstance(event, StageProgress) and event.progress.landmarks:
            victim.append(event.progress.pid)
            os.kill(event.progress.pid, signal.SIGKILL)

    found = tuning.run(sweep, store, launcher, on_event=kill)

    assert [trial.state for trial in found.trials] == ["complete"] * 2
    started: dict[str, list[StageStarted]] = {}
    for event in events:
        if isinstance(event, StageStarted):
            started.setdefault(event.stage.address, []).append(event)
    killed, other = sorted(started.values(), key=lambda attempts: attempts[0].where["pid"] not in victim)
    assert [attempt.from_step for attempt in other] == [None]
    first, again = killed
    assert first.from_step is None
    assert again.from_step is not None
    assert again.from_step > 0
    alone = lent_all(frozen, tmp_path / "alone")
    execute([again.stage], alone, LocalLauncher()).raise_for_failures()
    assert bits(alone, again.stage.address) == bits(store, again.stage.address)
