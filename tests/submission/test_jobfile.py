"""Job files: a contract over all that are shipped, how they are found, and what is said of wrong ones."""

import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from m2mkd_ray.commands.jobs import parsed, request_of
from m2mkd_ray.errors import UsageError
from m2mkd_ray.pipeline import plan
from m2mkd_ray.recipes import RECIPES
from m2mkd_ray.submission import JobFile, find_job, read_job, shipped_jobs
from m2mkd_ray.submission.jobfile import arguments, replaced
from m2mkd_ray.sweeps import SWEEPS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "jobs"
TAKEN = set(inspect.signature(JobSubmissionClient.submit_job).parameters) - {"self", "job_id"}
"""What Ray takes; `job_id` is an old name of `submission_id`."""
GROUPS = {"head", "cpu", "incubate", "finetune"}
"""Values of the label `m2mkd.node-group` that cluster files have."""
every_job = pytest.mark.parametrize("name", shipped_jobs())


# What is shipped


def test_every_file_of_the_folder_is_a_job_or_what_they_share():
    assert {f"{name}.yaml" for name in shipped_jobs()} == {file.name for file in FOLDER.glob("*.yaml")} - {
        "runtime_env.yaml"
    }
    assert {"demo", "evaluate", "finetune", "incubate", "reproduce-vmoe-base", "sweep"} <= set(shipped_jobs())


def test_a_job_has_the_names_of_ray():
    assert set(JobFile.model_fields) == TAKEN


@every_job
def test_a_job_holds_only_what_ray_takes(name):
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert set(content) <= TAKEN
    assert content["runtime_env"] == "runtime_env.yaml"
    given = request_of(name, [], None).given()
    inspect.signature(JobSubmissionClient.submit_job).bind(None, **given)
    assert RuntimeEnv(**given["runtime_env"])["working_dir"] == "."


@every_job
def test_a_job_runs_a_command_of_ours_on_its_cluster_and_leaves_its_result_in_a_store(name):
    job = read_job(find_job(name))
    command = parsed(arguments(job.entrypoint), find_job(name))
    assert command.values["address"] == "auto"
    assert command.values["store"].startswith("/mnt/m2mkd/")
    if command.name == "run":
        recipe = RECIPES[command.values["recipe"]]()
        assert set(command.values["until"]) <= {stage.name for stage in plan(recipe)}
    else:
        assert command.name == "sweep run"
        assert command.values["sweep"] in SWEEPS


def test_every_sweep_that_ships_is_a_job():
    commands = [parsed(arguments(read_job(file).entrypoint), file) for file in shipped_jobs().values()]
    assert {command.values["sweep"] for command in commands if command.name == "sweep run"} == set(SWEEPS)


@every_job
def test_a_jobs_driver_is_on_no_spot_node_and_holds_a_core(name):
    job = read_job(find_job(name))
    selector = job.entrypoint_label_selector
    assert selector is not None
    assert selector["m2mkd.spot"] in ("false", "!true")
    assert selector.get("m2mkd.node-group", "cpu") in GROUPS - {"incubate", "finetune"}
    assert job.entrypoint_num_cpus
    assert not job.entrypoint_num_gpus


@every_job
def test_a_job_has_a_line_in_the_readme(name):
    assert f"`{name}`" in (FOLDER / "README.md").read_text()


