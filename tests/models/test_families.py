"""What every student family must do; a new one is found in the table."""

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ray.blueprint import Blueprint, Nac, Prior, Student
from m2mkd_ray.errors import FillError, UsageError
from m2mkd_ray.models.families import FAMILIES, Family, family
from m2mkd_ray.models.fill import fill
from m2mkd_ray.models.vit import create_vit, splice, split

NAC = Nac(img_size=16, num_classes=5, width=16, num_heads=2, num_mediators=8, prior=Prior(steps=20))


@pytest.fixture(params=sorted(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def student(name: str) -> Family:
    return family(name)


@pytest.fixture
def blueprint(name: str, blueprint: Blueprint) -> Blueprint:
    """The small one, with a student of the family, in three modules."""
    if name == "vmoe":
        return blueprint
    of_nac = {"student": Student(family="nac", nac=NAC), "student_depths": (1, 1, 1)}
    return Blueprint.model_validate(blueprint.model_dump() | of_nac)


@pytest.fixture
def other(name: str, blueprint: Blueprint) -> Blueprint:
    """Another student of the family."""
    if name == "vmoe":
        return blueprint.model_copy(update={"student_depths": (2, 1, 1)})
    wider = Student(family="nac", nac=NAC.model_copy(update={"mlp_ratio": 3.0}))
    return blueprint.model_copy(update={"student": wider})


keeping = pytest.mark.parametrize("name", sorted({*FAMILIES} - {"nac"}), indirect=True)
"""Families whose whole student may keep its stitches."""


def test_modules_map_images_to_the_teachers_width_to_logits(
    student: Family, blueprint: Blueprint, images: Tensor
) -> None:
    tokens = torch.randn(3, 17, 24)
    *modules, last = student.modules(blueprint)
    for index, module in enumerate(modules):
        found = module(tokens if index else images)
        assert found.shape == (3, student.num_tokens(blueprint, index), 24)
    assert last(tokens).shape == (3, 5)


def test_the_whole_student_maps_images_to_logits(student: Family, blueprint: Blueprint, images: Tensor) -> None:
    assert student.model(blueprint)(images).shape == (3, 5)


def test_a_student_and_all_its_modules_cost_something(student: Family, blueprint: Blueprint) -> None:
    costs = [student.module_macs(blueprint, index, short=index == 2) for index in range(3)]
    assert all(cost > 0 for cost in [student.macs(blueprint), *costs])


def test_every_module_can_be_incubated_in_the_meta_model(
    student: Family, blueprint: Blueprint, images: Tensor
) -> None:
    meta = split(create_vit(blueprint.meta).requires_grad_(False), (1,) * blueprint.num_modules)
    for index, module in enumerate(student.modules(blueprint, drop_path=0.1)):
        splice(meta, index, module)(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_rules_place_every_tensor_of_the_modules(student: Family, blueprint: Blueprint) -> None:
    parts = [module.state_dict() for module in student.modules(blueprint)]
    model = student.model(blueprint)
    filled = fill(model, parts, student.rules(blueprint), student.fresh(blueprint))
    assert filled.filled + filled.dropped == sum(len(part) for part in parts)
    assert filled.filled + filled.fresh == len(model.state_dict())


@keeping
def test_a_student_that_keeps_its_stitches_is_its_modules_in_a_row(
    student: Family, blueprint: Blueprint, images: Tensor
) -> None:
    modules = nn.Sequential(*student.modules(blueprint)).eval()
    model = student.model(blueprint, keep_stitches=True).eval()
    rules = student.rules(blueprint, keep_stitches=True)
    fill(model, [module.state_dict() for module in modules], rules, student.fresh(blueprint))
    assert torch.equal(model(images), modules(images))


def test_modules_of_another_blueprint_are_refused(student: Family, blueprint: Blueprint, other: Blueprint) -> None:
    parts = [module.state_dict() for module in student.modules(blueprint)]
    with pytest.raises(FillError, match=r"no rule says where it goes|no module fills it|found .* expected"):
        fill(student.model(other), parts, student.rules(other), student.fresh(other))


def test_building_depends_on_the_seed_alone(student: Family, blueprint: Blueprint) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(nn.Sequential(*student.modules(blueprint)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_a_family_leaves_out_of_keys_changes_no_module_and_no_start(
    student: Family, blueprint: Blueprint
) -> None:
    for needed, build in (
        (student.for_modules(blueprint), lambda of: nn.Sequential(*student.modules(of))),
        (student.for_training(blueprint), student.model),
    ):
        states = []
        for given in (blueprint, needed):
            torch.manual_seed(5)
            states.append(build(given).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_no_parameter_is_without_axes(student: Family, blueprint: Blueprint) -> None:
    """DeepSpeed 0.19 cannot send one to other ranks."""
    assert all(parameter.dim() > 0 for parameter in student.model(blueprint).parameters())


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no student family 'moev'. Known families: .*vmoe"):
        family("moev")
