"""Monolithic ViTs: timm's, and how one is cut into modules.

B = images, C = 3, H = W = img_size, L = tokens, D = width, K = classes

A module's type depends only on its place: the first takes images (B, C, H, W),
the last gives logits (B, K), the others map tokens (B, L, D) to tokens. So the
modules of a ViT in a row are the ViT, and a module of one ViT may stand in
another's row as long as their widths agree.

Tensors are computed by timm's own methods (`_pos_embed`, `pool`, `forward_head`)
on the ViT's own parts, so that every ViT that timm builds from its
`VisionTransformer` can be cut, bit for bit: DeiT, DeiT III, DINOv2, CLIP.
"""

import difflib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from typing import cast

import timm
import torch
from timm.layers import DropPath
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.errors import UsageError


class Stem(nn.Module):
    """A ViT's way from images (B, C, H, W) to tokens (B, L, D); shares the ViT's parameters."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token
        self.reg_token = vit.reg_token
        self.pos_embed = vit.pos_embed
        self.pos_drop = vit.pos_drop
        self.patch_drop = vit.patch_drop
        self.norm_pre = vit.norm_pre
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.no_embed_class = vit.no_embed_class
        self.dynamic_img_size = vit.dynamic_img_size

    def forward(self, images: Tensor) -> Tensor:
        """The first four lines of `VisionTransformer.forward_features`."""
        as_vit = cast(VisionTransformer, self)  # it has all that timm's method reads
        tokens = VisionTransformer._pos_embed(as_vit, self.patch_embed(images))  # (B, L, D)
        return self.norm_pre(self.patch_drop(tokens))


class Head(nn.Module):
    """A ViT's way from tokens (B, L, D) to logits (B, K); shares the ViT's parameters."""

    pool = VisionTransformer.pool

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.norm = vit.norm
        self.attn_pool = vit.attn_pool
        self.fc_norm = vit.fc_norm
        self.head_drop = vit.head_drop
        self.head = vit.head
        self.global_pool = vit.global_pool
        self.num_prefix_tokens = vit.num_prefix_tokens
        self.pool_include_prefix = vit.pool_include_prefix

    def forward(self, tokens: Tensor) -> Tensor:
        """The last line of `VisionTransformer.forward_features`, then `forward_head`."""
        as_vit = cast(VisionTransformer, self)
        return VisionTransformer.forward_head(as_vit, self.norm(tokens))


def create_vit(vit: Vit, drop_path: float = 0.0) -> VisionTransformer:
    """Build a timm ViT with random weights, drawn from torch's global generator.

    Args:
        vit: the entry point, and what differs from it.
        drop_path: stochastic depth of the last block; grows linearly from 0 at the first.

    Raises:
        UsageError: timm has no such ViT, it cannot be built with these sizes, or it cannot be cut into modules.
    """
    _check_name(vit.name)
    try:
        model = timm.create_model(
            vit.name,
            pretrained=False,
            img_size=vit.img_size,
            num_classes=vit.num_classes,
            drop_path_rate=drop_path,
            patch_size=vit.patch_size,  # timm leaves out what is None
            embed_dim=vit.width,
            depth=vit.depth,
            num_heads=vit.num_heads,
            mlp_ratio=vit.mlp_ratio,
        )
    except (AssertionError, TypeError) as error:  # timm checks sizes with `assert`
        raise UsageError(f"timm cannot build {vit!r}: {error!r}. Change the sizes in the blueprint.") from error
    return _cuttable(model, vit)


@cache
def one_block(vit: Vit) -> VisionTransformer:
    """The ViT with a single block and without tensors, for its sizes."""
    with torch.device("meta"):
        return create_vit(vit.model_copy(update={"depth": 1}))


def width(vit: Vit) -> int:
    """Width of a ViT's tokens, also where the blueprint leaves it to the entry point."""
    return vit.width if vit.width is not None else one_block(vit).embed_dim


def num_tokens(vit: Vit) -> int:
    """Tokens of a ViT, prefix included."""
    return tokens_of(one_block(vit))


