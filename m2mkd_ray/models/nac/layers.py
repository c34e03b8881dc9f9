"""The three kinds of layers of a circuit: read-in, propagator, read-out; each is attention, then an MLP.

B = images, U = receivers, V = senders, D = width = width of codes

Sizes and what is shared, scaled and dropped where: kamanphoebe/m2mKD `configs/nac_*_config.yml`. The names of all
parameters are the same in the circuit and in the modules that are trained in the meta model, which have no kernel.
"""

from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Nac
from m2mkd_ray.models.nac.attention import LatentAttention, ReadInAttention, SignatureKernel
from m2mkd_ray.models.nac.ends import Pooling, Tokenizer
from m2mkd_ray.models.nac.modulated import ModulatedMlp


def token_width(nac: Nac) -> int:
    """Width of the tokenizer's tokens."""
    return nac.width // 2 + nac.grid_width


def tokenizer(nac: Nac) -> Tokenizer:
    """Images to tokens."""
    return Tokenizer(nac.img_size, nac.width, nac.grid_width)


def pooling(nac: Nac) -> Pooling:
    """Output latents to logits."""
    return Pooling(nac.width, nac.num_classes)


class ReadIn(nn.Module):
    """Latents read an image's tokens: states (B, U, D), codes (U, D), tokens (B, V, T) to states (B, U, D)."""

    def __init__(self, nac: Nac) -> None:
        super().__init__()
        self.attention = ReadInAttention(token_width(nac), nac.width, nac.width, nac.num_heads, nac.head_width)
        self.mlp = _mlp(nac)

    def forward(self, states: Tensor, codes: Tensor, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.mlp(self.attention(states, codes, tokens), codes)


class Exchange(nn.Module):
    """Receivers hear senders: a propagator (the mediators hear inputs and themselves), or the read-out."""

    def __init__(
        self, nac: Nac, *, kernel: SignatureKernel | None, is_read_out: bool = False, drop_path: float = 0.0
    ) -> None:
        """`drop_path` is of propagators alone, as read-outs add no states that could stay."""
        super().__init__()
        assert not (is_read_out and drop_path)
        self.attention = LatentAttention(
            nac.width,
            nac.width,
            nac.num_heads,
            nac.head_width,
            layer_scale=nac.layer_scale,
            kernel=kernel,
            share_norm=not is_read_out,
            residual=not is_read_out,
            drop_path=drop_path,
        )
        self.mlp = _mlp(nac, drop_path)

    def forward(
        self,
        receivers: Tensor,
        receiver_codes: Tensor,
        senders: Tensor,
        sender_codes: Tensor,
        signatures: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `LatentAttention.forward`, and then the receivers' MLP."""
        states = self.attention(receivers, receiver_codes, senders, sender_codes, signatures)
        return self.mlp(states, receiver_codes)


def _mlp(nac: Nac, drop_path: float = 0.0) -> ModulatedMlp:
    return ModulatedMlp(
        nac.width, nac.width, mlp_ratio=nac.mlp_ratio, layer_scale=nac.layer_scale, drop_path=drop_path
    )


def nac_of(blueprint: Blueprint) -> Nac:
    """The sizes of the blueprint's circuit."""
    nac = blueprint.student.nac
    assert nac is not None  # the blueprint has seen to it
    return nac
