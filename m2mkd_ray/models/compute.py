"""What models cost: multiply-accumulates (MAC) per image, from their sizes.

Matrix products only (attention's two included), as papers count; norms, softmax and
routing are left out. Checked against the figures of docs/method.md: 28.7 GMAC for
V-MoE-Base, 209 for its four pairs. What a student and its modules cost is its family's to say.
"""

from dataclasses import dataclass
from typing import Literal

from m2mkd_ray.blueprint import Blueprint, ModulePair
from m2mkd_ray.models.families import family
from m2mkd_ray.models.vit_macs import vit_block_macs, vit_class_token_macs

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


def student_macs(blueprint: Blueprint) -> float:
    """Forward MAC of the whole student, per image, of a V-MoE without stem and head."""
    return family(blueprint.student.family).macs(blueprint)


def pair_cost(blueprint: Blueprint, pair: ModulePair, *, with_teacher: bool = True) -> PairCost:
    """MAC of one image through a pair; without teacher for `alpha=0`."""
    block, of_family = vit_block_macs(blueprint.teacher), family(blueprint.student.family)
    num_after = blueprint.num_modules - 1 - pair.index
    teacher_blocks = pair.teacher_blocks[1] - pair.teacher_blocks[0]
    handed_on = of_family.num_tokens(blueprint, pair.index)
    return PairCost(
        before=block * pair.index,
        teacher=block * (teacher_blocks + num_after) if with_teacher else 0.0,
        student=of_family.module_macs(blueprint, pair.index) * (1 + BACKWARD),
        after=vit_block_macs(blueprint.teacher, handed_on) * num_after * 2,
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
    vit, of_family = blueprint.teacher, family(blueprint.student.family)
    block, short = vit_block_macs(vit), vit_class_token_macs(vit)
    is_last = pair.index == blueprint.num_modules - 1
    teacher_module = block * (pair.teacher_blocks[1] - pair.teacher_blocks[0]) - (block - short if is_last else 0.0)
    before, after = block * pair.index, _after(blueprint, pair)
    if module == "teacher":
        return PairCost(before=before, teacher=0.0, student=teacher_module * (1 + BACKWARD), after=after * 2)
    own = of_family.module_macs(blueprint, pair.index, short=is_last)
    handed_on = of_family.num_tokens(blueprint, pair.index)
    return PairCost(
        before=before,
        teacher=teacher_module + after,
        student=own * (1 + BACKWARD),
        after=_after(blueprint, pair, handed_on) * 2,
    )


def _after(blueprint: Blueprint, pair: ModulePair, num_tokens: int | None = None) -> float:
    """Forward MAC of the meta modules after a pair, as they are carried out, of so many tokens."""
    vit, num_after = blueprint.teacher, blueprint.num_modules - 1 - pair.index
    if num_after == 0:
        return 0.0
    return vit_block_macs(vit, num_tokens) * (num_after - 1) + vit_class_token_macs(vit, num_tokens)


def step_flops(
    blueprint: Blueprint, pair: ModulePair, *, module: Module = "student", with_teacher: bool = True
) -> float:
    """Floating-point operations of `step_cost`, two a MAC; without those of the teacher where it is not run."""
    cost = step_cost(blueprint, pair, module=module)
    return 2 * (cost.total - (0.0 if with_teacher else cost.teacher))


def module_stage_factor(blueprint: Blueprint, *, with_teacher: bool = True) -> float:
    """Cost of an epoch of all pairs, in epochs of training the whole student end to end."""
    pairs = sum(pair_cost(blueprint, pair, with_teacher=with_teacher).total for pair in blueprint.pairs)
    return pairs / (student_macs(blueprint) * (1 + BACKWARD))
