"""What docs/clusters.md names is there, and it leaves out no file and no symptom that people come with."""

import configparser
import re

import pytest
import typer
from cluster_files import CLUSTER, KUBERAY, RAY_UP, ROOT, load, of, pinned, python_version

import m2mkd_ray
from m2mkd_ray.cli import app
from m2mkd_ray.recipe import Recipe
from m2mkd_ray.recipes import RECIPES

TEXT = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_paths_are_there() -> None:
    texts = [TEXT, (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"), (CLUSTER / "README.md").read_text()]
    for path in {
        path for text in texts for path in re.findall(r"\b((?:cluster|docs|tests/cluster)/[\w./-]*\w)", text)
    }:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("file", [*RAY_UP, *KUBERAY], ids=of)
def test_every_cluster_is_spoken_of(file) -> None:
    assert f"cluster/{of(file)}" in TEXT


def test_the_image_is_the_one_of_the_files() -> None:
    tag = f"m2mkd_ray:{m2mkd_ray.__version__}-ray{pinned('ray')}-py{python_version().replace('.', '')}"
    assert set(re.findall(r"m2mkd_ray:[\w.-]+", TEXT)) == {tag}


@pytest.mark.parametrize(
    "symptom", ["no node has so much", "pending", "NCCL", "out of memory", "spilling", "data wait", "401", "idle"]
)
def test_symptoms_are_answered(symptom: str) -> None:
    table = TEXT[TEXT.index("## What is wrong, by symptom") :]
    assert any(symptom in row.split("|")[1] for row in table.splitlines() if row.startswith("|")), symptom


def test_alerts_and_settings_that_are_named_exist() -> None:
    alerts = {
        rule["alert"] for group in load(CLUSTER / "monitoring" / "alerts.yml")["groups"] for rule in group["rules"]
    }
    assert set(re.findall(r"alert (\w+)", TEXT)) <= alerts
    settings = set(re.findall(r"`(placement\.[\w.]+?)(?:=\w+)?`", TEXT))
    assert settings
    recipe: Recipe = RECIPES["vmoe_base"]()
    for setting in settings:
        value = recipe
        for part in setting.split("."):
            assert part in type(value).model_fields, setting
            value = getattr(value, part)


def test_the_import_command_has_the_options_that_are_shown() -> None:
    (line,) = (line.split() for line in TEXT.splitlines() if "m2mkd data import" in line)
    command = typer.main.get_command(app).commands["data"].commands["import"]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in line if word.startswith("--")} <= known


def test_rays_version_is_the_supported_one() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    minor = ".".join(pinned("ray").split(".")[:2])
    assert f"ray[default,train,tune]>={minor}" in setup["options"]["install_requires"]
    assert f"Ray {minor}" in TEXT
