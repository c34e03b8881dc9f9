"""`m2mkd submit` without a cluster: what is printed, and from where. With one: tests/submission/test_live.py."""

import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_dry_run_prints_the_plain_line_and_sends_nothing(m2mkd, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended = m2mkd("submit", "demo", "--dry-run", "--set", "seed=3", "--store", "s3://bucket/runs")
    assert ended.code == 0, ended.err
    words = shlex.split(ended.out)
    assert words[:3] == ["ray", "job", "submit"]
    assert shlex.join(words[words.index("--") + 1 :]) == (
        "python -m m2mkd_ray run demo --address auto --store s3://bucket/runs --set seed=3"
    )
    metadata = json.loads(words[words.index("--metadata-json") + 1])
    assert metadata["git_commit"]
    assert words[words.index("--submission-id") + 1] == f"demo-{metadata['recipe_key']}"
    assert ended.err == ""


def test_the_json_of_a_dry_run_says_what_would_be_uploaded(m2mkd, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = json.loads(m2mkd("submit", "demo", "--dry-run", "--json").out)
    assert not told["submitted"]
    assert 1_000_000 < told["bytes"] < 50_000_000
    assert told["id"] == told["submission_id"]
    assert told["entrypoint_label_selector"] == {"m2mkd.spot": "!true"}


def test_a_folder_without_our_code_is_said_to_ship_none(m2mkd, tmp_path, tiny, monkeypatch):
    """A recipe file of that folder travels with the job, and is read from there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(tiny.read_text())
    (tmp_path / "job.yaml").write_text("entrypoint: m2mkd run own.yaml --store /shared\nruntime_env: {working_dir: .}")
    ended = m2mkd("submit", "job.yaml", "--dry-run")
    assert ended.code == 0, ended.err
    assert "has no m2mkd_ray: the job runs the one that is installed on the cluster" in ended.err


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_an_address_that_ray_would_overrule_is_refused(variable, m2mkd, monkeypatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    ended = m2mkd("jobs", "--address", "http://127.0.0.1:2")
    assert (ended.code, ended.out) == (2, "")
    assert f"{variable}=http://127.0.0.1:1, which Ray prefers" in ended.err
    assert m2mkd("jobs", "--address", "auto").code == 1  # nobody there, but that is asked
