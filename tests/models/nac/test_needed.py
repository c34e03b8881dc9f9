"""Which settings of a circuit its modules go by, and which its training: found by changing one after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Nac, Prior, Student
from m2mkd_ray.models import nac

OTHER: dict[str, object] = {
    "img_size": 24,
    "num_classes": 6,
    "width": 20,
    "num_heads": 3,
    "head_width": 4,
    "signature_width": 9,
    "num_inputs": 4,
    "num_mediators": 13,
    "num_outputs": 5,
    "mlp_ratio": 3.0,
    "grid_width": 7,
    "layer_scale": 0.2,
    "code_noise": 0.5,
    "truncation": 0.2,
    "temperature": 2.0,
    "prior": Prior(kind="erdos_renyi", steps=20),
    "repulsion": 0.2,
    "hinge": 1.5,
    "evaluation": "sampled",
    "hybrid_inputs": 2,
    "hybrid_codes": "learned",
}


def with_other(name: str, blueprint: Blueprint) -> Blueprint:
    """The blueprint with another value of one setting, and with a teacher that fits to it."""
    assert blueprint.student.nac is not None
    changed = Student(family="nac", nac=blueprint.student.nac.model_copy(update={name: OTHER[name]}))
    teacher = blueprint.teacher
    if name in ("img_size", "num_classes"):
        teacher = teacher.model_copy(update={name: OTHER[name]})
    return blueprint.model_copy(update={"student": changed, "teacher": teacher})


def of_modules(blueprint: Blueprint) -> list[Tensor]:
    """All that modules are and give, in training and in evaluation."""
    torch.manual_seed(0)
    modules = nac.modules(blueprint, drop_path=0.5)
    size = blueprint.teacher.img_size
    inputs = torch.randn(3, 3, size, size), *[torch.randn(3, 17, 24)] * (len(modules) - 1)
    found = [tensor for module in modules for tensor in learnt_and_kept(module)]
    for is_training in (True, False):
        found += [module.train(is_training)(given) for module, given in zip(modules, inputs, strict=True)]
    return found


def of_training(blueprint: Blueprint) -> list[Tensor]:
    """All that the training of a circuit starts from, gives for images, and has in its loss."""
    torch.manual_seed(0)
    circuit, size = nac.model(blueprint, drop_path=0.5), blueprint.teacher.img_size
    return [*learnt_and_kept(circuit), circuit(torch.randn(3, 3, size, size)), circuit.regulariser()]


def learnt_and_kept(module: nn.Module) -> list[Tensor]:
    return [tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_every_setting_is_tried() -> None:
    assert set(OTHER) == set(Nac.model_fields)


@pytest.mark.parametrize(("needed", "of"), [(nac.for_modules, of_modules), (nac.for_training, of_training)])
@pytest.mark.parametrize("name", OTHER)
def test_a_setting_is_left_out_just_where_it_changes_nothing(
    name: str, needed: Callable[[Blueprint], Blueprint], of: Callable[[Blueprint], Any], blueprint: Blueprint
) -> None:
    """For modules, where it changes none; for training, where it changes no training."""
    changed = with_other(name, blueprint)
    is_left_out = needed(changed) == needed(blueprint)
    assert is_left_out == are_equal(of(changed), of(blueprint))
    assert are_equal(of(needed(changed)), of(changed))


def test_what_is_left_out_is_missed_nowhere_when_it_is_read_again(blueprint: Blueprint) -> None:
    """Settings are checked against each other: a default may not stand beside just any other setting."""
    odd = with_other("num_mediators", blueprint)
    assert odd.student.nac is not None
    groups = odd.student.nac.model_copy(
        update={"num_mediators": 26, "prior": Prior(kind="ring_of_cliques", num_groups=13)}
    )
    odd = odd.model_copy(update={"student": Student(family="nac", nac=groups)})
    for needed in (nac.for_modules(odd), nac.for_training(odd)):
        assert Blueprint.model_validate_json(needed.model_dump_json()) == needed
