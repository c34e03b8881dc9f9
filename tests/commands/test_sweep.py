"""`m2mkd sweep`: what is shown before, while and after one runs; the last test runs one on Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from m2mkd_ray.commands.sweep import chosen_sweep
from m2mkd_ray.errors import UsageError
from m2mkd_ray.execution import Store
from m2mkd_ray.sweeps import SWEEPS, find_sweep
from m2mkd_ray.sweeps.draw import drawn
from m2mkd_ray.sweeps.results import SweepResults, TrialRecord, write
from m2mkd_ray.sweeps.sweep import from_yaml

TEMPERATURE, LR = "pairs.distill.temperature", "pairs.lr"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a running `quick`: a trial is complete, one was stopped, one runs, the rest waits."""
    root = tmp_path_factory.mktemp("runs")
    sweep = find_sweep("quick")
    states = {
        0: ("stopped", ((1.0, 0.4),)),
        1: ("complete", ((1.0, 0.5), (4.0, 0.62))),
        2: ("running", ((1.0, 0.45),)),
    }
    trials = tuple(
        TrialRecord(name=f"t{n}", point=point, state=state, history=history)
        for n, point in enumerate(drawn(sweep) or ())
        for state, history in [states.get(n, ("waiting", ()))]
    )  # fmt: skip
    write(Store(str(root)), SweepResults(sweep=sweep, created=1e9, updated=1e9 + 60, trials=trials))
    return root


@pytest.mark.parametrize("command", [("sweep", "quick"), ("sweep", "run", "quick")])
def test_a_dry_run_shows_points_and_cost_and_starts_nothing(m2mkd, tmp_path, command) -> None:
    ended = m2mkd(*command, "--dry-run", "--store", tmp_path / "runs")
    assert ended.code == 0
    first = (drawn(find_sweep("quick")) or ())[0]
    assert f"{first[TEMPERATURE]:.3g}" in ended.out
    assert "6 trials of 1 seed, of at most 4 epochs each" in ended.out
    assert "of the computation of separate trials" in ended.out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_has_numbers_for_scripts(m2mkd, tmp_path) -> None:
    found = json.loads(m2mkd("sweep", "quick", "--dry-run", "--json", "--store", tmp_path).out)
    assert found["points"] == drawn(find_sweep("quick"))
    assert found["cohorts"] == [4, 2]
    assert found["together"]["teacher_calls"] / found["alone"]["teacher_calls"] == pytest.approx(1 / 3)
    assert len(found["to_make"]) == len(found["shared"]) == 9
    assert all(address.startswith("pair-3-") for address in found["trained"])


def test_what_is_typed_changes_the_sweep() -> None:
    changed = chosen_sweep("quick", ["pairs.epochs=3", "data.max_rows=512"], "fashion", 2)
    assert (changed.recipe, changed.budget.trials) == ("fashion", 2)
    assert changed.settings["pairs.epochs"] == 3
    assert changed.settings["data.max_rows"] == 512
    assert changed.key != find_sweep("quick").key
    assert chosen_sweep("quick") == find_sweep("quick")


