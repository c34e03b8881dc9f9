import math

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.models import vmoe
from m2mkd_ray.models.moe import MoeMlp
from m2mkd_ray.models.routing import record_routing


def test_statistics_are_those_of_all_batches_together() -> None:
    moe = MoeMlp(8, 12, num_experts=4, top_k=2)
    nn.init.normal_(moe.router.gate.weight)
    batches = [torch.randn(2, 5, 8), torch.randn(3, 5, 8)]
    with record_routing(nn.ModuleDict({"mlp": moe})) as record:
        for batch in batches:
            moe(batch)
    logits = torch.cat([moe.router(batch).logits.flatten(0, 1) for batch in batches])
    shares, chosen = logits.softmax(-1), logits.topk(2).indices
    (summary,) = record.summary().values()
    assert summary["num_tokens"] == 25
    assert summary["load"] == pytest.approx([(chosen == e).sum().item() / 50 for e in range(4)])
    assert summary["importance"] == pytest.approx(shares.mean(0).tolist())
    assert summary["entropy"] == pytest.approx(-(shares * shares.log()).sum(-1).mean().item(), rel=1e-5)
    (layer,) = record.layers.values()
    assert torch.equal(layer.top1, moe.router(batches[1]).logits.argmax(-1))


def test_a_router_without_preference_has_entropy_ln_e() -> None:
    moe = MoeMlp(8, 12, num_experts=4)
    nn.init.zeros_(moe.router.gate.weight)
    with record_routing(nn.Sequential(moe)) as record:
        moe(torch.randn(2, 3, 8))
    assert record.summary()["0"]["entropy"] == pytest.approx(math.log(4))


def test_layers_are_named_by_their_blocks(blueprint: Blueprint, images: Tensor) -> None:
    model, modules = vmoe.model(blueprint), nn.Sequential(*vmoe.modules(blueprint))
    with record_routing(model) as of_model, record_routing(modules) as of_modules:
        model(images)
        modules(images)
    assert list(of_model.summary()) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert list(of_modules.summary()) == ["0.1", "1.1", "1.2", "2.1"]
    assert of_model.layers["blocks.0"].top1.shape == (3, 17)


def test_nothing_is_recorded_afterwards_nor_changed_meanwhile(blueprint: Blueprint, images: Tensor) -> None:
    model = vmoe.model(blueprint)
    before = model(images)
    with record_routing(model) as record:
        assert torch.equal(model(images), before)
    model(images)
    assert record.summary()["blocks.0"]["num_tokens"] == 3 * 17
    assert not record.layers["blocks.0"].importance.requires_grad
