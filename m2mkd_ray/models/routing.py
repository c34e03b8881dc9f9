"""How a model's routers use its experts, recorded while it runs.

B = images, L = tokens of an image, k = top_k, E = experts
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor, nn

from m2mkd_ray.models.moe import MoeMlp, Routing


class LayerSummary(TypedDict):
    """Use of the experts of one layer, as plain numbers."""

    num_tokens: int
    load: list[float]
    """Share of the token-expert assignments that went to each expert; sums to 1."""
    importance: list[float]
    """Mean softmax over all experts (V-MoE's Imp, arXiv 2106.05974 appendix A, per token); sums to 1."""
    entropy: float
    """Mean over tokens of that softmax's entropy in nats; ln E for a router without preference."""


@dataclass
class LayerRouting:
    """Sums over the tokens that one layer has routed, on the layer's device."""

    num_tokens: int
    assignments: Tensor
    """(E,)"""
    importance: Tensor
    """(E,)"""
    entropy: Tensor
    """()"""
    top1: Tensor
    """(B, L): the first choice of every token of the last batch."""

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing) -> "LayerRouting":
        """The sums over one batch."""
        logits = routing.logits.flatten(0, -2)  # (B * L, E)
        shares = logits.softmax(-1)
        chosen = torch.zeros_like(logits).scatter_(1, routing.indices.flatten(0, -2), 1.0)
        return cls(
            num_tokens=len(logits),
            assignments=chosen.sum(0, dtype=torch.float64),
            importance=shares.sum(0, dtype=torch.float64),
            entropy=torch.special.entr(shares).sum(dtype=torch.float64),
            top1=routing.indices[..., 0],
        )

    def plus(self, later: "LayerRouting") -> "LayerRouting":
        """Both together; the last batch is the later one's."""
        return LayerRouting(
            num_tokens=self.num_tokens + later.num_tokens,
            assignments=self.assignments + later.assignments,
            importance=self.importance + later.importance,
            entropy=self.entropy + later.entropy,
            top1=later.top1,
        )

    def summary(self) -> LayerSummary:
        """As plain numbers."""
        return LayerSummary(
            num_tokens=self.num_tokens,
            load=(self.assignments / self.assignments.sum()).tolist(),
            importance=(self.importance / self.num_tokens).tolist(),
            entropy=self.entropy.item() / self.num_tokens,
        )


@dataclass
class RoutingRecord:
    """What `record_routing` has seen."""

    layers: dict[str, LayerRouting] = field(default_factory=dict)
    """By the name of the block in the model, e.g. "blocks.3", in the order in which they first ran."""

    def summary(self) -> dict[str, LayerSummary]:
        """Every layer that has run, as plain numbers."""
        return {name: layer.summary() for name, layer in self.layers.items()}

    def add(self, name: str, routing: Routing) -> None:
        """Add one batch that the layer `name` has routed."""
        batch = LayerRouting.of(routing)
        self.layers[name] = self.layers[name].plus(batch) if name in self.layers else batch


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record how every `MoeMlp` inside `model` routes, from now to the end of the `with`.

    Works on a whole student and on modules in a row. Nothing waits for the device before `summary`.
    """
    record = RoutingRecord()

    def add_to(name: str, router: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return router.register_forward_hook(lambda module, args, routing: record.add(name, routing))

    handles = [
        add_to(name.removesuffix(".mlp"), layer.router)
        for name, layer in model.named_modules()
        if isinstance(layer, MoeMlp)
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