@pytest.mark.parametrize(
    ("setting", "message"),
    [("seed", "not of the form"), ("pairs.lr=[", "not YAML"), ("pairs.lr=1", "in settings and in space")],
)  # fmt: skip
def test_what_is_typed_wrongly_is_refused(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen_sweep("quick", [setting])


def test_status_has_the_best_trial_first_while_others_run(m2mkd, store) -> None:
    ended = m2mkd("sweep", "status", "quick", "--store", store)
    rows = [line.split() for line in ended.out.splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["1", "complete"], ["2", "running"], ["0", "stopped"]]
    assert "is running: 1 stopped, 1 complete, 1 running, 3 waiting" in ended.out
    found = json.loads(m2mkd("sweep", "status", "quick", "--json", "--store", store).out)
    assert (found["best"], len(found["trials"]), found["key"]) == ("t1", 6, find_sweep("quick").key)


def test_the_best_setting_is_a_recipe_that_can_be_planned(m2mkd, store, tmp_path) -> None:
    text = m2mkd("sweep", "best", "quick", "--store", store).out
    (tmp_path / "best.yaml").write_text(text)
    assert m2mkd("plan", tmp_path / "best.yaml", "--store", tmp_path).code == 0
    point = (drawn(find_sweep("quick")) or ())[1]
    assert yaml.safe_load(text)["pairs"]["lr"] == point[LR]
    found = json.loads(m2mkd("sweep", "best", "quick", "--json", "--store", store).out)
    assert found["point"] == point


def test_the_report_is_drawn_of_what_there_is(m2mkd, store) -> None:
    page = Path(m2mkd("sweep", "report", "quick", "--store", store).out.strip())
    assert page.is_file()
    assert "not over" in page.read_text()
    numbers = json.loads(m2mkd("sweep", "report", "quick", "--json", "--store", store).out)
    assert len(numbers["trials"]) == 6


def test_a_sweep_that_was_not_started_is_told_with_those_that_were(m2mkd, store) -> None:
    ended = m2mkd("sweep", "status", "quick", "--trials", 3, "--store", store)
    assert ended.code == 1
    assert f"This store has: quick-{find_sweep('quick').key}." in ended.err


def test_sweeps_are_listed_and_shown_as_files(m2mkd, tmp_path) -> None:
    listed = json.loads(m2mkd("sweep", "list", "--json").out)
    assert [sweep["name"] for sweep in listed] == list(SWEEPS)
    assert all(name in m2mkd("sweep", "list").out for name in SWEEPS)
    (tmp_path / "mine.yaml").write_text(m2mkd("sweep", "show", "distillation").out)
    assert from_yaml(tmp_path / "mine.yaml") == find_sweep("distillation")


def test_help_and_lists_of_sweeps_need_no_ray(m2mkd) -> None:
    check = "import sys; from m2mkd_ray.cli import app; assert 'ray' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
    assert "m2mkd sweep" in m2mkd("sweep", "--help").out


def test_lines_tell_of_shared_stages_and_of_every_trial_once(capsys, store) -> None:
    from m2mkd_ray.commands.sweep_output import SweepLines
    from m2mkd_ray.execution import StageEnded, StageRetried
    from m2mkd_ray.execution.failures import Kind
    from m2mkd_ray.sweeps.expect import expect
    from m2mkd_ray.sweeps.points import base
    from m2mkd_ray.sweeps.results import read

    sweep, opened = find_sweep("quick"), Store(str(store))
    expected = expect(sweep, base(sweep), opened)
    lines = SweepLines(expected.shared)
    for stage in (expected.shared[0], expected.trained[0]):
        lines(StageEnded(stage, 61.0, {}, {}))
    lines(StageRetried(expected.trained[0], Kind.LOST, 1, 0.0, "gone"))
    lines.changed(read(opened, sweep))
    lines.changed(read(opened, sweep))
    said = [line.split("  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said[0] == f"{expected.shared[0].address}  complete in 1 min 01 s"
    assert said[1].startswith(f"{expected.trained[0].address}  LOST in attempt 1")
    assert [line.split(":")[0] for line in said[2:]] == [
        "trial 0  stopped with 0.4 at 1 epochs",
        "trial 1  complete with 0.62 at 4 epochs",
        "trial 2  running with 0.45 at 1 epochs",
    ]


@pytest.mark.ray
def test_quick_runs_to_its_best_recipe_and_the_same_command_runs_nothing_again(m2mkd, tmp_path) -> None:
    command = [sys.executable, "-m", "m2mkd_ray", "sweep", "quick", "--num-cpus", "2", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    ended = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        ended.append(json.loads(done.stdout))
    first, second = ended
    assert {trial["state"] for trial in first["trials"]} == {"complete", "stopped"}  # ASHA's rule
    assert len(first["trials"]) == SWEEPS["quick"]().budget.trials
    assert (second["best"], second["trials"]) == (first["best"], first["trials"])
    assert Path(first["report"]).is_file()
    assert m2mkd("plan", first["best_file"], "--store", tmp_path).code == 0
    by_worker: dict[str, list[dict]] = {}
    for trial in first["trials"]:
        for stage in trial["stages"]:
            by_worker.setdefault(stage["worker"], []).append(stage)
    assert sorted(map(len, by_worker.values())) == [2, 4]  # as the dry run says
    for cohort in by_worker.values():  # an image of a cohort goes through the teacher once, whoever leaves it when
        calls = sum(stage["counters"]["teacher_calls"] for stage in cohort)
        assert sum(stage["counted_images"] for stage in cohort) / len(cohort) <= calls
        assert calls <= max(stage["images"] for stage in cohort)
