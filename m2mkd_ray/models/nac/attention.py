"""Attention along a learned graph, and the read-in's attention with keys and values of each receiver's own.

B = images, U = receivers, V = senders, D = width, C = width of codes, S = width of signatures, H = heads, E = width of
a head, T = width of tokens

From kamanphoebe/m2mKD `nacs/neural_compilers/model/nc/{attention,kernels}.py` (KernelModulatedLatentAttention,
DotProductKernel, ReadInAttention).
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from m2mkd_ray.models.nac.graph import distances
from m2mkd_ray.models.nac.modulated import ModulatedLinear


class SignatureKernel(nn.Module):
    """How much each receiver sees of each sender, as log K, in float32 whatever the precision of the rest.

    log K = -d / beta, with d = 1 - cos(s_u, s_v) and a learned bandwidth beta; -inf where d is above `truncation`.
    In training an edge is there with probability p = K: with a `temperature`, log K is the logarithm of a sample of
    RelaxedBernoulli(p), one for each image. PyTorch keeps p off 0 and 1, so in training a cut edge has a weight of
    about 1e-14; in evaluation there is no sample, and it has none.

    The reference then subtracts the logarithm of the sum over senders, which the softmax of the attention does away
    with.
    """

    def __init__(self, truncation: float | None = None, temperature: float | None = None) -> None:
        super().__init__()
        self.bandwidth = nn.Parameter(torch.ones(1))  # with an axis, as `ModulatedLinear.gain`
        self.truncation, self.temperature = truncation, temperature

    def forward(self, receivers: Tensor, senders: Tensor, num_images: int) -> Tensor:
        """Signatures (U, S) and (V, S) to (U, V), or, where edges are sampled, to (B, U, V)."""
        with torch.autocast(receivers.device.type, enabled=False):
            distance = distances(receivers.float(), senders.float())  # (U, V)
            log_kernel = -distance / self.bandwidth.float()
            if self.truncation is not None:
                log_kernel = log_kernel.masked_fill(distance > self.truncation, -torch.inf)
            if self.temperature is None or not self.training:
                return log_kernel
            temperature = torch.full((), self.temperature, device=distance.device)  # no copy that waits for the device
            edges = LogitRelaxedBernoulli(temperature, probs=log_kernel.exp(), validate_args=False)
            return F.logsigmoid(edges.rsample(torch.Size([num_images])))  # (B, U, V)


class LatentAttention(nn.Module):
    """Receivers attend to senders: queries from the ones, keys and values from the others, each with its own code.

    states + drop_path(LayerScale(exit(softmax(q k / sqrt(E) + log K) v))), norms before; the softmax in float32.

    Args:
        width: D.
        code_width: C.
        num_heads: H.
        head_width: E.
        layer_scale: at the start.
        kernel: log K; None: everybody sees everybody.
        share_norm: one LayerNorm for receivers and senders.
        residual: whether the receivers' states are added.
        drop_path: stochastic depth.
    """

    def __init__(
        self,
        width: int,
        code_width: int,
        num_heads: int,
        head_width: int,
        *,
        layer_scale: float,
        kernel: SignatureKernel | None,
        share_norm: bool,
        residual: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        inner_width = num_heads * head_width
        self.num_heads, self.residual = num_heads, residual
        self.kernel = kernel
        self.receiver_norm = nn.LayerNorm(width)
        self.sender_norm = None if share_norm else nn.LayerNorm(width)
        self.query = ModulatedLinear(width, inner_width, code_width, bias=False)
        self.key = ModulatedLinear(width, inner_width, code_width, bias=False)
        self.value = ModulatedLinear(width, inner_width, code_width, bias=False)
        self.exit = ModulatedLinear(inner_width, width, code_width)
        self.layer_scale = LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        receivers: Tensor,
        receiver_codes: Tensor,
        senders: Tensor,
        sender_codes: Tensor,
        signatures: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """States (B, U, D) and (B, V, D), codes (U, C) and (V, C) or (1, C), signatures (U, S) and (V, S) with a
        kernel: (B, U, D)."""
        log_kernel = None
        if self.kernel is not None:
            assert signatures is not None
            log_kernel = self.kernel(*signatures, len(receivers))
        sent = (self.sender_norm or self.receiver_norm)(senders)
        queries = self._heads(self.query(self.receiver_norm(receivers), receiver_codes))
        keys, values = self._heads(self.key(sent, sender_codes)), self._heads(self.value(sent, sender_codes))
        message = _attend(queries, keys, values, log_kernel).transpose(1, 2).flatten(2)  # (B, U, H * E)
        message = self.layer_scale(self.exit(message, receiver_codes))
        return receivers + self.drop_path(message) if self.residual else message

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, U, H * E) to (B, H, U, E)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, log_kernel: Tensor | None) -> Tensor:
    """Queries (B, H, U, E), keys and values (B, H, V, E), log K (U, V) or (B, U, V): (B, H, U, E)."""
    if log_kernel is None:
        return F.scaled_dot_product_attention(queries, keys, values)
    scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5  # (B, H, U, V)
    shares = (scores + log_kernel.unsqueeze(-3)).softmax(-1)
    return shares.to(values.dtype) @ values


class ReadInAttention(nn.Module):
    """Latents attend to an image's tokens, with keys and values made by each latent's own code.

    The reference repeats the tokens for every latent and makes B * V * U * H * E keys, and as many values. As a
    modulated layer without bias is W (x * s_u), with one factor s_u a latent, the layers go to the other side:

        q . W_k (x_v * s_u)        = (s_u * W_k^T q) . x_v
        sum_v a_v W_v (x_v * s_u)  = W_v (s_u * sum_v a_v x_v)

    so all latents share keys and values, the tokens themselves, and the largest tensor has B * U * H * T numbers.
    Equal but for rounding.
    """

    def __init__(self, token_width: int, width: int, code_width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        inner_width = num_heads * head_width
        self.num_heads, self.head_width = num_heads, head_width
        self.sender_norm = nn.LayerNorm(token_width)
        self.receiver_norm = nn.LayerNorm(width)
        self.query = ModulatedLinear(width, inner_width, code_width, bias=False)
        self.key = ModulatedLinear(token_width, inner_width, code_width, bias=False)
        self.value = ModulatedLinear(token_width, inner_width, code_width, bias=False)
        self.exit = ModulatedLinear(inner_width, width, code_width)
        self.layer_scale = LayerScale(width, 1.0)

    def forward(self, states: Tensor, codes: Tensor, tokens: Tensor) -> Tensor:
        """States (B, U, D) of latents with codes (U, C), tokens (B, V, T): states (B, U, D)."""
        seen = self.sender_norm(tokens)
        queries = self.query(self.receiver_norm(states), codes).unflatten(-1, (self.num_heads, -1))  # (B, U, H, E)
        of_keys, of_values = self._by_head(self.key), self._by_head(self.value)  # (H, E, T)
        queries = torch.einsum("buhe,het->buht", queries, of_keys.to(queries.dtype))
        queries = queries * self.key.scale(codes).unsqueeze(-2)  # (B, U, H, T)
        num_latents = states.shape[1]
        # One head of U * H queries, each as wide as the tokens, that are its keys and its values.
        seen = seen.to(queries.dtype).unsqueeze(1)  # (B, 1, V, T)
        flat = queries.flatten(1, 2).unsqueeze(1)  # (B, 1, U * H, T)
        mixed = F.scaled_dot_product_attention(flat, seen, seen, scale=self.head_width**-0.5)
        mixed = mixed.squeeze(1).unflatten(1, (num_latents, self.num_heads))  # (B, U, H, T)
        mixed = mixed * self.value.scale(codes).unsqueeze(-2)
        message = torch.einsum("buht,het->buhe", mixed, of_values.to(mixed.dtype)).flatten(2)  # (B, U, H * E)
        return states + self.layer_scale(self.exit(message, codes))

    def _by_head(self, layer: ModulatedLinear) -> Tensor:
        """The weights (H * E, T) as (H, E, T)."""
        return layer.weight.unflatten(0, (self.num_heads, -1))