def tokens_of(vit: VisionTransformer) -> int:
    """Tokens of a ViT, prefix included."""
    return int(vit.num_prefix_tokens + vit.patch_embed.num_patches)


def split(vit: VisionTransformer, depths: Sequence[int]) -> list[nn.Sequential]:
    """Cut a ViT into modules of `depths` blocks that share its parameters.

    The first module also holds the stem and the last the head, so that the
    modules in a row are the ViT: `nn.Sequential(*split(vit, depths))(x) == vit(x)`.
    Whatever else stands in `vit.blocks` (stitches) counts as a block here.

    Raises:
        ValueError: the depths don't add up to the ViT's.
    """
    if sum(depths) != len(vit.blocks):
        raise ValueError(
            f"Module depths {tuple(depths)} add up to {sum(depths)} blocks, but the ViT has {len(vit.blocks)}. "
            f"Change the depths in the blueprint."
        )
    if any(depth < 1 for depth in depths):
        raise ValueError(f"Module depths {tuple(depths)}: every module needs at least one block.")
    blocks = iter(vit.blocks)
    parts: list[list[nn.Module]] = [list(islice(blocks, depth)) for depth in depths]
    parts[0].insert(0, Stem(vit))
    parts[-1].append(Head(vit))
    return [nn.Sequential(*part).train(vit.training) for part in parts]


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each of `depth` blocks: linear from 0 at the first to `last` (timm's rule)."""
    return [last * index / max(1, depth - 1) for index in range(depth)]


def set_drop_path(layers: Iterable[nn.Module], rates: Iterable[float]) -> None:
    """Give each block among the layers its stochastic depth; stems, stitches and heads have none.

    Raises:
        ValueError: there are not as many rates as blocks.
    """
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    for block, rate in zip(blocks, rates, strict=True):
        block.drop_path1 = DropPath(rate) if rate else nn.Identity()
        block.drop_path2 = DropPath(rate) if rate else nn.Identity()


def splice(modules: Sequence[nn.Module], index: int, module: nn.Module) -> nn.Sequential:
    """`modules` in a row, with `module` in the place of the one at `index` (0-based).

    Raises:
        ValueError: there is no such place.
    """
    if not 0 <= index < len(modules):
        raise ValueError(f"Cannot splice a module into place {index}: there are {len(modules)} modules, from 0.")
    return nn.Sequential(*modules[:index], module, *modules[index + 1 :])


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, those that are used twice counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _check_name(name: str) -> None:
    known = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
    architecture = name.split(".")[0]
    if architecture not in known:
        near = ", ".join(difflib.get_close_matches(architecture, known, n=5)) or "vit_base_patch16_224"
        what = "is not a ViT that can be cut into modules" if timm.is_model(name) else "is not known to timm"
        raise UsageError(
            f"{name!r} {what}. Use one of timm's plain ViTs, such as {near}; `timm.list_models('vit_*')` lists them."
        )
    if "distilled" in architecture:
        raise UsageError(
            f"{name!r} has a distillation token and a second head, so its logits are the mean of two. "
            f"Use {architecture.replace('_distilled', '')!r}."
        )
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True))
        raise UsageError(f"timm has no weights {name!r}. It has: {tags or 'none for this ViT'}.") from error


def _cuttable(model: nn.Module, vit: Vit) -> VisionTransformer:
    if type(model) is not VisionTransformer:
        raise UsageError(f"{vit.name!r} is a {type(model).__name__}, which cannot be cut into modules.")
    if not model.has_class_token or model.attn_pool is not None:
        lacks = "pools by attention" if model.attn_pool is not None else "has no class token"
        raise UsageError(f"{vit.name!r} {lacks}, but modules need a ViT with a class token and a linear head.")
    patch_size = model.patch_embed.patch_size[0]
    if vit.img_size % patch_size:
        raise UsageError(
            f"img_size {vit.img_size} is not a multiple of {patch_size}, the patch size of {vit.name!r}. "
            f"Change img_size or set patch_size."
        )
    return model
