"""The stage `profile-<device>`: what a step of each pair costs here."""

import json

import pytest
import torch

from m2mkd_ray.commands.measuring import OnItsType
from m2mkd_ray.commands.placing import profiles, profiling, step_s, works_of
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.placement import View
from m2mkd_ray.execution.planner import expected_s
from m2mkd_ray.models.compute import pair_flops, prefix_flops
from m2mkd_ray.stages.profile import PROFILE, Profile, measure


@pytest.fixture(scope="module")
def profiled(chain) -> Profile:
    """The profile of the chain's pairs on this CPU."""
    folder = chain.run(profiling(chain.stage("pair-0"), "cpu"))
    return Profile.model_validate(json.loads((folder / PROFILE).read_text()))


def test_a_profile_tells_every_pairs_parts(profiled, chain) -> None:
    assert len(profiled.pairs) == chain.recipe.blueprint.num_modules
    assert profiled.decode > 0
    for pair in profiled.pairs:
        parts = pair.prefix + pair.teacher + pair.student + pair.suffix
        assert pair.seconds > 0
        # Parts are timed one by one, so they add up but for what a loaded machine adds.
        assert parts >= pair.seconds * (1 - 1e-9)
        assert pair.occupancy == 1
        assert pair.memory_gb > 0


def test_the_first_pair_has_no_prefix(profiled) -> None:
    assert profiled.pairs[0].prefix == 0
    assert all(pair.prefix > 0 for pair in profiled.pairs[1:])


def test_all_pairs_of_a_recipe_share_a_profile_and_other_settings_have_another(chain) -> None:
    addresses = {profiling(chain.stage(f"pair-{i}"), "cpu").address for i in range(4)}
    assert len(addresses) == 1
    assert profiling(chain.stage("pair-0"), "L4").address not in addresses
    assert profiling(chain.stage("incubate-0"), "cpu").address not in addresses
    other = chain.with_settings("placement.pairs.micro_batch=8")
    assert profiling(other.stage("pair-0"), "cpu").address not in addresses


def test_without_a_teacher_a_step_costs_no_teacher(chain) -> None:
    config = profiling(chain.with_settings("pairs.distill.alpha=0").stage("pair-2"), "cpu").config
    assert measure(config, 2, torch.device("cpu")).teacher == 0


def test_costs_are_measured_where_a_profile_is_and_else_follow_from_flops(profiled, chain) -> None:
    pair = chain.stage("pair-2")
    nodes = [Node("a", {"CPU": 2.0}), Node("b", {"CPU": 2.0}, labels={"ray.io/node-group": "big"})]
    work = works_of([pair], chain.recipe, nodes, chain.store)[pair.address]
    images = 3 * 32  # 0.6 epochs of 160 rows in batches of 32
    each = profiled.pairs[2].seconds + profiled.decode
    assert work.seconds["cpu"] == pytest.approx(each * images)
    flops, prefix = pair_flops(pair.config.blueprint, 2), prefix_flops(pair.config.blueprint, 2)
    assert work.seconds["big"] == pytest.approx(expected_s(flops * images, "big"))
    shared = (profiled.pairs[2].prefix + profiled.decode) / each
    assert work.shared == pytest.approx(min(shared, prefix / flops))


def test_a_profile_is_asked_for_once_a_type_of_device_and_measured_there(chain) -> None:
    pairs = [chain.stage("pair-0"), chain.stage("pair-1")]
    nodes = [
        Node("a", {"CPU": 2.0}),
        Node("b", {"CPU": 2.0}),
        Node("c", {"CPU": 4.0}, labels={"ray.io/node-group": "big"}),
    ]
    wanted = profiles(pairs, nodes)
    assert [stage.name for stage in wanted] == ["profile-cpu", "profile-big"]
    seats = OnItsType().seats(wanted, View(nodes))
    assert [seat.node in of_type for seat, of_type in zip(seats, (("a", "b"), ("c",)))] == [True, True]


def test_a_profile_of_a_gpu_is_not_measured_on_another_device(chain) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which may be of that type")
    with pytest.raises(Exception, match="Measuring costs on H100: the worker's device is cpu"):
        chain.run(profiling(chain.stage("pair-0"), "H100"))


def test_decoding_comes_on_top_or_goes_on_beside() -> None:
    assert step_s(3.0, 1.0, workers=0) == 4.0
    assert step_s(3.0, 1.0, workers=2) == 3.0
    assert step_s(1.0, 8.0, workers=2) == 4.0


@pytest.mark.gpu
def test_on_a_gpu_memory_and_kernel_time_are_measured(chain) -> None:
    stage = profiling(chain.stage("pair-1"), torch.cuda.get_device_name())
    profile = Profile.model_validate(json.loads((chain.run(stage) / PROFILE).read_text()))
    assert all(0 < pair.memory_gb < 2 for pair in profile.pairs)
    assert all(0 < pair.occupancy <= 1 for pair in profile.pairs)
