"""The last block for the class token alone: the same logits and gradients, for less work."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_ray.blueprint import Blueprint, Vit
from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.models.class_token import ClassTokenBlock, class_token_alone

VIT = Vit(name="vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, width=16, depth=4, num_heads=2)


def gradients(module: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = tokens.clone().requires_grad_()
    logits = module(tokens)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    assert tokens.grad is not None
    found = [tokens.grad, *(parameter.grad.clone() for parameter in module.parameters())]
    module.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_a_module_with_a_head_gives_the_same_logits_and_gradients(name: str) -> None:
    """DeiT III has layer scale."""
    module = split(create_vit(VIT.model_copy(update={"name": name})), (2, 2))[1]
    nn.init.normal_(module[-1].head.weight)
    short = class_token_alone(module)
    assert isinstance(short[-2], ClassTokenBlock)
    tokens = torch.randn(3, 17, 16)
    (logits, found), (expected_logits, expected) = gradients(short, tokens), gradients(module, tokens)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(found, expected)


def test_a_mixture_routes_the_class_token_as_before(blueprint: Blueprint) -> None:
    module = family("vmoe").modules(blueprint)[-1]
    width = module[0].norm.normalized_shape[0]
    nn.init.normal_(module[-1].head.weight)
    tokens = torch.randn(3, 9, width)
    (logits, found), (expected_logits, expected) = (
        gradients(each, tokens) for each in (class_token_alone(module), module)
    )
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(found, expected)


def test_parameters_are_shared_under_their_names() -> None:
    module = split(create_vit(VIT), (2, 2))[1]
    short = class_token_alone(module)
    assert [*short.state_dict()] == [*module.state_dict()]
    assert all(one is other for one, other in zip(short.parameters(), module.parameters(), strict=True))


def test_modules_without_head_or_with_another_pooling_stay_as_they_are() -> None:
    first, last = split(create_vit(VIT), (2, 2))
    assert class_token_alone(first) is first
    last[-1].global_pool = "avg"
    assert class_token_alone(last) is last


@pytest.mark.parametrize("changed", ["k_norm", "attn_drop"])
def test_attention_that_norms_its_keys_or_drops_shares_stays_as_it_is(changed: str) -> None:
    last = split(create_vit(VIT), (2, 2))[1]
    setattr(last[-2].attn, changed, nn.LayerNorm(8) if changed == "k_norm" else nn.Dropout(0.1))
    assert class_token_alone(last) is last


def test_the_last_block_costs_a_fraction() -> None:
    module = split(create_vit(VIT.model_copy(update={"width": 64})), (3, 1))[1].eval()
    costs = []
    for each in (module, class_token_alone(module)):
        each[0].attn.fused_attn = False
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(torch.randn(2, 17, 64))
        costs.append(counter.get_total_flops())
    assert costs[1] < 0.1 * costs[0]
