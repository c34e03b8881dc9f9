import torch
from safetensors.torch import load_file
from torch import nn

from m2mkd_ray.models import create_vit, split
from m2mkd_ray.stages.parts import load_vit


def test_the_modules_in_a_row_are_the_teacher(chain) -> None:
    blueprint, images = chain.recipe.blueprint, torch.randn(2, 3, 28, 28)
    folder = chain.folder("split")
    modules = split(create_vit(blueprint.teacher), blueprint.teacher_depths)
    for index, module in enumerate(modules):
        module.load_state_dict(load_file(folder / f"module-{index}.safetensors"))
    teacher = load_vit(blueprint.teacher, chain.folder("teacher"))
    assert torch.equal(nn.Sequential(*modules).eval()(images), teacher(images))
    assert len(list(folder.glob("module-*"))) == 4
    assert sum(chain.metrics("split")["num_parameters"]) == sum(p.numel() for p in teacher.parameters())
