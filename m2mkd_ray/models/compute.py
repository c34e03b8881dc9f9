"""What models cost: multiply-accumulates (MAC) per image, from their sizes.

L = tokens, D = width

Matrix products only (attention's two included), as papers count; norms, softmax and
routing are left out. Checked against the figures of docs/method.md: 28.7 GMAC for
V-MoE-Base, 209 for its four pairs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_ray.blueprint import Blueprint, ModulePair, Vit
from m2mkd_ray.models.families import family
from m2mkd_ray.models.moe import MoeMlp
from m2mkd_ray.models.vit import create_vit

BACKWARD = 2
"""A backward pass through weights and activations costs two forward passes; through activations alone, one."""


Module = Literal["student", "teacher"]
"""Whose module is trained."""


@dataclass(frozen=True)
class PairCost:
    """MAC of one image through one pair, a training step of its student module."""

    before: float
    """The meta modules before the pair, forward."""
    teacher: float
    """The teacher module and the meta modules after it, forward."""
    student: float
    """The student module, forward and backward."""
    after: float
    """The meta modules after the student, forward, and backward through activations."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.before + self.teacher + self.student + self.after


@cache
def vit_block_macs(vit: Vit) -> float:
    """Forward MAC of one block of a ViT, per image."""
    return _block_macs(_one_block(vit), 0)


def student_macs(blueprint: Blueprint) -> float:
    """Forward MAC of the whole student's blocks, per image."""
    return sum(_student_blocks(blueprint))


def pair_cost(blueprint: Blueprint, pair: ModulePair, *, with_teacher: bool = True) -> PairCost:
    """MAC of one image through a pair; without teacher for `alpha=0`."""
    block = vit_block_macs(blueprint.teacher)
    num_after = blueprint.num_modules - 1 - pair.index
    first, last = pair.student_blocks
    teacher_blocks = pair.teacher_blocks[1] - pair.teacher_blocks[0]
    return PairCost(
        before=block * pair.index,
        teacher=block * (teacher_blocks + num_after) if with_teacher else 0.0,
        student=sum(_student_blocks(blueprint)[first:last]) * (1 + BACKWARD),
        after=block * num_after * 2,
    )


def pair_flops(blueprint: Blueprint, index: int, *, module: Module = "student", with_teacher: bool = True) -> float:
    """Floating-point operations (two a MAC) of a training step, per image, of the module at a place.

    `teacher` is the teacher's own module, trained with labels alone (Deep Incubation). Without the teacher's part for
    `alpha=0`, or where its logits are at hand.
    """
    pair = blueprint.pairs[index]
    if module == "student":
        return 2 * pair_cost(blueprint, pair, with_teacher=with_teacher).total
    first, last = pair.teacher_blocks
    num_after = blueprint.num_modules - 1 - index
    return 2 * vit_block_macs(blueprint.teacher) * (index + (last - first) * (1 + BACKWARD) + 2 * num_after)


def prefix_flops(blueprint: Blueprint, index: int) -> float:
    """Floating-point operations per image of the meta modules before a place, forward: what a cohort shares."""
    return 2 * vit_block_macs(blueprint.teacher) * index


def hybrid_flops(blueprint: Blueprint, index: int) -> float:
    """Floating-point operations per image of a pair's teacher hybrid, forward: prefix, teacher module and the rest."""
    cost = pair_cost(blueprint, blueprint.pairs[index])
    return 2 * (cost.before + cost.teacher)


def step_cost(blueprint: Blueprint, pair: ModulePair, *, module: Module = "student") -> PairCost:
    """MAC of one image through one pair's training step, as it is carried out.

    The block before each head is computed for the class token alone (`m2mkd_ray.models.class_token`). The step of the
    teacher's own `module` has no teacher.
    """
    block, short = vit_block_macs(blueprint.teacher), _class_token_macs(_one_block(blueprint.teacher), 0)
    num_after, is_last = blueprint.num_modules - 1 - pair.index, pair.index == blueprint.num_modules - 1
    after = 0.0 if is_last else block * (num_after - 1) + short
    teacher_module = block * (pair.teacher_blocks[1] - pair.teacher_blocks[0]) - (block - short if is_last else 0.0)
    own = _short_student_macs(blueprint, pair, is_last=is_last) if module == "student" else teacher_module
    return PairCost(
        before=block * pair.index,
        teacher=teacher_module + after if module == "student" else 0.0,
        student=own * (1 + BACKWARD),
        after=after * 2,
    )


def step_flops(
    blueprint: Blueprint, pair: ModulePair, *, module: Module = "student", with_teacher: bool = True
) -> float:
    """Floating-point operations of `step_cost`, two a MAC; without those of the teacher where it is not run."""
    cost = step_cost(blueprint, pair, module=module)
    return 2 * (cost.total - (0.0 if with_teacher else cost.teacher))


def _short_student_macs(blueprint: Blueprint, pair: ModulePair, *, is_last: bool) -> float:
    first, last = pair.student_blocks
    macs = sum(_student_blocks(blueprint)[first:last])
    if not is_last:
        return macs
    student = _student(blueprint)
    return macs - _block_macs(student, last - 1) + _class_token_macs(student, last - 1)


def module_stage_factor(blueprint: Blueprint, *, with_teacher: bool = True) -> float:
    """Cost of an epoch of all pairs, in epochs of training the whole student end to end."""
    pairs = sum(pair_cost(blueprint, pair, with_teacher=with_teacher).total for pair in blueprint.pairs)
    return pairs / (student_macs(blueprint) * (1 + BACKWARD))


@cache
def _student(blueprint: Blueprint) -> VisionTransformer:
    with torch.device("meta"):
        model = family(blueprint.student.family).model(blueprint)
    assert isinstance(model, VisionTransformer)
    return model


@cache
def _one_block(vit: Vit) -> VisionTransformer:
    with torch.device("meta"):
        return create_vit(vit.model_copy(update={"depth": 1}))


@cache
def _student_blocks(blueprint: Blueprint) -> tuple[float, ...]:
    model = _student(blueprint)
    return tuple(_block_macs(model, index) for index in range(sum(blueprint.student_depths)))


def _block_macs(model: VisionTransformer, index: int) -> float:
    """L (4 D^2 + 2 D H k) + 2 L^2 D, with hidden width H and k experts a token (k = 1 for a plain MLP)."""
    num_tokens, width, of_mlp = _num_tokens(model), model.embed_dim, _mlp_macs(model, index)
    return num_tokens * (4 * width**2 + of_mlp) + 2 * num_tokens**2 * width


def _class_token_macs(model: VisionTransformer, index: int) -> float:
    """4 D^2 + 2 D H k of one token, and 2 h L D for its h heads' way over all of them."""
    width, heads = model.embed_dim, cast(Attention, model.blocks[index].attn).num_heads
    return 4 * width**2 + _mlp_macs(model, index) + 2 * heads * _num_tokens(model) * width


def _num_tokens(model: VisionTransformer) -> int:
    return int(model.num_prefix_tokens + model.patch_embed.num_patches)


def _mlp_macs(model: VisionTransformer, index: int) -> float:
    """2 D H k of one token."""
    mlp = model.blocks[index].mlp
    if isinstance(mlp, MoeMlp):
        hidden, top_k = int(mlp.experts.w1.shape[-1]), mlp.router.top_k
    else:
        assert isinstance(mlp, Mlp)
        hidden, top_k = cast(nn.Linear, mlp.fc1).out_features, 1
    return 2 * model.embed_dim * hidden * top_k
