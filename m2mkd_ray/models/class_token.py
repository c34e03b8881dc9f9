"""The last block of a ViT that reads the class token alone, computed for that token alone.

The head looks at one token of L, so of the last block's output the others are never used, and no gradient comes back
to them. Keys and values of all tokens are needed; queries, projection and MLP (a mixture's routing too) of the class
token only. What comes out is the same but for rounding, for about a sixth of the block's work. It pays in a hybrid:
the meta model's blocks are few, and its last one is run forward for the teacher, forward and backward for the student.

B = images, L = tokens, D = width, H = heads
"""

from typing import cast

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

    Shares all parameters, under the same names. A module without head, or of a ViT that pools over tokens, comes back
    as it is.
    """
    layers = [*module.children()]
    if not isinstance(module, nn.Sequential) or len(layers) < 2:
        return module
    *before, block, head = layers
    if not isinstance(head, Head) or head.global_pool != "token":
        return module
    if type(block) is not Block or type(block.attn) is not Attention or block.attn.gate is not None:
        return module
    return nn.Sequential(*before, ClassTokenBlock(block), head).train(module.training)


def _attend_from_first(attention: Attention, tokens: Tensor) -> Tensor:
    """The first token's row of the attention over tokens (B, L, D): (B, 1, D)."""
    width, bias = attention.attn_dim, attention.qkv.bias
    of_query, of_rest = (None, None) if bias is None else bias.split([width, 2 * width])
    for_query, for_rest = attention.qkv.weight.split([width, 2 * width])
    query = F.linear(tokens[:, :1], for_query, of_query).unflatten(-1, (attention.num_heads, -1))  # (B, 1, H, D / H)
    rest = F.linear(tokens, for_rest, of_rest).unflatten(-1, (2, attention.num_heads, -1))  # (B, L, 2, H, D / H)
    keys, values = rest.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
    found = F.scaled_dot_product_attention(
        attention.q_norm(query.transpose(1, 2)),
        attention.k_norm(keys),
        values,
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
    )  # (B, H, 1, D / H)
    together = attention.norm(found.transpose(1, 2).flatten(-2))  # (B, 1, D)
    projected: Tensor = attention.proj_drop(attention.proj(together))
    return projected
