"""The family V-MoE: a ViT whose MLPs are mixtures, as m2mKD trains it (kamanphoebe/m2mKD `vmoe.py`).

Between the meta model's modules a student module needs stitches at its ends (D = the student's width, T = the
teacher's):

    module 0      stem, blocks, stitch D -> T
    module i      stitch T -> D, blocks, stitch D -> T
    module N - 1  stitch T -> D, blocks, head

The final student drops them (the reference's default since May 2024) or keeps them (its default before), in which
case `vit.blocks` holds them between the blocks and the student is exactly its modules in a row. When student and
teacher have the same width the stitches are there all the same, as in the reference.
"""

from collections.abc import Sequence
from functools import cache
from itertools import count

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_ray.blueprint import Blueprint, Moe
from m2mkd_ray.errors import UsageError
from m2mkd_ray.models.fill import Rules
from m2mkd_ray.models.moe import MoeMlp
from m2mkd_ray.models.stitch import Stitch
from m2mkd_ray.models.vit import create_vit, drop_path_rates, set_drop_path, split, width
from m2mkd_ray.models.vit import num_tokens as tokens_of_vit
from m2mkd_ray.models.vit_macs import block_macs, class_token_macs


def model(blueprint: Blueprint, drop_path: float = 0.0, *, keep_stitches: bool = False) -> VisionTransformer:
    """Build the whole student, images (B, 3, H, W) to logits (B, K), with random weights.

    Args:
        blueprint: what to build.
        drop_path: stochastic depth of the last block; grows linearly from 0 at the first.
        keep_stitches: keep the stitches between the modules, in `vit.blocks`.

    Raises:
        UsageError: the ViT cannot be built, has not as many blocks as the modules, or blocks without a plain MLP.
    """
    vit = _sparse_vit(blueprint, drop_path)
    if keep_stitches:
        vit.blocks = nn.Sequential(*(layer for row in _stitched_rows(vit, blueprint) for layer in row))
    return vit


def modules(blueprint: Blueprint, drop_path: float = 0.0) -> list[nn.Sequential]:
    """Build the student's modules, with stitches to the teacher's width and random weights.

    Module 0 maps images to tokens (B, L, T), the last one tokens (B, L, T) to logits, the others tokens to tokens.
    `drop_path` is the stochastic depth of a module's last block; it grows linearly from 0 at its first, since a
    module is trained alone (kamanphoebe/m2mKD builds it as a ViT of its own depth).

    Raises:
        UsageError: as `model`.
    """
    vit = model(blueprint, keep_stitches=True)
    last, depths = blueprint.num_modules - 1, blueprint.student_depths
    parts = split(vit, [depth + (index > 0) + (index < last) for index, depth in enumerate(depths)])
    for part, depth in zip(parts, depths, strict=True):
        set_drop_path(part, drop_path_rates(drop_path, depth))
    return parts


def rules(blueprint: Blueprint, *, keep_stitches: bool = False) -> list[Rules]:
    """Where the tensors of every module go in `model(blueprint, keep_stitches=keep_stitches)`.

    In every module the blocks stand at places 1 to depth, the stem or a stitch before them, a stitch or the head
    after them.
    """
    place = count()  # in `vit.blocks`
    rows: list[Rules] = []
    for index, depth in enumerate(blueprint.student_depths):
        row: dict[str, str | None] = {}
        for layer in range(depth + 2):
            is_stem = index == 0 and layer == 0
            is_head = index == blueprint.num_modules - 1 and layer == depth + 1
            is_block = 1 <= layer <= depth
            if is_stem or is_head:
                row[rf"{layer}\.(.+)"] = r"\1"
            elif is_block or keep_stitches:
                row[rf"{layer}\.(.+)"] = rf"blocks.{next(place)}.\1"
            else:
                row[rf"{layer}\..+"] = None
        rows.append(row)
    return rows


def fresh(blueprint: Blueprint) -> tuple[str, ...]:
    """No tensor of a V-MoE: every one of them is trained in a module."""
    return ()


def macs(blueprint: Blueprint) -> float:
    """Forward MAC of the whole student's blocks, per image; stem and head are left out."""
    return sum(block_macs(_without_tensors(blueprint), index) for index in range(sum(blueprint.student_depths)))


def module_macs(blueprint: Blueprint, index: int, *, short: bool = False) -> float:
    """Forward MAC of a module's blocks, per image; `short`: the last one for the class token alone."""
    vit, (first, last) = _without_tensors(blueprint), blueprint.pairs[index].student_blocks
    *before, end = (block_macs(vit, block) for block in range(first, last))
    return sum(before) + (class_token_macs(vit, last - 1) if short else end)


def num_tokens(blueprint: Blueprint, index: int) -> int:
    """Tokens that a module hands on in the meta model: all."""
    return tokens_of_vit(blueprint.teacher)


def for_modules(blueprint: Blueprint) -> Blueprint:
    """All of the blueprint: the student is its modules, so nothing is for one of the two alone."""
    return blueprint


def for_training(blueprint: Blueprint) -> Blueprint:
    """All of the blueprint, likewise."""
    return blueprint


@cache
def _without_tensors(blueprint: Blueprint) -> VisionTransformer:
    with torch.device("meta"):
        return model(blueprint)


def _sparse_vit(blueprint: Blueprint, drop_path: float) -> VisionTransformer:
    student = blueprint.student
    assert student.vit is not None  # the blueprint has seen to it
    vit = create_vit(student.vit, drop_path)
    if len(vit.blocks) != sum(blueprint.student_depths):
        raise UsageError(
            f"student_depths {blueprint.student_depths} add up to {sum(blueprint.student_depths)} blocks, "
            f"but {student.vit.name!r} has {len(vit.blocks)}. Set the student's depth or change student_depths."
        )
    for index in _sparse_blocks(student.moe, len(vit.blocks)):
        mlp = getattr(vit.blocks[index], "mlp", None)
        if type(mlp) is not Mlp:
            raise UsageError(
                f"Block {index} of {student.vit.name!r} has {type(mlp).__name__} where a plain MLP was expected, "
                f"so it cannot become a mixture. Choose another ViT for the student."
            )
        vit.blocks[index].mlp = MoeMlp(
            vit.embed_dim,
            len(mlp.fc1.weight),
            num_experts=student.moe.num_experts,
            top_k=student.moe.top_k,
            expert_init=student.moe.expert_init,
        )
    return vit


def _sparse_blocks(moe: Moe, depth: int) -> Sequence[int]:
    if moe.blocks == "all":
        return range(depth)
    if moe.blocks == "every_2":
        return range(1, depth, 2)
    missing = [index for index in moe.blocks if not 0 <= index < depth]
    if missing:
        raise UsageError(f"moe.blocks names blocks {missing}, but the student has blocks 0 to {depth - 1}.")
    return sorted(set(moe.blocks))


def _stitched_rows(vit: VisionTransformer, blueprint: Blueprint) -> list[list[nn.Module]]:
    """The blocks of every module, between its stitches."""
    student_width, teacher_width = vit.embed_dim, width(blueprint.teacher)
    last = blueprint.num_modules - 1
    return [
        [
            *([Stitch(teacher_width, student_width)] if pair.index > 0 else []),
            *list(vit.blocks)[slice(*pair.student_blocks)],
            *([Stitch(student_width, teacher_width)] if pair.index < last else []),
        ]
        for pair in blueprint.pairs
    ]
