"""What a sweep's stages hold of GPUs, by hand."""

import pytest

from m2mkd_ray.execution import Progress, Resources, Stage, StageEnded, StageProgress, StageRetried, StageStarted
from m2mkd_ray.execution.failures import Kind
from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.sweeps.watched import GpuTime


class Hours:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gpus = GpuTime(lambda: self.now)

    def pass_by(self, seconds: float) -> float:
        self.now += seconds
        return self.gpus.seconds


def stage_with(setting: str, role: str) -> Stage:
    return variant(override(find_recipe("demo"), [setting]))[role]


def started(stage: Stage, pid: int) -> StageStarted:
    return StageStarted(stage, {"host": "a", "pid": pid, "actor_id": f"actor-{pid}"}, None)


def said(stage: Stage) -> StageProgress:
    return StageProgress(stage, Progress(1, 10, {}, 0.0, 1, "a"))


def test_a_stage_that_is_tried_again_elsewhere_holds_one_gpu_at_a_time() -> None:
    pair, hours = stage_with("placement.pairs.resources.gpus=1", "pair-0"), Hours()
    hours.gpus.hear(started(pair, 1))
    assert hours.pass_by(5) == pytest.approx(5)
    hours.gpus.hear(StageRetried(pair, Kind.LOST, 1, 0.5, "gone"))
    assert hours.pass_by(100) == pytest.approx(5), "nobody holds one while it waits"
    hours.gpus.hear(started(pair, 2))
    hours.gpus.hear(said(pair))
    assert hours.pass_by(7) == pytest.approx(12)
    hours.gpus.hear(StageEnded(pair, 7.0, {}, {}))
    assert hours.pass_by(1000) == pytest.approx(12)


def test_members_of_a_worker_hold_it_once_until_the_last_has_left() -> None:
    first, second = (stage_with("placement.pairs.resources.gpus=0.5", name) for name in ("pair-0", "pair-1"))
    hours = Hours()
    for stage in (first, second):
        hours.gpus.hear(started(stage, 1))
    assert hours.pass_by(10) == pytest.approx(5)
    hours.gpus.hear(StageEnded(first, 10.0, {}, {}))
    assert hours.pass_by(10) == pytest.approx(10)
    hours.gpus.hear(StageEnded(second, 20.0, {}, {}))
    assert hours.pass_by(10) == pytest.approx(10)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("placement.finetune={engine: deepspeed, num_workers: 2, gpus_per_worker: 1}", 20),
        ("placement.finetune={engine: torch}", 0),
    ],
)
def test_ranks_count_since_their_first_report(setting: str, expected: float) -> None:
    tuned, hours = stage_with(setting, "finetune"), Hours()
    hours.gpus.hear(started(tuned, 1))
    assert hours.pass_by(60) == 0
    hours.gpus.hear(said(tuned))
    assert hours.pass_by(10) == pytest.approx(expected)


def test_a_worker_without_a_gpu_holds_none() -> None:
    pair, hours = stage_with("placement.pairs.resources.cpus=2", "pair-0"), Hours()
    hours.gpus.hear(started(pair, 1))
    assert hours.pass_by(10) == 0
    assert pair.resources == Resources(cpus=2, memory_gb=pair.resources.memory_gb)
