"""What every student family must do; a new one is found in the table."""

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint
from m2mkd_ray.errors import FillError, UsageError
from m2mkd_ray.models.families import FAMILIES, Family, family
from m2mkd_ray.models.fill import fill
from m2mkd_ray.models.vit import create_vit, splice, split


@pytest.fixture(params=sorted(FAMILIES))
def student(request: pytest.FixtureRequest) -> Family:
    return family(request.param)


def test_modules_map_images_to_the_teachers_width_to_logits(
    student: Family, blueprint: Blueprint, images: Tensor
) -> None:
    tokens = images
    for module in student.modules(blueprint)[:-1]:
        tokens = module(tokens)
        assert tokens.shape == (3, 17, 24)
    assert student.modules(blueprint)[-1](tokens).shape == (3, 5)


def test_every_module_can_be_incubated_in_the_meta_model(
    student: Family, blueprint: Blueprint, images: Tensor
) -> None:
    meta = split(create_vit(blueprint.meta).requires_grad_(False), (1,) * blueprint.num_modules)
    for index, module in enumerate(student.modules(blueprint, drop_path=0.1)):
        splice(meta, index, module)(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("keep_stitches", [True, False])
def test_rules_place_every_tensor_of_the_modules(student: Family, blueprint: Blueprint, keep_stitches: bool) -> None:
    parts = [module.state_dict() for module in student.modules(blueprint)]
    model = student.model(blueprint, keep_stitches=keep_stitches)
    rules, fresh = student.rules(blueprint, keep_stitches=keep_stitches), student.fresh(blueprint)
    filled = fill(model, parts, rules, fresh)
    assert filled.filled + filled.dropped == sum(len(part) for part in parts)
    assert filled.filled + filled.fresh == len(model.state_dict())


def test_a_student_that_keeps_its_stitches_is_its_modules_in_a_row(
    student: Family, blueprint: Blueprint, images: Tensor
) -> None:
    modules = nn.Sequential(*student.modules(blueprint)).eval()
    model = student.model(blueprint, keep_stitches=True).eval()
    rules = student.rules(blueprint, keep_stitches=True)
    fill(model, [module.state_dict() for module in modules], rules, student.fresh(blueprint))
    assert torch.equal(model(images), modules(images))


def test_modules_of_another_blueprint_are_refused(student: Family, blueprint: Blueprint) -> None:
    parts = [module.state_dict() for module in student.modules(blueprint)]
    other = blueprint.model_copy(update={"student_depths": (2, 1, 1)})
    with pytest.raises(FillError, match=r"no rule says where it goes|no module fills it"):
        fill(student.model(other), parts, student.rules(other), student.fresh(other))


def test_building_depends_on_the_seed_alone(student: Family, blueprint: Blueprint) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(nn.Sequential(*student.modules(blueprint)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no student family 'moev'. Known families: .*vmoe"):
        family("moev")
