"""What a sweep's workers hold."""

import pytest

from m2mkd_ray.pipeline import variant
from m2mkd_ray.recipe import override
from m2mkd_ray.recipes import find_recipe
from m2mkd_ray.sweeps.watched import gpus_of


@pytest.mark.parametrize(
    ("setting", "role", "expected"),
    [
        ("placement.pairs.resources.gpus=0.5", "pair-0", 0.5),
        ("placement.finetune={engine: deepspeed, num_workers: 2, gpus_per_worker: 1}", "finetune", 2),
        ("placement.finetune={engine: torch}", "finetune", 0),
    ],
)
def test_gpus_of_a_stage_are_its_workers_and_its_ranks(setting: str, role: str, expected: float) -> None:
    stage = variant(override(find_recipe("demo"), [setting]))[role]
    assert gpus_of(stage) == expected
