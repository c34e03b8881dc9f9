"""An incubation step as one would first write it, from docs/method.md's description of the reference's procedure.

Attention is softmax(q k^T / sqrt(d)) v, written out. Experts are called one after the other on the tokens that a mask
picks. The whole meta model is frozen, as in the reference (kamanphoebe/m2mKD `deep_incubation/main.py`): the modules
before the pair run without gradient, and through the later ones it flows to the student, but not to their parameters.
The divergence is divided by B * K. AdamW goes over the tensors as torch chooses: all at once on a GPU, one by one on a
CPU. Precision is fp32 or autocast. The weights are copies of those that the product's modules have.

B = images, L = tokens, D = width, H = heads, N = B * L
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m2mkd_ray.models.moe import MoeMlp
from m2mkd_ray.models.stitch import Stitch
from m2mkd_ray.models.vit import Head, Stem


class PlainAttention(nn.Module):
    """Attention with its matrix of B * H * L * L shares."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention: Any = block.attn  # timm says no more than that it is a module
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        images, length, width = tokens.shape
        qkv = self.qkv(tokens).reshape(images, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, L, D / H)
        shares = ((q @ k.transpose(-2, -1)) / (width // self.num_heads) ** 0.5).softmax(dim=-1)
        mixed: Tensor = self.proj((shares @ v).transpose(1, 2).reshape(images, length, width))
        return mixed


class PlainMlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        changed: Tensor = self.second(F.gelu(self.first(tokens)))
        return changed


class PlainMoe(nn.Module):
    """A mixture: a loop over experts, each on the tokens that its mask picks."""

    def __init__(self, moe: MoeMlp) -> None:
        super().__init__()
        self.gate, self.top_k = moe.router.gate, moe.router.top_k
        weights = moe.experts
        self.experts = nn.ModuleList(
            PlainMlp(_linear(weights.w1[e].T, weights.b1[e]), _linear(weights.w2[e].T, weights.b2[e]))
            for e in range(len(weights.w1))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        flat = tokens.reshape(-1, tokens.shape[-1])  # (N, D)
        chosen, indices = self.gate(flat).topk(self.top_k, dim=-1)  # (N, k)
        gates = chosen.softmax(dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mask = indices == number  # (N, k)
            taken = mask.any(dim=-1)  # (N,)
            if taken.any():
                gate = (gates * mask).sum(dim=-1, keepdim=True)[taken]
                out[taken] += (gate * expert(flat[taken])).to(out.dtype)
        return out.reshape(tokens.shape)


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP, each added to what came in."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = block.norm1, block.norm2, PlainAttention(block)
        mlp: Any = block.mlp
        self.mlp = PlainMoe(mlp) if isinstance(mlp, MoeMlp) else PlainMlp(mlp.fc1, mlp.fc2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class PlainStem(nn.Module):
    """Patches, class token, positions."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        assert stem.cls_token is not None
        assert stem.pos_embed is not None
        self.patches, self.cls_token, self.pos_embed = stem.patch_embed.proj, stem.cls_token, stem.pos_embed

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, L, D)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1) + self.pos_embed


class PlainHead(nn.Module):
    """Norm, class token, Linear."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.norm, self.head = head.norm, head.head

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, K)."""
        return cast(Tensor, self.head(self.norm(tokens)[:, 0]))


class PlainStep:
    """Takes the steps of one pair."""

    def __init__(
        self, meta: Sequence[nn.Module], index: int, student: nn.Module, teacher: nn.Module, *, is_autocast: bool
    ) -> None:
        """The modules are taken, not copied: pass copies."""
        plain = [plainly(module) for module in meta]
        self.before, self.after = nn.Sequential(*plain[:index]), nn.Sequential(*plain[index + 1 :])
        self.student, self.teacher, self.is_autocast = plainly(student), plainly(teacher), is_autocast
        for module in (self.before, self.after, self.teacher):
            module.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-3, weight_decay=0.05)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step on a batch; the loss."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.is_autocast):
            with torch.no_grad():
                tokens = self.before(images)
                teacher_logits = self.after(self.teacher(tokens))
            logits = self.after(self.student(tokens))
        log_shares, log_teacher = logits.float().log_softmax(dim=-1), teacher_logits.float().log_softmax(dim=-1)
        cross_entropy = -(targets * log_shares).sum(dim=-1).mean()
        divergence = F.kl_div(log_shares, log_teacher, reduction="sum", log_target=True) / logits.numel()
        loss: Tensor = 0.5 * cross_entropy + 0.5 * divergence
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def plainly(module: nn.Module) -> nn.Module:
    """A module of the product, layer by layer as one would write it."""
    layers: list[nn.Module] = []
    for layer in module.children():
        if isinstance(layer, Stem):
            layers.append(PlainStem(layer))
        elif isinstance(layer, Block):
            layers.append(PlainBlock(layer))
        elif isinstance(layer, Head):
            layers.append(PlainHead(layer))
        else:
            assert isinstance(layer, Stitch)
            layers.append(nn.Sequential(layer.norm, layer.proj))
    return nn.Sequential(*layers)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    return linear
