"""Layers whose weights all latents share, and which a latent's code makes its own.

B = images, U = latents, D = width, C = width of codes

From kamanphoebe/m2mKD `nacs/neural_compilers/{utils.py,model/nc/attention.py}`, which are the NAC authors' (ModFC,
ModFFN, VectorScaleNoise). Leading axes of codes are those of the latents; images broadcast over them.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

GAIN = 0.1
"""Of the modulation at the start; learned (`scale_gain`, `learnable_scale_gain`)."""


class ModulatedLinear(nn.Module):
    """y = W (x * (1 + g LN(A c))) + b for a latent's code c (ModFC with `add_one_to_scale`).

    W starts in U(+-1/sqrt(in)), b at 0; g is one learned number; LN has no weights.
    """

    def __init__(self, in_width: int, out_width: int, code_width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.zeros(out_width)) if bias else None
        self.modulation = nn.Linear(code_width, in_width, bias=False)
        self.gain = nn.Parameter(torch.tensor([GAIN]))  # DeepSpeed cannot send a tensor without axes to other ranks

    def scale(self, codes: Tensor) -> Tensor:
        """What inputs of latents with these codes (U, C) are multiplied with: (U, in_width)."""
        modulation = self.modulation(codes)
        return 1 + self.gain * F.layer_norm(modulation, modulation.shape[-1:])

    def forward(self, inputs: Tensor, codes: Tensor) -> Tensor:
        """Inputs (B, U, in_width) of latents with codes (U, C), or of any number with one code (1, C)."""
        return F.linear(inputs * self.scale(codes), self.weight, self.bias)


class ModulatedMlp(nn.Module):
    """states + drop_path(LayerScale(W2 GEGLU(W1 LN(states)))), with modulated W1 and W2 (ModFFN)."""

    def __init__(
        self, width: int, code_width: int, *, mlp_ratio: float, layer_scale: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        hidden_width = round(mlp_ratio * width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = ModulatedLinear(width, 2 * hidden_width, code_width)
        self.fc2 = ModulatedLinear(hidden_width, width, code_width)
        self.layer_scale = LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, states: Tensor, codes: Tensor) -> Tensor:
        """States (B, U, D) of latents with codes (U, C)."""
        hidden, gate = self.fc1(self.norm(states), codes).chunk(2, dim=-1)
        return states + self.drop_path(self.layer_scale(self.fc2(hidden * F.gelu(gate), codes)))


def noisy(codes: Tensor, noise: float) -> Tensor:
    """c + U(-1, 1) * noise * |c|, element by element, from torch's global generator; no gradient goes to the noise."""
    return codes + (2 * torch.rand_like(codes) - 1) * noise * codes.detach().abs()
