"""Precisions: what is cast, when, and where the float32 weights are.

fp32       everything in float32.
bf16       autocast: what learns keeps float32 weights, which are cast for every use. What is frozen is cast once: its
           matrices only, which autocast would cast, so that results are those of autocast, bit for bit.
bf16_pure  weights, activations and gradients in bfloat16. The optimizer moves float32 copies, the masters, because
           bfloat16's 8 bits lose steps smaller than 1/256 of a weight (Micikevicius et al., arXiv 1710.03740, 3.1).
"""

from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "bf16_pure"]

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv2d)


def cast_frozen(module: nn.Module, precision: Precision) -> None:
    """Cast weights that never move, in place."""
    if precision == "bf16_pure":
        module.bfloat16()
    elif precision == "bf16":
        for part in module.modules():
            if isinstance(part, CAST_BY_AUTOCAST):
                part.bfloat16()


def take_any_dtype(module: nn.Module) -> None:
    """Have a module in bfloat16 cast what it is given: at the end the module that learnt is in float32 again, and is
    validated between modules that are not."""
    if _to_bfloat16 not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_to_bfloat16)


def _to_bfloat16(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.bfloat16() for tensor in given)


class Masters:
    """float32 copies of a module's weights, which an optimizer moves in their place.

    From here on the module is in bfloat16. Gradients are summed in float32 over micro-batches.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module = module
        self.weights: list[Tensor] = []
        self.copies: list[Tensor] = []
        for group in optimizer.param_groups:
            weights = group["params"]
            group["params"] = [nn.Parameter(weight.detach().clone()) for weight in weights]
            self.weights += weights
            self.copies += group["params"]
        module.bfloat16()

    def take_gradients(self) -> None:
        """Add the gradients of the module's weights to those of the masters, and drop them."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            if weight.grad is None:
                continue
            if copy.grad is None:
                copy.grad = weight.grad.float()
            else:
                copy.grad += weight.grad
            weight.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters into the module."""
        torch._foreach_copy_(self.weights, self.copies)

    def state(self) -> list[Tensor]:
        """The masters, in the optimizer's order."""
        return [copy.detach() for copy in self.copies]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Take up what `state` gave."""
        torch._foreach_copy_(self.copies, state)
        self.give_weights()

    def release(self) -> None:
        """Drop the masters."""
        self.weights, self.copies = [], []

    def end(self) -> None:
        """Leave the module in float32, with the masters as its weights."""
        self.module.float()
        self.give_weights()
