"""A sparse MLP: every token goes to `top_k` of `num_experts` MLPs.

B = images, L = tokens of an image, N = B * L, k = top_k, D = width, H = hidden width, E = experts

The mixture that m2mKD trains (kamanphoebe/m2mKD `vmoe.py` on fastmoe's `NaiveGate`): no noise, no capacity limit, no
auxiliary loss, so no token is dropped. V-MoE's own router (google-research/vmoe `nn/routing.py`) takes the softmax
over all experts before it picks, and does not renormalise.

Token-expert assignments are sorted by expert. On a GPU every expert's tokens are multiplied with its weights by one
`grouped_mm`: shapes don't depend on the routing, so nothing waits for the device. On a CPU it is expert by expert.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ExpertInit = Literal["trunc_normal", "fastmoe"]


class Routing(NamedTuple):
    """Where tokens go; leading axes are those of the tokens."""

    logits: Tensor
    """(..., E), float32."""
    gates: Tensor
    """(..., k), float32: weights of the chosen experts, which sum to 1."""
    indices: Tensor
    """(..., k), int64: the chosen experts, best first."""


class Router(nn.Module):
    """Linear with bias; the top k raw logits; softmax over these k (fastmoe 1.1.0 `gates/naive_gate.py`).

    Computed in float32 whatever the precision of the rest, as Switch Transformers found necessary
    (arXiv 2101.03961, section 2.4).
    """

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, num_experts)
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def forward(self, tokens: Tensor) -> Routing:
        """Route tokens (..., D)."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.gate.weight.float(), self.gate.bias.float())  # (..., E)
            chosen, indices = logits.topk(self.top_k)  # (..., k)
            return Routing(logits, chosen.softmax(-1), indices)


class Experts(nn.Module):
    """`num_experts` MLPs, Linear-GELU-Linear with biases, their weights stacked."""

    def __init__(self, num_experts: int, width: int, hidden_width: int, init: ExpertInit) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, width, hidden_width))
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden_width))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_width, width))
        self.b2 = nn.Parameter(torch.zeros(num_experts, width))
        for weight in (self.w1, self.w2):
            _init_weight(weight, init)

    def forward(self, tokens: Tensor, owners: Tensor) -> Tensor:
        """Give tokens (M, D), sorted by their experts `owners` (M,), to these experts: (M, D).

        An expert may have no token at all.
        """
        # Measured on one core of a Xeon, forward and backward, in float32, ms. Sending every token to all experts with
        # `baddbmm` took three to four times as long as `grouped_mm`.
        #                                grouped  one by one
        #   M = 2,176  D =  48  E = 8       4.0         3.8
        #   M = 3,152  D =  96  E = 8      18.1        14.8
        #   M = 6,304  D = 192  E = 8     109.2        99.9
        # On a GPU the sizes are not known here without waiting for it, so there it is one `grouped_mm`.
        dtype = tokens.dtype
        weights = [weight.to(dtype) for weight in (self.w1, self.b1, self.w2, self.b2)]
        if tokens.device.type == "cpu":
            return _one_by_one(tokens, owners, *weights)
        return _grouped(tokens, owners, *weights)


@torch.compiler.disable
def _one_by_one(tokens: Tensor, owners: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The MLP of each expert on its own tokens, in a row; sizes change with every batch, so it is not compiled."""
    parts = tokens.split(torch.bincount(owners, minlength=len(w1)).tolist())
    of_each = zip(parts, w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind())
    return torch.cat([torch.addmm(b, F.gelu(torch.addmm(a, part, u)), v) for part, u, a, v, b in of_each])


def _grouped(tokens: Tensor, owners: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The same by one product a layer. Biases by `embedding`: the gradient of `b1[owners]` is 20 % slower in bf16."""
    ends = torch.searchsorted(owners, torch.arange(len(w1), device=owners.device), right=True, out_int32=True)
    product = F.grouped_mm if tokens.dtype == torch.bfloat16 else _grouped_mm_without_compiler
    hidden = product(tokens, w1, offs=ends) + F.embedding(owners, b1)  # (M, H)
    return product(F.gelu(hidden), w2, offs=ends) + F.embedding(owners, b2)


class MoeMlp(nn.Module):
    """A mixture of MLPs in the place of a ViT block's MLP: tokens (B, L, D) to tokens (B, L, D).

    Nothing in it but the experts has "expert" in its name: DeepSpeed tells expert parameters by name when it saves
    (microsoft/DeepSpeed #7685).
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        expert_init: ExpertInit = "trunc_normal",
    ) -> None:
        super().__init__()
        self.router = Router(width, num_experts, top_k)
        self.experts = Experts(num_experts, width, hidden_width, expert_init)

    def forward(self, tokens: Tensor) -> Tensor:
        """Sum over the chosen experts of gate times expert(token)."""
        routing = self.router(tokens)
        flat = tokens.flatten(0, -2).to(_compute_dtype(tokens))  # (N, D)
        owners, order = routing.indices.flatten().sort(stable=True)  # (N * k,), (N * k,)
        results = self.experts(flat.index_select(0, order // self.router.top_k), owners)  # (N * k, D)
        results = torch.empty_like(results).index_copy(0, order, results)  # (N * k, D), by token again
        results = results.unflatten(0, (*tokens.shape[:-1], self.router.top_k))  # (B, L, k, D)
        # Not by `einsum`, which makes it products of matrices of k rows: 2.5 times slower on a CPU.
        return (results * routing.gates.to(results.dtype).unsqueeze(-1)).sum(-2)


@torch.compiler.disable
def _grouped_mm_without_compiler(tokens: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
    """`torch.compile` has this product in bfloat16 alone (torch 2.13)."""
    return F.grouped_mm(tokens, weights, offs=offs)


def num_active_parameters(model: nn.Module) -> int:
    """Parameters that one token meets: all but those of the experts that it is not sent to."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(_num_idle(module) for module in model.modules() if isinstance(module, MoeMlp))


def _num_idle(moe: MoeMlp) -> int:
    num_experts = len(moe.experts.w1)
    per_expert = sum(parameter.numel() for parameter in moe.experts.parameters()) // num_experts
    return per_expert * (num_experts - moe.router.top_k)


def _init_weight(weight: Tensor, init: ExpertInit) -> None:
    if init == "fastmoe":
        # FMoELinear calls kaiming_uniform_(a=sqrt(5)) on (1, out, in), of which PyTorch takes fan_in = out * in.
        bound = (weight.shape[1] * weight.shape[2]) ** -0.5
        nn.init.uniform_(weight, -bound, bound)
    else:
        nn.init.trunc_normal_(weight, std=0.02)


def _compute_dtype(tokens: Tensor) -> torch.dtype:
    """What autocast would choose for a Linear; `grouped_mm` is not on its list."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
