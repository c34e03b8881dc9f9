"""Costs against figures that were counted elsewhere: docs/method.md, timm's papers, and torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_ray.blueprint import Blueprint, Moe, Student, Vit
from m2mkd_ray.models import create_vit, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.models.compute import (
    hybrid_flops,
    module_stage_factor,
    pair_cost,
    pair_flops,
    prefix_flops,
    step_cost,
    step_flops,
    student_macs,
    vit_block_macs,
)

GIGA = 1e9


@pytest.fixture
def vmoe_base() -> Blueprint:
    """DeiT-Large, cut 6-6-6-6, and V-MoE-Base."""
    return Blueprint(
        teacher=Vit(name="vit_large_patch16_224", depth=24),
        teacher_depths=(6, 6, 6, 6),
        student=Student(vit=Vit(name="vit_base_patch16_224", depth=12), moe=Moe(num_experts=8, top_k=2)),
        student_depths=(3, 3, 3, 3),
    )


def test_the_published_students_blocks_cost_what_the_method_says(vmoe_base: Blueprint) -> None:
    assert student_macs(vmoe_base) / GIGA == pytest.approx(28.7, abs=0.15)  # stem and head are 0.1 of that
    assert 3 * student_macs(vmoe_base) / GIGA == pytest.approx(86.2, abs=0.4)


def test_the_published_pairs_cost_what_the_method_says(vmoe_base: Blueprint) -> None:
    costs = [pair_cost(vmoe_base, pair) for pair in vmoe_base.pairs]
    assert sum(cost.total for cost in costs) / GIGA == pytest.approx(209, abs=1)
    assert module_stage_factor(vmoe_base) == pytest.approx(2.42, abs=0.02)  # "242 epochs" for 100


def test_a_pairs_parts_are_the_passes_that_it_makes(vmoe_base: Blueprint) -> None:
    block = vit_block_macs(vmoe_base.teacher)
    for pair in vmoe_base.pairs:
        cost, num_after = pair_cost(vmoe_base, pair), 3 - pair.index
        assert cost.before == pytest.approx(pair.index * block)
        assert cost.teacher == pytest.approx((6 + num_after) * block)
        assert cost.after == pytest.approx(2 * num_after * block)
        assert cost.student == pytest.approx(3 * student_macs(vmoe_base) / 4)
        assert cost.total == cost.before + cost.teacher + cost.after + cost.student


def test_without_a_teacher_a_pair_is_cheaper_by_its_passes(vmoe_base: Blueprint) -> None:
    for pair in vmoe_base.pairs:
        both = pair_cost(vmoe_base, pair), pair_cost(vmoe_base, pair, with_teacher=False)
        assert both[0].total - both[1].total == pytest.approx(both[0].teacher)
        assert both[1].teacher == 0
    assert module_stage_factor(vmoe_base, with_teacher=False) < module_stage_factor(vmoe_base)


def test_a_block_costs_what_torch_counts() -> None:
    vit = Vit(name="vit_tiny_patch16_224", img_size=32, patch_size=8, width=48, depth=1, num_heads=4, mlp_ratio=3)
    block = create_vit(vit).blocks[0]
    block.attn.fused_attn = False  # torch does not count its fused attention on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(torch.randn(1, 17, 48))
    assert 2 * vit_block_macs(vit) == counter.get_total_flops()  # a MAC is two operations


def test_plain_blocks_of_a_student_count_one_mlp(vmoe_base: Blueprint) -> None:
    half = vmoe_base.model_copy(
        update={"student": vmoe_base.student.model_copy(update={"moe": Moe(blocks="every_2")})}
    )
    base = Vit(name="vit_base_patch16_224")
    saved = student_macs(vmoe_base) - student_macs(half)
    assert saved == pytest.approx(6 * 197 * 2 * 768 * 3072)
    assert 17.4 < 12 * vit_block_macs(base) / GIGA < 17.6  # ViT-B/16 as every paper has it


def test_pairs_of_the_paper_cost_what_was_counted_by_hand(vmoe_base: Blueprint) -> None:
    """DeiT-L to V-MoE-B: 119, 109, 99 and 89 GF an image, 263 for all four where the teacher's logits are at hand."""
    each = [pair_flops(vmoe_base, index) / GIGA for index in range(4)]
    assert each == pytest.approx([119, 109, 99, 89], abs=1)
    assert sum(each) == pytest.approx(416, abs=2)
    assert sum(pair_flops(vmoe_base, i, with_teacher=False) for i in range(4)) / GIGA == pytest.approx(263, abs=2)


