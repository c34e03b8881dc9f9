"""From results to what a person reads: the best recipe runs, counts are those of the stages, the page is whole."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from m2mkd_ray.execution import Store
from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes.choose import choose
from m2mkd_ray.reporting.sweep_page import SWEEP_FIGURES
from m2mkd_ray.sweeps import find_sweep
from m2mkd_ray.sweeps.points import base, recipes
from m2mkd_ray.sweeps.report import best_yaml, report_of, rungs, savings, write_best, write_report
from m2mkd_ray.sweeps.results import SweepResults
from m2mkd_ray.sweeps.sweep import Sweep


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def page(results: SweepResults, store: Store) -> Path:
    return Path(write_report(store, results))


def test_the_best_setting_is_a_recipe_file_that_trains_the_best_trials_stages(
    results: SweepResults, store: Store
) -> None:
    file = write_best(store, results)
    assert file is not None
    recipe, best = choose(file), results.best
    assert best is not None
    assert best.point.items() >= {"pairs.distill.reduction": "batchmean"}.items()
    seed = min(results.sweep.seeds)
    of_trial = variant(recipes(results.sweep, best.point)[seed])
    of_file = variant(override(recipe, [f"seed={seed}"]))
    assert [of_file[f"pair-{i}"].address for i in range(4)] == [of_trial[f"pair-{i}"].address for i in range(4)]
    recorded = {stage.address for stage in best.stages if stage.seed == seed}
    assert recorded == {of_file[f"pair-{i}"].address for i in range(4)}


def test_the_best_recipe_of_a_recipe_file_has_its_changes_and_the_sweeps(
    results: SweepResults, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("from: demo\npairs: {epochs: 4, distill: {kind: soft}}\nseed: 3\n")
    tree = results.sweep.model_dump(mode="json")
    tree |= {"recipe": str(tmp_path / "mine.yaml"), "settings": {"pairs.warmup_epochs": 0}}
    changed = results.model_copy(update={"sweep": Sweep.model_validate(tree)})
    found = yaml.safe_load(best_yaml(changed))
    assert found["from"] == "demo"
    assert found["seed"] == 3
    assert found["pairs"].items() >= {"epochs": 4, "warmup_epochs": 0}.items()
    assert found["pairs"]["distill"].keys() == {"kind", "temperature", "alpha", "reduction"}


def test_without_a_value_there_is_no_best_recipe(results: SweepResults, tmp_path: Path) -> None:
    empty = results.model_copy(update={"trials": ()})
    assert write_best(Store(str(tmp_path)), empty) is None
    assert not list(tmp_path.iterdir())


def test_an_unfinished_best_trial_is_said_to_be_one(results: SweepResults) -> None:
    stopped = [trial for trial in results.trials if trial.state == "stopped"]
    text = best_yaml(results.model_copy(update={"trials": tuple(stopped)}))
    assert "after 2 epochs; not complete" in text.splitlines()[0]


def test_savings_are_the_stages_counters_against_their_images_alone(results: SweepResults) -> None:
    by_unit = {saving.what: saving for saving in savings(results, base(results.sweep))}
    stages = [stage for trial in results.trials for stage in trial.stages]
    images = sum(stage.images for stage in stages)
    teacher = by_unit["images through a teacher"]
    assert teacher.spent == pytest.approx(images / 8)
    assert teacher.otherwise == images
    assert by_unit["images decoded"].share == pytest.approx(1 / 8)
    assert 0.5 < by_unit["computing the pairs"].share < 0.7
    trained = by_unit["images trained on"]
    assert (trained.spent, trained.otherwise) == (images, 12 * 2 * 4 * 6 * 8000)
    trainings = by_unit["trainings of meta model and teacher"]
    of_a_seed = 6  # a meta model, four modules of the teacher, and the teacher
    assert (trainings.spent, trainings.otherwise) == (2 * of_a_seed, 12 * 2 * of_a_seed)


def test_images_that_were_not_counted_are_not_called_saved(results: SweepResults) -> None:
    """A stage that was stopped trained on for a while after its last landmark."""
    recipe = base(results.sweep)
    later = [
        trial.model_copy(
            update={"stages": tuple(one.model_copy(update={"images": 2 * one.images}) for one in trial.stages)}
        )
        for trial in results.trials
    ]
    shared = ("computing the pairs", "images through a teacher", "images decoded")
    before = [saving for saving in savings(results, recipe) if saving.what in shared]
    after = savings(results.model_copy(update={"trials": tuple(later)}), recipe)
    assert [saving for saving in after if saving.what in shared] == before


def test_a_stage_that_two_trials_have_is_spent_once_and_would_be_spent_twice(results: SweepResults) -> None:
    twice = results.model_copy(update={"trials": (results.trials[0], results.trials[0])})
    one = results.model_copy(update={"trials": (results.trials[0],)})
    recipe = base(results.sweep)
    for once, both in zip(savings(one, recipe), savings(twice, recipe), strict=False):
        assert both.spent == once.spent
        assert both.otherwise == 2 * once.otherwise


def test_the_page_has_every_figure_and_the_best_setting(results: SweepResults, page: Path) -> None:
    assert {file.stem for file in page.parent.glob("figures/*.png")} == set(SWEEP_FIGURES)
    text = page.read_text()
    best = results.best
    assert best is not None
    assert f"temperature: {best.point['pairs.distill.temperature']}" in text
    assert all(f'alt="{words}' in text for words in ("Parallel coordinates of 12 trials", "Timeline of 12 trials"))
    assert "evaluates too" not in text


def test_values_from_rows_that_a_suite_evaluates_are_called_so(results: SweepResults, store: Store) -> None:
    on_test = results.sweep.model_copy(update={"settings": {"data.validation.split": "test"}})
    (note,) = report_of(store, results.model_copy(update={"sweep": on_test})).notes
    assert "split 'test' of fashion-mnist-small, which the suite fashion-small evaluates too" in note


class _Closed(HTMLParser):
    """Fails on a tag that is closed where another is open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert _Closed(text).open == []
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text


def test_a_sweep_that_has_just_begun_has_a_page_too(results: SweepResults, tmp_path: Path) -> None:
    begun = results.model_copy(update={"trials": (), "shared": (), "state": "running"})
    page = Path(write_report(Store(str(tmp_path)), begun))
    assert not list(page.parent.glob("figures/*.png"))
    assert "none has a value yet" in page.read_text()
    assert "The sweep is not over" in page.read_text()


def test_rungs_are_graces_powers_below_the_end() -> None:
    quick, curve = find_sweep("quick"), find_sweep("temperature")
    assert rungs(quick, base(quick)) == (1.0, 2.0)
    assert rungs(curve, base(curve)) == ()


def test_the_report_can_be_made_again_from_its_numbers(results: SweepResults, store: Store) -> None:
    report = report_of(store, results)
    assert type(report).model_validate_json(report.model_dump_json()) == report
