"""What a trial is worth, from what its targets measured, and when Tune hears of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from small_sweeps import small_sweep

from m2mkd_ray.errors import TrainingError
from m2mkd_ray.execution import Progress
from m2mkd_ray.sweeps.points import base, recipes, targets
from m2mkd_ray.sweeps.trying import Trying
from m2mkd_ray.sweeps.watched import Watched

POINT = {"pairs.lr": 1e-3, "pairs.distill.temperature": 2.0}
STEPS = 10
"""Of an epoch."""


@dataclass
class Made:
    """A trial with two seeds whose stages have not begun."""

    trial: Trying
    first: Watched = field(init=False)
    second: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = self.trial.watched


@pytest.fixture
def made(tiny: Path) -> Made:
    sweep = small_sweep(tiny, seeds=[0, 1])
    recipe = base(sweep)
    trial = Trying(sweep, recipe, "t", POINT, 0)
    trial.targets = {
        seed: [Watched(stage) for stage in targets(sweep, one)] for seed, one in recipes(sweep, POINT, recipe).items()
    }
    return Made(trial)


def come(stage: Watched, values: Mapping[int, float], pid: int = 1, epochs: int = 4) -> None:
    """Reports of validations after these epochs."""
    marks = [{"step": STEPS * at, "epoch": float(at), "val_top1": value} for at, value in values.items()]
    stage.progress = Progress(STEPS * max(values), STEPS * epochs, {}, 0.0, pid, "here", marks)
    stage.state, stage.where = "running", {"actor_id": None, "host": "here", "pid": pid}


def end(stage: Watched, **metrics: Any) -> None:
    stage.state, stage.metrics = "complete", metrics


def test_a_value_is_the_mean_over_seeds_where_all_have_come(made: Made) -> None:
    come(made.first, {1: 0.2, 2: 0.4, 3: 0.5})
    assert made.trial.scores() == []
    come(made.second, {1: 0.4, 2: 0.6})
    assert [(epoch, value) for epoch, value, _ in made.trial.scores()] == [(1.0, pytest.approx(0.3)), (2.0, 0.5)]
    assert made.trial.scores()[0][2] == {0: 0.2, 1: 0.4}


def test_values_are_told_in_order_and_the_last_one_when_all_is_complete(made: Made) -> None:
    for stage in (made.first, made.second):
        come(stage, {1: 0.2, 2: 0.4, 4: 0.5})
    told = []
    while (score := made.trial.next) is not None and score[0] < 4:
        told.append(score[0])
        made.trial.heard(score[0], score[1])
    assert told == [1.0, 2.0]
    assert made.trial.next is None, "the end is told when the artifact is there"
    for stage in (made.first, made.second):
        end(stage, val_top1=0.5)
    assert made.trial.next == (4.0, 0.5, {0: 0.5, 1: 0.5})
    made.trial.heard(4.0, 0.5)
    assert made.trial.next == (4.0, 0.5, {0: 0.5, 1: 0.5}), "and again, if whoever was told of it died"
    assert made.trial.history == [(1.0, 0.2), (2.0, 0.4), (4.0, 0.5)]


def test_one_that_ended_early_counts_with_its_last_value(made: Made) -> None:
    come(made.first, {1: 0.2, 2: 0.6})
    end(made.first, val_top1=0.6)
    come(made.second, {1: 0.2, 2: 0.2, 3: 0.4})
    assert made.trial.scores()[-1][:2] == (3.0, 0.5)


def test_mates_are_those_in_the_same_worker_or_those_that_wait_both(made: Made) -> None:
    other = Trying(made.trial._sweep, base(made.trial._sweep), "other", POINT, 1)
    other.targets = {0: [Watched(made.first.stage)]}
    assert made.trial.is_mate_of(other)
    come(made.first, {1: 0.2}, pid=7)
    assert not made.trial.is_mate_of(other)
    come(other.watched[0], {1: 0.2}, pid=7)
    assert made.trial.is_mate_of(other)
    assert other.has_come_to(1.0)
    assert not other.has_come_to(2.0)


def test_a_metric_that_a_target_never_measured_is_an_error(made: Made) -> None:
    come(made.first, {1: 0.2})
    end(made.first, loss=1.0)
    with pytest.raises(TrainingError, match="measured no val_top1"):
        made.trial.scores()


def test_what_an_earlier_run_left_of_a_trial_is_taken_up(made: Made) -> None:
    for stage in (made.first, made.second):
        come(stage, {1: 0.2})
    made.trial.recorded = [(0, made.first, False), (1, made.second, True)]
    made.trial.heard(1.0, 0.2)
    made.trial.state, made.trial.why = "stopped", "asha at 1 epochs"
    record = made.trial.record()
    assert record.stages[1].reused
    assert record.stages[0].images == STEPS * 32
    again = Trying.from_record(made.trial._sweep, base(made.trial._sweep), record, 0)
    assert again.was_ended
    assert again.record() == record


def test_a_trial_whose_stages_have_no_seat_yet_waits(made: Made) -> None:
    made.trial.recorded = [(0, made.first, False), (1, made.second, False)]
    made.trial.state = "running"
    assert made.trial.record().state == "waiting"
    made.second.started = 1.0
    assert made.trial.record().state == "running"
