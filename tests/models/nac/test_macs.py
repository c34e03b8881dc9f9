"""Costs against torch's own counter."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.models import create_vit, nac, split
from m2mkd_ray.models.class_token import class_token_alone
from m2mkd_ray.models.compute import pair_cost, step_cost, vit_block_macs


def flops_of_an_image(model: nn.Module, *shape: int) -> int:
    """What one image more costs: what is done once a batch is in none."""
    counts = []
    for images in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model.eval()(torch.randn(images, *shape))
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def test_a_circuit_costs_what_torch_counts(blueprint: Blueprint) -> None:
    assert flops_of_an_image(nac.model(blueprint), 3, 16, 16) == 2 * nac.macs(blueprint)


def test_modules_cost_what_torch_counts(blueprint: Blueprint) -> None:
    for index, module in enumerate(nac.modules(blueprint)):
        shape = (17, 24) if index else (3, 16, 16)
        assert flops_of_an_image(module, *shape) == 2 * nac.module_macs(blueprint, index)


def test_after_the_read_in_the_meta_model_costs_its_few_tokens(blueprint: Blueprint) -> None:
    """Forward, and backward through activations, of one token; as it is carried out, the last block is shorter."""
    teacher, first = blueprint.teacher, blueprint.pairs[0]
    assert pair_cost(blueprint, first).after == 2 * 3 * vit_block_macs(teacher, 1)
    *_, third, last = split(create_vit(blueprint.meta), (1,) * 4)
    after = 2 * flops_of_an_image(third, 1, 24) + flops_of_an_image(class_token_alone(last)[0], 1, 24)
    assert step_cost(blueprint, first).after * 2 == 2 * after
