"""The stage `profile-<device>`: what a step of each pair costs here."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block

from m2mkd_ray.commands.measuring import OnItsType
from m2mkd_ray.commands.placing import profiles, profiling, step_s, works_of
from m2mkd_ray.execution import Store
from m2mkd_ray.execution.context import StageContext
from m2mkd_ray.execution.feasibility import Node
from m2mkd_ray.execution.job import here, job
from m2mkd_ray.execution.placement import View
from m2mkd_ray.execution.planning.planner import Planner, expected_s
from m2mkd_ray.execution.worker import WorkerContext, run_job
from m2mkd_ray.models.compute import hybrid_flops, pair_flops, prefix_flops, step_cost
from m2mkd_ray.stages.pair import Frozen, trainee
from m2mkd_ray.stages.parts import member_of
from m2mkd_ray.stages.profile import PROFILE, PairProfile, Profile, engine_of, measure, measured_if_it_fits
from m2mkd_ray.training import TorchEngine


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
        assert 0.8 * pair.seconds < parts <= pair.seconds * (1 + 1e-9)
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
    assert measure(config, 2).teacher == 0


@pytest.mark.parametrize("role", ["pair-0", "pair-3", "incubate-3"])
@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_the_step_that_is_timed_is_the_trainings(role, precision, chain, tmp_path) -> None:
    stage = chain.stage(role)
    train = stage.config.training.train.model_copy(update={"precision": precision})
    training = stage.config.training.model_copy(update={"train": train})
    stage = replace(stage, config=stage.config.model_copy(update={"training": training}))
    for need in stage.needs.values():
        chain.run(need)
    context = WorkerContext(job(stage), chain.store, tmp_path)
    real = member_of(trainee(stage.config, context, Frozen(stage.config.blueprint, context))).engine
    timed = engine_of(profiling(stage, "cpu").config, stage.config.index)
    assert made_of(timed) == made_of(real)


def made_of(engine: TorchEngine) -> list[object]:
    """The modules of what is trained, by name, type and the dtype of their own weights; and the masters."""
    parts = [
        (name, type(part), [weight.dtype for weight in part.parameters(recurse=False)])
        for name, part in engine.objective.named_modules()
        if "drop_path" not in name
    ]
    return [*parts, engine.masters is None, engine.device]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # the compiler's own import
def test_blocks_are_compiled_where_the_training_compiles_them(chain) -> None:
    compiled = profiling(chain.with_settings("placement.pairs.compile=true").stage("pair-0"), "cpu")
    assert compiled.address != profiling(chain.stage("pair-0"), "cpu").address
    blocks = [part for part in engine_of(compiled.config, 0).objective.modules() if isinstance(part, Block)]
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)


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


def test_trials_that_differ_in_what_costs_nothing_share_a_profile(chain) -> None:
    one = profiling(chain.stage("pair-0"), "cpu")
    trial = chain.with_settings("seed=7", "pairs.lr=0.01", "pairs.epochs=2", "pairs.weight_decay=0.1")
    assert profiling(trial.stage("pair-0"), "cpu").address == one.address
    for setting in ("pairs.batch_size=16", "pairs.precision=bf16", "placement.pairs.resources={cpus: 2}"):
        assert profiling(chain.with_settings(setting).stage("pair-0"), "cpu").address != one.address


def test_a_pair_that_reads_logits_costs_no_teacher(chain) -> None:
    cached = chain.with_settings("pairs.views=2", "pairs.cache={kind: float32}")
    pair = cached.stage("pair-1")
    assert not profiling(pair, "cpu").config.with_teacher
    assert profiling(chain.stage("pair-1"), "cpu").config.with_teacher
    work = works_of([pair], cached.recipe, [Node("a", {"CPU": 2.0})])[pair.address]
    assert work.seconds["cpu"] == pytest.approx(expected_s(pair.flops, "cpu"), rel=0.05)
    flops = pair_flops(pair.config.blueprint, 1, with_teacher=False)
    assert work.shared == pytest.approx(prefix_flops(pair.config.blueprint, 1) / flops)


def test_logits_are_written_at_the_speed_of_the_pairs_step(chain) -> None:
    cached = chain.with_settings("pairs.views=2", "pairs.cache={kind: float32}")
    pair, logits = cached.stage("pair-1"), cached.stage("logits-1")
    step = PairProfile(seconds=3.0, prefix=0.5, teacher=0, student=2.0, suffix=0.5, memory_gb=1, occupancy=1)
    profile = Profile(device="big", name="cpu", decode=0.25, pairs=[None, step, step, step])
    store = Store(chain.store.root + "-logits")
    wanted = replace(profiling(pair, "big"), needs={}, run=partial(_write, text=profile.model_dump_json()))
    run_job(job(wanted), store, here())
    alone = replace(pair, needs={"logits": logits})  # the profile of such a pair reads no data
    nodes = [Node("a", {"CPU": 2.0}, labels={"ray.io/node-group": "big"}), Node("b", {"CPU": 2.0})]
    work = works_of([alone, logits], cached.recipe, nodes, store)[logits.address]
    cost = step_cost(pair.config.blueprint, pair.config.blueprint.pairs[1])
    compute = 3.0 * (cost.before + cost.teacher) / (cost.before + cost.student + cost.after)
    assert work.seconds["big"] == pytest.approx((compute + 0.25) * 2 * 160)
    flops = hybrid_flops(pair.config.blueprint, 1)
    assert work.seconds["cpu"] == pytest.approx(expected_s(flops * 2 * 160, "cpu"))


def test_a_pair_that_runs_out_of_memory_is_recorded_and_not_planned_there(chain) -> None:
    config = profiling(chain.stage("pair-0"), "cpu").config
    huge = config.model_copy(update={"batch_size": 10**11, "lanes": 1})  # 10**15 bytes of images
    assert measured_if_it_fits(huge, 0) is None

    pair = chain.stage("pair-0")
    wanted = profiling(pair, "small")
    profile = Profile(device="small", name="cpu", decode=0.1, pairs=[None] * 4)
    store = Store(chain.store.root + "-oom")
    run_job(job(replace(wanted, needs={}, run=partial(_write, text=profile.model_dump_json()))), store, here())
    kept = replace(wanted, needs={})
    assert store.status(kept.address).state == "complete"
    nodes = [Node("a", {"CPU": 2.0}, labels={"ray.io/node-group": "small"}), Node("b", {"CPU": 2.0})]
    work = works_of([replace(pair, needs={})], chain.recipe, nodes, store)[replace(pair, needs={}).address]
    assert work.seconds["small"] == math.inf
    assert work.seconds["cpu"] < math.inf
    (seat,) = Planner({pair.name: work}).seats([pair], View(nodes))
    assert seat.node == "b"


def _write(config: object, context: StageContext, text: str) -> dict[str, float]:
    (context.out / PROFILE).write_text(text)
    return {}


def test_a_profile_waits_for_a_node_of_its_type_that_can_hold_it(chain) -> None:
    wanted = profiling(chain.with_settings("placement.pairs.resources={cpus: 4}").stage("pair-0"), "cpu")
    small, large = Node("a", {"CPU": 2.0}), Node("b", {"CPU": 8.0})
    other = Node("c", {"CPU": 8.0}, labels={"ray.io/node-group": "big"})
    (seat,) = OnItsType().seats([wanted], View([small, large, small]))
    assert seat.node == "b"
    assert OnItsType().seats([wanted], View([small, other])) == []
    said = OnItsType().lacks(wanted, View([small, other]))
    assert said is not None
    assert "a node with devices of type cpu" in said
    assert OnItsType().lacks(wanted, View([large])) is None
