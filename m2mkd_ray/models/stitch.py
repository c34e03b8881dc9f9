"""Stitches: adapters between the student's width and the teacher's.

B = images, L = tokens
"""

from torch import Tensor, nn


class Stitch(nn.Module):
    """LayerNorm, then Linear: tokens (B, L, in_width) to tokens (B, L, out_width).

    Source: kamanphoebe/m2mKD `vmoe.py`; truncated normal 0.02 and zero bias as every Linear there. The paper calls
    it a stitch layer; pre-stitches map teacher width to student width, post-stitches the other way.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_width, eps=1e-6)
        self.proj = nn.Linear(in_width, out_width)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, in_width) to (B, L, out_width)."""
        return self.proj(self.norm(tokens))
