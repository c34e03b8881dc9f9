"""A sweep as data: YAML, its key, and what does not fit together."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from m2mkd_ray.errors import UsageError
from m2mkd_ray.sweeps import find_sweep
from m2mkd_ray.sweeps.sweep import Sweep, from_yaml, to_yaml, validated

TREE: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "recipe": "demo",
    "level": {"kind": "pair", "index": 2},
    "space": {"pairs.distill.alpha": "uniform(0, 1)"},
    "budget": {"trials": 4},
}


def test_a_file_needs_only_what_has_no_default(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TREE))
    sweep = from_yaml(tmp_path / "mine.yaml")
    assert (sweep.measured, sweep.mode, sweep.seeds, sweep.scheduler.kind) == ("val_top1", "max", (0,), "none")
    (tmp_path / "again.yaml").write_text(to_yaml(sweep))
    assert from_yaml(tmp_path / "again.yaml") == sweep


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"a": "unifrm(0, 1)"}}, "space.a.domain: there is no domain 'unifrm'"),
        ({"space": {"a": {"domain": "uniform(0, 1)", "when": {"b": 1}}}}, "`when` names b, which the space does not"),
        (
            {"space": {"a": {"domain": "uniform(0, 1)", "when": {"b": 5}}, "b": "choice([4, 6])"}},
            "space.a: `when` waits for b to be 5, which choice([4, 6]) never is",
        ),
        ({"searcher": "grid"}, "pairs.distill.alpha is a range: use choice or grid"),
        ({"searcher": "optuna", "space": {"a": "grid([1, 2])"}}, "optuna takes no grid"),
        ({"searcher": "optuna", "space": {"a": "qloguniform(2, 64, 2)"}}, "optuna draws no qloguniform (a)"),
        ({"searcher": "bayes"}, "searcher: Input tag 'bayes'"),
        ({"scheduler": "pbt"}, "a stage's key is made from the settings that it has from first to last"),
        ({"scheduler": {"kind": "pb2", "grace": 1}}, "pb2 changes settings in the middle of a training"),
        ({"scheduler": "asha"}, "scheduler.asha.grace: Field required"),
        ({"settings": {"pairs.distill.alpha": 0.3}}, "pairs.distill.alpha is in settings and in space"),
        ({"settings": {"seed": 3}}, "list `seeds`"),
        ({"seeds": [1, 1]}, "one more than once"),
        ({"seeds": []}, "seeds"),
        ({"budget": {"trials": 0}}, "budget.trials: Input should be greater than 0"),
        ({"level": {"kind": "pair"}}, "level.pair.index: Field required"),
        ({"level": {"kind": "module"}}, "level: Input tag 'module'"),
        ({"name": "My sweep"}, "name: String should match"),
        ({"grace": 1}, "grace: Extra inputs are not permitted"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        validated({**TREE, **changes}, "mine.yaml")
    assert message in str(refused.value)
    assert "mine.yaml" in str(refused.value)


def test_all_that_does_not_fit_is_told_at_once() -> None:
    with pytest.raises(UsageError) as refused:
        validated({**TREE, "budget": {"trials": 0}, "mode": "most", "seeds": []}, "mine.yaml")
    assert all(place in str(refused.value) for place in ("budget.trials", "mode", "seeds"))


@pytest.mark.parametrize(("content", "message"), [("a: [", "is not YAML"), (None, "Cannot read the sweep file")])
def test_a_file_that_is_no_sweep_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=message):
        from_yaml(file)


def test_the_key_stands_for_the_search_and_not_for_names_or_seats() -> None:
    sweep = find_sweep("quick")
    same = sweep.model_copy(update={"name": "other", "title": "Other", "cohort": 2})
    assert same.key == sweep.key
    for changes in ({"seeds": (1,)}, {"mode": "min"}, {"settings": {}}, {"recipe": "fashion"}):
        assert sweep.model_copy(update=changes).key != sweep.key


def test_another_recipe_in_the_same_file_is_another_sweep(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text("from: demo\n")
    sweep = Sweep.model_validate({**TREE, "recipe": str(file)})
    before = sweep.key
    file.write_text("from: demo\nseed: 1\n")
    assert sweep.key != before
