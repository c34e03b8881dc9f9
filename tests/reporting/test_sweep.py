"""The numbers of a sweep's report, against other ways to get them."""

from typing import Any

import numpy as np
import pytest

from m2mkd_ray.reporting.sweep import SweepReport, SweptParameter, TrialRow, fit, importances
from m2mkd_ray.reporting.sweep_page import lead, notes
from m2mkd_ray.reporting.sweep_tables import SWEEP_TABLES

RANGE = SweptParameter(path="pairs.distill.temperature", values=None, low=1, high=8, is_log=True)
LIST = SweptParameter(path="pairs.distill.reduction", values=("numel", "batchmean"), is_numeric=False)


def row(name: int, point: dict[str, Any], *values: float, state: str = "complete", **more: Any) -> TrialRow:
    history = tuple((at + 1.0, value) for at, value in enumerate(values))
    return TrialRow.model_validate({"name": str(name), "point": point, "state": state, "history": history, **more})


def report(*trials: TrialRow, parameters: tuple[SweptParameter, ...] = (RANGE, LIST), **more: Any) -> SweepReport:
    values: dict[str, Any] = {
        "title": "A sweep", "name": "mine", "key": "0" * 12, "recipe": "demo", "level": "pair 0", "metric": "val_top1",
        "mode": "max", "seeds": (0,), "scheduler": "none", "state": "complete", "created": "then", "updated": "now",
        "sweep_yaml": "", "parameters": parameters, "trials": trials,
    }  # fmt: skip
    return SweepReport(**(values | more))


def adjusted_r2(predicted: np.ndarray, values: np.ndarray, num_terms: int) -> float:
    residual, total = ((values - predicted) ** 2).sum(), ((values - values.mean()) ** 2).sum()
    return 1 - (residual / (len(values) - num_terms)) / (total / (len(values) - 1))


def test_importance_of_a_range_is_the_adjusted_r2_of_a_parabola_over_its_logarithm() -> None:
    generator = np.random.default_rng(0)
    at = generator.uniform(1, 8, 20)
    values = 0.7 - 0.05 * np.log(at / 4) ** 2 + generator.normal(0, 0.01, 20)
    found = importances(report(*(row(i, {RANGE.path: t}, v) for i, (t, v) in enumerate(zip(at, values)))))
    predicted = np.polyval(np.polyfit(np.log(at), values, 2), np.log(at))
    (one,) = found
    assert one.explained == pytest.approx(adjusted_r2(predicted, values, 3))
    assert one.num_trials == 20


def test_importance_of_a_list_is_the_adjusted_share_of_variance_between_its_values() -> None:
    values = np.array([0.5, 0.52, 0.48, 0.6, 0.66, 0.61])
    names = ["numel"] * 3 + ["batchmean"] * 3
    (one,) = importances(report(*(row(i, {LIST.path: n}, v) for i, (n, v) in enumerate(zip(names, values)))))
    predicted = np.repeat([values[:3].mean(), values[3:].mean()], 3)
    assert one.explained == pytest.approx(adjusted_r2(predicted, values, 2))


def test_what_explains_nothing_has_no_importance_and_too_few_trials_none_at_all() -> None:
    generator = np.random.default_rng(1)
    at, values = generator.uniform(1, 8, 200), generator.normal(0.7, 0.01, 200)
    (one,) = importances(report(*(row(i, {RANGE.path: t}, v) for i, (t, v) in enumerate(zip(at, values)))))
    assert 0 <= one.explained < 0.03
    assert importances(report(*(row(i, {RANGE.path: 1.0 + i}, 0.5 + i) for i in range(4)))) == ()
    assert importances(report(*(row(i, {RANGE.path: 1.0 + i}, 0.5) for i in range(9)))) == ()
    assert importances(report()) == ()


def test_trials_are_compared_where_all_of_them_have_a_value() -> None:
    """Only the second epoch's values follow the parameter; the stopped trial has one epoch."""
    trials = [row(i, {RANGE.path: float(i + 1)}, 0.5 + 0.01 * (i % 2), 0.5 + 0.05 * i) for i in range(7)]
    of_last = importances(report(*trials))[0].explained
    stopped = row(7, {RANGE.path: 8.0}, 0.5, state="stopped")
    assert report(*trials, stopped).common_epoch == 1
    assert importances(report(*trials, stopped))[0].explained < 0.5 < of_last


def test_the_parabola_is_the_one_of_the_importance() -> None:
    at = [1.0, 2.0, 3.0, 4.0, 6.0]
    values = [0.1 + 2 * np.log(t) - np.log(t) ** 2 for t in at]
    assert fit(RANGE, at, values) == pytest.approx([-1, 2, 0.1])
    assert fit(RANGE, at[:4], values[:4]) is None


def test_noise_is_the_pooled_deviation_between_seeds() -> None:
    trials = [
        row(0, {}, 0.5, by_seed={0: 0.4, 1: 0.6}),
        row(1, {}, 0.7, by_seed={0: 0.65, 1: 0.75}),
        row(2, {}, 0.7, by_seed={0: 0.1, 1: 0.9}, state="stopped"),
    ]
    both = report(*trials, parameters=(), seeds=(0, 1))
    assert both.noise == pytest.approx(np.sqrt((np.var([0.4, 0.6], ddof=1) + np.var([0.65, 0.75], ddof=1)) / 2))
    assert any("differ by" in note for note in notes(both))
    assert report(trials[0].model_copy(update={"by_seed": {0: 0.5}})).noise is None


def test_notes_tell_what_limits_the_numbers() -> None:
    trials = [row(i, {}, 0.5 + i / 10, 0.6 + i / 10) for i in range(3)]
    running = report(
        *trials, row(3, {}, 0.1, state="stopped"), parameters=(), state="running", why="its hours are over"
    )
    text = " ".join(notes(running))
    for words in ("not over", "its hours are over", "best of 3 trials", "single seed", "fewer epochs"):
        assert words in text
    assert "3 complete, 1 stopped" in lead(running)


def test_tables_have_the_best_trial_first_and_mark_it() -> None:
    trials = (
        row(0, {RANGE.path: 2.0}, 0.5),
        row(1, {}, 0.7),
        row(2, {RANGE.path: 3.0}, state="failed", why="no room"),
    )
    table = SWEEP_TABLES["trials"](report(*trials))
    assert [cells[0] for cells in table.rows] == ["1", "0", "2"]
    assert table.strong == {0}
    assert table.rows[0][2] == "–"  # had no effect
    assert table.rows[2][1] == "failed: no room"


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("pairs.distill.temperature", "temperature"),
        ("pairs.of.2.temperature", "temperature of pair 2"),
        ("finetune.lr", "finetune lr"),
        ("seed", "seed"),
    ],
)
def test_a_parameter_has_a_short_name(path: str, title: str) -> None:
    assert SweptParameter(path=path, values=(1,)).title == title