def test_the_wheel_carries_the_jobs_and_they_are_found_there(tmp_path):
    """Without a checkout beside the package: the source's lists alone are built, no dependency is."""
    source = tmp_path / "source"
    shutil.copytree(FOLDER, source / "jobs")
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for file in ("__init__.py", "errors.py", "yaml_files.py", "submission/jobfile.py"):
        (source / "m2mkd_ray" / file).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / "m2mkd_ray" / file, source / "m2mkd_ray" / file)
    (source / "m2mkd_ray" / "submission" / "__init__.py").touch()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (data,) = site.glob("*.data/data/share")
    data.rename(site / "share")  # as `pip install --target` lays it out, and writes it into RECORD
    (record,) = site.glob("*.dist-info/RECORD")
    record.write_text(record.read_text().replace(f"{data.parent.parent.name}/data/share", "share"))
    code = "from m2mkd_ray.submission.jobfile import find_job, read_job; print(read_job(find_job('demo')).entrypoint)"
    found = subprocess.run([sys.executable, "-c", code], cwd=site, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == read_job(FOLDER / "demo.yaml").entrypoint


# Of a user's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("entrypoint: m2mkd run demo --store /shared/runs\nmetadata: {who: me}\n")
    return file


def test_a_path_is_a_job_too(own):
    request = request_of(str(own), [], None)
    assert request.entrypoint == "m2mkd run demo --store /shared/runs"
    assert request.submission_id == f"mine-{request.metadata['recipe_key']}"
    assert {"who": "me", "job": "mine", "recipe": "demo", "store": "/shared/runs"}.items() <= request.metadata.items()


def test_settings_and_the_store_change_the_command():
    entrypoint = "python -m m2mkd_ray run demo --store /a --set x=1 --json"
    assert replaced(entrypoint, [], None) == entrypoint
    assert replaced(entrypoint, ["y.z=[1, 2]"], "s3://b/c") == (
        "python -m m2mkd_ray run demo --set x=1 --json --store s3://b/c --set 'y.z=[1, 2]'"
    )
    assert replaced("m2mkd run demo --store=/a -v", [], "/b") == "m2mkd run demo -v --store /b"


def test_a_runs_id_follows_from_what_it_makes(own):
    def key(*settings: str, store: str | None = None) -> str:
        return request_of(str(own), settings, store).metadata["recipe_key"]

    assert key() == key("placement.pairs.cohort=2") == key(store="/elsewhere")
    assert len({key(), key("seed=1"), key("pairs.epochs=2")}) == 3
    assert key() == request_of("demo", [], None).metadata["recipe_key"]


def test_a_command_of_a_group_is_a_job_too(own):
    own.write_text("entrypoint: m2mkd data import cifar10 --source /shared/cifar-10-python.tar.gz --out /shared/data")
    request = request_of(str(own), [], None)
    assert request.metadata["store"] == ""
    assert parsed(["data", "verify"], own).name == "data verify"
    own.write_text("entrypoint: m2mkd data import cifar100 --source /shared/c.tar.gz --out /shared/data")
    assert request_of(str(own), [], None).submission_id != request.submission_id


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("entrypoint: python train.py", "expected a command of m2mkd"),
        ("entrypoint: m2mkd run demo\nentry_point_num_cpus: 1", "entry_point_num_cpus"),
        ("entrypoint: m2mkd run demo\nruntime_env: {workingdir: .}", "workingdir, but Ray knows"),
        ("entrypoint: m2mkd run demo\nruntime_env: {env_vars: {A: 1}}", "runtime_env: .*env_vars"),
        ("entrypoint: m2mkd run demo\nruntime_env: none.yaml", "Cannot read the runtime environment"),
        ("entrypoint: m2mkd run demo\nentrypoint_label_selector: {a: b c}", "Invalid label selector value `b c`"),
        ("entrypoint: m2mkd run demo\nsubmission_id: a/b", "submission_id"),
        ("- entrypoint", "expected settings by name"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(content, said, tmp_path):
    (tmp_path / "job.yaml").write_text(content)
    with pytest.raises(UsageError, match=said):
        read_job(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("m2mkd rum demo --store /a", "No such command 'rum'"),
        ("m2mkd run demo --stor /a", "No such option: --stor"),
        ("m2mkd run --store /a", "Missing argument 'RECIPE'"),
        ("m2mkd run demmo --store /a", "There is no recipe 'demmo'"),
        ("m2mkd run demo --store /a --until spilt", "no stage spilt"),
        ("m2mkd run demo", "Give --store an absolute path"),
        ("m2mkd run demo --store runs", "Give --store an absolute path"),
    ],
)
def test_a_command_that_would_fail_there_is_refused_here(command, said, own):
    own.write_text(f"entrypoint: {command}")
    with pytest.raises(UsageError, match=said):
        request_of(str(own), [], None)
