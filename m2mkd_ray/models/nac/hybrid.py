"""A circuit's layers as modules between those of the meta model.

B = images, L = tokens of the meta model, D = width, T = the teacher's width, K = classes

Tokens take the latents' place, and as they have neither codes nor signatures, all share one code and see each other
without a kernel (kamanphoebe/m2mKD `nacstudent.py`: ReadInStudent, MediatorStudent, ReadOutStudent). The read-in hands
on `hybrid_inputs` tokens, one in the reference, and the meta model goes on with these alone.

Codes, and the states that read-in and read-out start from, are drawn once and kept with the module, where the
reference's are lost, differ between processes, and are drawn for each place in a batch. They have no part in the
assembled circuit, whose latents have codes of their own.
"""

import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Nac
from m2mkd_ray.models.nac.layers import Exchange, ReadIn, pooling, tokenizer


class _Coded(nn.Module):
    """Has a code (U, D) of N(0, 1), and a state (1, U, D) likewise where it has latents of its own."""

    code: Tensor
    state: Tensor

    def _draw(self, nac: Nac, num_latents: int, *, has_states: bool) -> None:
        drawn = {"code": torch.randn(num_latents, nac.width)}
        if has_states:
            drawn["state"] = torch.randn(1, num_latents, nac.width)
        for name, values in drawn.items():
            if nac.hybrid_codes == "learned":
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)


class ReadInModule(_Coded):
    """Module 0: images (B, 3, H, W) to tokens (B, hybrid_inputs, T)."""

    def __init__(self, nac: Nac, teacher_width: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer(nac)
        self.read_in = ReadIn(nac)
        self.post_stitch = nn.Linear(nac.width, teacher_width)
        self._draw(nac, nac.hybrid_inputs, has_states=True)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        states = self.state.expand(len(images), -1, -1)
        return self.post_stitch(self.read_in(states, self.code, self.tokenizer(images)))


class PropagatorModule(_Coded):
    """A module between the first and the last: tokens (B, L, T) to tokens (B, L, T)."""

    def __init__(self, nac: Nac, teacher_width: int, drop_path: float) -> None:
        super().__init__()
        self.pre_stitch = nn.Linear(teacher_width, nac.width)
        self.propagator = Exchange(nac, kernel=None, drop_path=drop_path)
        self.post_stitch = nn.Linear(nac.width, teacher_width)
        self._draw(nac, 1, has_states=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        states = self.pre_stitch(tokens)  # (B, L, D)
        return self.post_stitch(self.propagator(states, self.code, states, self.code))


class ReadOutModule(_Coded):
    """The last module: tokens (B, L, T) to logits (B, K).

    Pooling over one latent takes it as it is, so its confidence has no gradient, and is not carried over.
    """

    def __init__(self, nac: Nac, teacher_width: int) -> None:
        super().__init__()
        self.pre_stitch = nn.Linear(teacher_width, nac.width)
        self.read_out = Exchange(nac, kernel=None, is_read_out=True)
        self.pooling = pooling(nac)
        self._draw(nac, 1, has_states=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        states = self.state.expand(len(tokens), -1, -1)
        return self.pooling(self.read_out(states, self.code, self.pre_stitch(tokens), self.code), noise="none")
