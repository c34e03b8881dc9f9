"""What rank 0 says reaches the stage: all of it, to the last word, whatever happens on the way."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import ray

from m2mkd_ray.errors import StoreError
from m2mkd_ray.execution.relay import relay

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    """A local Ray, in a folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="m2-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


class Stage:
    """The part of a stage's context that a relay uses."""

    def __init__(self, fails: int = 0) -> None:
        self.steps: list[int] = []
        self.fails = fails

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float], landmarks: Any = ()) -> None:
        if self.fails:
            self.fails -= 1
            raise StoreError("the network blinked")
        self.steps.append(step)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_reports_arrive_and_the_last_one_too() -> None:
    stage = Stage()
    with relay(stage, every_s=0.1) as actor:  # type: ignore[arg-type]  # a context that only reports
        ray.get(actor.put.remote(1, 9, {"loss": 0.5}))
        wait_for(lambda: stage.steps == [1])
    with relay(stage, every_s=60) as actor:  # type: ignore[arg-type]
        ray.get(actor.put.remote(9, 9, {"loss": 0.25}))
    assert stage.steps == [1, 9]


def test_an_error_on_the_way_is_told_once_and_reports_go_on(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(fails=2)
    with relay(stage, every_s=0.1) as actor:  # type: ignore[arg-type]
        for step in range(1, 4):
            ray.get(actor.put.remote(step, 9, {}))
            time.sleep(0.3)
        wait_for(lambda: stage.steps == [3])
    assert caplog.text.count("progress is not known") == 1
    assert "the network blinked" in caplog.text


def test_an_actor_that_dies_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    with relay(stage, every_s=0.1) as actor:  # type: ignore[arg-type]
        ray.get(actor.put.remote(1, 9, {}))
        wait_for(lambda: stage.steps == [1])
        ray.kill(actor, no_restart=False)

        def says_more() -> bool:
            actor.put.remote(2, 9, {})
            time.sleep(0.2)
            return 2 in stage.steps

        wait_for(says_more)


def test_a_relay_whose_actor_is_gone_for_good_ends_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    with relay(stage, every_s=0.1) as actor:  # type: ignore[arg-type]
        ray.get(actor.put.remote(1, 9, {}))
        wait_for(lambda: stage.steps == [1])
        ray.kill(actor)
        wait_for(lambda: "progress is not known" in caplog.text)
    assert stage.steps == [1]
