import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m2mkd_ray.models import create_vit, family, split
from m2mkd_ray.stages.parts import load_module, load_student, load_vit


def modules_of(chain) -> list[nn.Module]:
    modules = family("vmoe").modules(chain.recipe.blueprint)
    return [
        load_module(module, chain.folder(f"pair-{index}") / "module.safetensors")
        for index, module in enumerate(modules)
    ]


def test_the_student_has_its_modules_tensors_bit_for_bit_and_no_other(chain) -> None:
    """Every tensor by its value: the student's blocks are the modules' second layers here, one each."""
    student = load_file(chain.folder("assemble") / "model.safetensors")
    expected = {}
    for index, module in enumerate(modules_of(chain)):
        first, block, last = module
        expected |= {f"blocks.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
        expected |= first.state_dict() if index == 0 else {}
        expected |= last.state_dict() if index == 3 else {}
    assert student.keys() == expected.keys()
    assert all(torch.equal(student[name], expected[name]) for name in student)
    metrics = chain.metrics("assemble")
    assert metrics["filled"] == len(student)
    assert metrics["dropped"] == 6 * 4  # six stitches of four tensors
    assert metrics["num_parameters"] == sum(tensor.numel() for tensor in student.values())


def test_with_its_stitches_the_student_is_its_modules_in_a_row(chain) -> None:
    kept, images = chain.with_settings("keep_stitches=true"), torch.randn(2, 3, 28, 28)
    student = load_student(chain.recipe.blueprint, kept.folder("assemble"), keep_stitches=True)
    assert torch.equal(student(images), nn.Sequential(*modules_of(kept)).eval()(images))
    assert kept.metrics("assemble")["dropped"] == 0


def test_the_teacher_is_its_modules_in_a_row(chain) -> None:
    blueprint, images = chain.recipe.blueprint, torch.randn(2, 3, 28, 28)
    teacher = load_vit(blueprint.teacher, chain.folder("assemble-teacher"))
    modules = split(create_vit(blueprint.teacher), blueprint.teacher_depths)
    for index, module in enumerate(modules):
        load_module(module, chain.folder(f"incubate-{index}") / "module.safetensors")
    assert torch.equal(teacher(images), nn.Sequential(*modules).eval()(images))


@pytest.mark.parametrize("keep_stitches", [False, True])
def test_what_is_assembled_is_what_is_fine_tuned(keep_stitches: bool, chain) -> None:
    still = chain.with_settings(
        f"keep_stitches={str(keep_stitches).lower()}",
        "finetune={epochs: 0.2, lr: 1.0e-12, min_lr: 0, weight_decay: 0, batch_size: 32}",
    )
    assembled = load_file(still.folder("assemble") / "model.safetensors")
    tuned = load_file(still.folder("finetune") / "model.safetensors")
    torch.testing.assert_close(tuned, assembled, rtol=0, atol=1e-10)
