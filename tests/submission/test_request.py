"""A job as it is sent: the plain line against Ray's own parser, ids, and the refusal of a second one."""

import json
import shlex

import pytest
from ray.dashboard.modules.job.cli import submit
from ray.dashboard.modules.job.pydantic_models import JobDetails

from m2mkd_ray.errors import LockedError
from m2mkd_ray.submission import Request, next_id, plain_line, refuse_second

REQUEST = Request(
    entrypoint="python -m m2mkd_ray run demo --store '/a b' --set 'x=[1, 2]' --set y='it is'",
    submission_id="demo-0123456789ab",
    runtime_env={"working_dir": ".", "excludes": ["*.log", "/data"], "env_vars": {"A": "it's"}},
    metadata={"job": "demo"},
    entrypoint_num_cpus=0.5,
    entrypoint_memory=4_000_000_000,
    entrypoint_resources={"driver": 1.0},
    entrypoint_label_selector={"m2mkd.spot": "!true"},
)


def test_ray_reads_the_plain_line_as_the_same_job():
    words = shlex.split(plain_line(REQUEST, "http://head:8265", waits=False))
    assert words[:3] == ["ray", "job", "submit"]
    read = submit.make_context("submit", words[3:]).params
    assert read["address"] == "http://head:8265"
    assert read["no_wait"]
    assert shlex.split(shlex.join(read["entrypoint"])) == shlex.split(REQUEST.entrypoint)
    assert json.loads(read["runtime_env_json"]) == REQUEST.runtime_env
    assert json.loads(read["metadata_json"]) == REQUEST.metadata
    assert json.loads(read["entrypoint_resources"]) == REQUEST.entrypoint_resources
    assert json.loads(read["entrypoint_label_selector"]) == REQUEST.entrypoint_label_selector
    for name in ("submission_id", "entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory"):
        assert read[name] == getattr(REQUEST, name)


def test_what_is_not_given_is_not_said():
    line = plain_line(Request("m2mkd run demo", "demo-1"), None, waits=True)
    assert line == "ray job submit --submission-id demo-1 -- m2mkd run demo"


def test_an_id_that_was_used_gets_the_number_of_the_attempt():
    assert next_id("demo-a", set()) == "demo-a"
    assert next_id("demo-a", {"demo-b", "demo-a-2"}) == "demo-a"
    assert next_id("demo-a", {"demo-a", "demo-a-2", "demo-a-4"}) == "demo-a-3"


def job(status: str, key: str = "k", store: str = "/s") -> JobDetails:
    """As the job server describes one."""
    return JobDetails(
        type="SUBMISSION",
        submission_id="demo-k",
        status=status,
        entrypoint="m2mkd run demo",
        metadata={"recipe_key": key, "store": store},
    )


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_run_that_runs_is_not_started_again(status):
    with pytest.raises(LockedError, match=f"demo-k of the same run is {status} .*m2mkd stop demo-k"):
        refuse_second([job("FAILED"), job(status)], "k", "/s")


def test_other_runs_and_dead_ones_are_in_nobodys_way():
    dead = [job(status) for status in ("SUCCEEDED", "FAILED", "STOPPED")]
    without = JobDetails(type="DRIVER", status="RUNNING", entrypoint="python")
    refuse_second([*dead, job("RUNNING", key="other"), job("RUNNING", store="/other"), without], "k", "/s")