def test_a_teachers_own_module_costs_its_training_and_the_meta_model_around_it(vmoe_base: Blueprint) -> None:
    """Forward through what is before, three passes of the module, two of what is after."""
    block = vit_block_macs(vmoe_base.teacher)
    assert pair_flops(vmoe_base, 1, module="teacher") == pytest.approx(2 * block * (1 + 3 * 6 + 2 * 2))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_step_costs_its_pair_less_what_class_tokens_spare(vmoe_base: Blueprint, index: int) -> None:
    """By hand for DeiT-L and V-MoE-B: L = 197, D = 1024 and 768, heads of 64, 4 D wide MLPs, two experts a token."""

    def macs(width: int, experts: int) -> int:
        return 197 * (4 * width**2 + 8 * width**2 * experts) + 2 * 197**2 * width

    def short(width: int, experts: int) -> int:
        return 4 * width**2 + 8 * width**2 * experts + 2 * (width // 64) * 197 * width

    block, first, student = macs(1024, 1), short(1024, 1), macs(768, 2)
    if index == 3:
        teacher = 5 * block + first
        own = 3 * (2 * student + short(768, 2))
        expected = 3 * block + teacher + own
    else:
        suffix = (2 - index) * block + first
        expected = index * block + (6 * block + suffix) + 3 * 3 * student + 2 * suffix
    assert step_flops(vmoe_base, vmoe_base.pairs[index]) == pytest.approx(2 * expected)


def test_a_step_of_the_teachers_own_module_costs_its_blocks_with_the_last_one_short(vmoe_base: Blueprint) -> None:
    block = 197 * 12 * 1024**2 + 2 * 197**2 * 1024
    short = 12 * 1024**2 + 2 * 16 * 197 * 1024
    expected = {1: block + 3 * 6 * block + 2 * (block + short), 3: 3 * block + 3 * (5 * block + short)}
    for index, macs in expected.items():
        for with_teacher in (True, False):
            found = step_flops(vmoe_base, vmoe_base.pairs[index], module="teacher", with_teacher=with_teacher)
            assert found == pytest.approx(2 * macs)


def test_without_a_teacher_a_step_is_cheaper_by_its_pass(vmoe_base: Blueprint) -> None:
    for pair in vmoe_base.pairs:
        spared = step_flops(vmoe_base, pair) - step_flops(vmoe_base, pair, with_teacher=False)
        assert spared == pytest.approx(2 * step_cost(vmoe_base, pair).teacher)


def test_a_short_block_costs_what_torch_counts() -> None:
    vit = Vit(name="vit_tiny_patch16_224", img_size=32, patch_size=8, width=48, depth=2, num_heads=4, mlp_ratio=3)
    short = class_token_alone(split(create_vit(vit), (1, 1))[1])[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        short(torch.randn(1, 17, 48))
    assert counter.get_total_flops() == 2 * (4 * 48**2 + 6 * 48**2 + 2 * 4 * 17 * 48)


def test_a_teacher_hybrid_costs_a_forward_pass_and_its_prefix_is_what_is_before(vmoe_base: Blueprint) -> None:
    block = vit_block_macs(vmoe_base.teacher)
    for index in range(4):
        assert prefix_flops(vmoe_base, index) == pytest.approx(2 * block * index)
        assert hybrid_flops(vmoe_base, index) == pytest.approx(2 * block * (3 + 6))
