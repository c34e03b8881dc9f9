"""The last block of a ViT that reads the class token alone, computed for that token alone.

The head looks at one token of L, so of the last block's output the others are never used, and no gradient comes back
to them. Queries, projection and MLP (a mixture's routing too) are needed of the class token only. Nor are keys and
values of all tokens: with one query a head, W_k goes to the query's side of q . (W_k x_l + b_k), where b_k adds the
same to all l and falls out of the softmax, and W_v to the other side of the sum over l (as DeepSeek-V2 absorbs them,
arXiv 2405.04434, section 2.1.2). What comes out is the same but for rounding; of the block's work at ViT-L a hundredth
is left. It pays in a hybrid: the meta model's blocks are few, and its last one is run forward for the teacher, forward
and backward for the student.

B = images, L = tokens, D = width, H = heads
"""

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m2mkd_ray.models.vit import Head


class ClassTokenBlock(Block):
    """A block of a ViT for its class token: tokens (B, L, D) to (B, 1, D). Shares the block's parameters and names."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.train(block.training)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]  # there is no mask in a ViT
        """As `Block.forward`, for the first token."""
        attention = cast(Attention, self.attn)
        first = tokens[:, :1] + self.drop_path1(self.ls1(_attend_from_first(attention, self.norm1(tokens))))
        return first + self.drop_path2(self.ls2(self.mlp(self.norm2(first))))


def class_token_alone(module: nn.Module) -> nn.Module:
    """The module, with its last block computed for the class token alone where only that is read.

    Shares all parameters, under the same names. A module without head, of a ViT that pools over tokens, or whose
    attention norms its keys or drops some of its shares, comes back as it is.
    """
    layers = [*module.children()]
    if not isinstance(module, nn.Sequential) or len(layers) < 2:
        return module
    *before, block, head = layers
    if not isinstance(head, Head) or head.global_pool != "token":
        return module
    if type(block) is not Block or type(block.attn) is not Attention or not _is_plain(block.attn):
        return module
    return nn.Sequential(*before, ClassTokenBlock(block), head).train(module.training)


def _is_plain(attention: Attention) -> bool:
    is_as_it_comes = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    return is_as_it_comes and attention.gate is None and attention.attn_drop.p == 0


def _attend_from_first(attention: Attention, tokens: Tensor) -> Tensor:
    """The first token's row of the attention over tokens (B, L, D): (B, 1, D)."""
    width, heads, bias = attention.attn_dim, attention.num_heads, attention.qkv.bias
    of_query, _, of_values = (None, None, None) if bias is None else bias.split(width)
    for_query, for_keys, for_values = attention.qkv.weight.split(width)
    query = F.linear(tokens[:, 0], for_query, of_query).unflatten(-1, (heads, -1))  # (B, H, D / H)
    query = torch.einsum("bhd,hdw->bhw", query, for_keys.unflatten(0, (heads, -1)))  # (B, H, D)
    # One head of H queries, each as wide as the tokens, that are its keys and its values.
    seen = tokens.to(query.dtype).unsqueeze(1)  # (B, 1, L, D)
    mixed = F.scaled_dot_product_attention(query.unsqueeze(1), seen, seen, scale=attention.scale)  # (B, 1, H, D)
    found = torch.einsum("bhw,hdw->bhd", mixed.squeeze(1), for_values.unflatten(0, (heads, -1)))  # (B, H, D / H)
    found = found.flatten(1) if of_values is None else found.flatten(1) + of_values  # (B, D)
    projected: Tensor = attention.proj_drop(attention.proj(attention.norm(found.unsqueeze(1))))
    return projected
