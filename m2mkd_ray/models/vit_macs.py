"""Multiply-accumulates (MAC) of a ViT's blocks per image, with a plain MLP or a mixture.

L = tokens, D = width

Matrix products only (attention's two included), as papers count; norms, softmax and routing are left out.
"""

from functools import cache
from typing import cast

from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_ray.blueprint import Vit
from m2mkd_ray.models.moe import MoeMlp
from m2mkd_ray.models.vit import one_block, tokens_of


@cache
def vit_block_macs(vit: Vit, num_tokens: int | None = None) -> float:
    """Forward MAC of one block of a ViT; of so many tokens, or of as many as an image has."""
    return block_macs(one_block(vit), 0, num_tokens)


@cache
def vit_class_token_macs(vit: Vit, num_tokens: int | None = None) -> float:
    """Forward MAC of one block of a ViT where it is computed for the class token alone."""
    return class_token_macs(one_block(vit), 0, num_tokens)


def block_macs(model: VisionTransformer, index: int, num_tokens: int | None = None) -> float:
    """L (4 D^2 + 2 D H k) + 2 L^2 D, with hidden width H and k experts a token (k = 1 for a plain MLP)."""
    tokens, width = num_tokens or tokens_of(model), model.embed_dim
    return tokens * (4 * width**2 + _mlp_macs(model, index)) + 2 * tokens**2 * width


def class_token_macs(model: VisionTransformer, index: int, num_tokens: int | None = None) -> float:
    """4 D^2 + 2 D H k of one token, and 2 h L D for its h heads' way over all of them."""
    width, heads = model.embed_dim, cast(Attention, model.blocks[index].attn).num_heads
    return 4 * width**2 + _mlp_macs(model, index) + 2 * heads * (num_tokens or tokens_of(model)) * width


def _mlp_macs(model: VisionTransformer, index: int) -> float:
    """2 D H k of one token."""
    mlp = model.blocks[index].mlp
    if isinstance(mlp, MoeMlp):
        hidden, top_k = int(mlp.experts.w1.shape[-1]), mlp.router.top_k
    else:
        assert isinstance(mlp, Mlp)
        hidden, top_k = cast(nn.Linear, mlp.fc1).out_features, 1
    return 2 * model.embed_dim * hidden * top_k
