"""Sweeps of other kinds on a local Ray: whole students, used-up budgets, more trials than seats, Optuna's points."""

from pathlib import Path

import pytest
from ray.util import placement_group_table
from small_sweeps import bits, lent, small_sweep

from m2mkd_ray.execution import Event, LocalLauncher, StageStarted, Store, execute
from m2mkd_ray.execution.ray_launcher import RayLauncher
from m2mkd_ray.sweeps import tuning
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.points import base
from m2mkd_ray.sweeps.report import write_best

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

    assert [(trial.state, len(trial.history)) for trial in found.trials] == [
        ("complete", 2)
    ] * 2  # validated twice an epoch
    started = [event.stage for event in events if isinstance(event, StageStarted)]
    assert sorted(stage.name for stage in started) == sorted(["pair-0", "pair-1", "assemble", "finetune"] * 2)
    assert len({stage.address for stage in started}) == len(started)
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}

    assert found.best is not None
    (tuned,) = (stage.address for stage in found.best.stages if stage.name == "finetune")
    apart, file = lent_all(frozen, tmp_path / "apart"), write_best(store, found)
    assert m2mkd("run", file, "--until", "finetune", "--launcher", "ray", "--store", apart.root).code == 0
    assert apart.manifest(tuned)["metrics"]["val_top1"] == found.best.value
    assert bits(apart, tuned, "model.safetensors") == bits(store, tuned, "model.safetensors")
