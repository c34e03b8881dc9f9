"""The ends of a circuit: images to tokens, codes to first states, last states to logits.

B = images, H = W = img_size, V = tokens, U = latents, D = width, C = width of codes, K = classes

From kamanphoebe/m2mKD `nacs/neural_compilers/model/nc/{tokenizers,seeding,utils}.py` (ConvNeXtImageTokenizer,
LatentSeeder, OutputLatentPooling, PositionalGrid) and `model/external/convnext.py`; blocks are timm's.
"""

from functools import partial
from typing import Literal

import torch
from timm.layers import LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXtStage
from torch import Tensor, nn

DEPTH = 3
"""Blocks of each of the tokenizer's two stages (preset tiny)."""
PATCH = 8
"""Height and width of a token's pixels."""

Noise = Literal["none", "shared", "each"]
"""What first states and pooling draw: nothing, one draw for all images, or one for each. With one for all, an image's
logits are the same in any place of any batch."""


class Tokenizer(nn.Module):
    """Images (B, 3, H, W) to tokens (B, H W / 64, D / 2 + grid_width): two stages of a ConvNeXt, and a learned grid.

    The stem takes 4 x 4 pixels to D / 4 channels; the second stage halves the sides and doubles the channels. Weights
    start as truncated normal 0.02, the grid as N(0, 1). Positions are told by more channels, not by a sum.
    """

    def __init__(self, img_size: int, width: int, grid_width: int) -> None:
        super().__init__()
        first, second, side = width // 4, width // 2, img_size // PATCH
        norm, norm_last = partial(LayerNorm2d, eps=1e-6), partial(LayerNorm, eps=1e-6)
        stage = partial(ConvNeXtStage, depth=DEPTH, ls_init_value=1e-6, norm_layer=norm, norm_layer_cl=norm_last)
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, stride=4), norm(first))
        self.stages = nn.Sequential(stage(first, first, stride=1), stage(first, second, stride=2))
        self.apply(_init_weights)
        self.grid = nn.Parameter(torch.randn(grid_width, side, side))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, V, D / 2 + grid_width)."""
        features = self.stages(self.stem(images))  # (B, D / 2, H / 8, W / 8)
        grid = self.grid.to(features.dtype).expand(len(features), *self.grid.shape)
        return torch.cat([features, grid], dim=1).flatten(2).transpose(1, 2)


def _init_weights(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Seeder(nn.Module):
    """First states from codes: mu(c') + eps * exp(logvar(c') / 2), with c' = LN(c) and eps from N(0, 1)."""

    def __init__(self, code_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(code_width)
        self.mean = nn.Linear(code_width, width)
        self.log_variance = nn.Linear(code_width, width)
        nn.init.constant_(self.log_variance.bias, -5.0)

    def forward(self, codes: Tensor, num_images: int, *, noise: Noise) -> Tensor:
        """Codes (U, C) to states (B, U, D); without noise eps is 0."""
        codes = self.norm(codes)
        means = self.mean(codes).expand(num_images, -1, -1)  # (B, U, D)
        if noise == "none":
            return means
        drawn = torch.randn_like(means if noise == "each" else means[:1])  # (B, U, D) or (1, U, D)
        return means + drawn * (self.log_variance(codes) / 2).exp()


class Pooling(nn.Module):
    """Output latents (B, U, D) to logits (B, K): their mean, weighted by a softmax over them, then a classifier.

    With noise the softmax is Gumbel's, of temperature 1 and soft (`torch.nn.functional.gumbel_softmax`, which has no
    noise that images share).
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.confidence = nn.Linear(width, 1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, states: Tensor, *, noise: Noise) -> Tensor:
        """States (B, U, D) to logits (B, K)."""
        confidences = self.confidence(states).squeeze(-1).float()  # (B, U)
        if noise != "none":
            drawn = torch.empty_like(confidences if noise == "each" else confidences[:1])  # (B, U) or (1, U)
            confidences = confidences - drawn.exponential_().log()
        return self.head(torch.einsum("bu,bud->bd", confidences.softmax(-1).to(states.dtype), states))
